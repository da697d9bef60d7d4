"""Checks of an HTML page that must stand alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The elements of a page; `broken` lists tags that close what is not open."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.broken: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.broken.append(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def check_page(path: Path) -> Page:
    """A page whose tags match and which needs nothing but itself."""
    page = Page(path)
    assert not page.broken
    assert not page.open
    names = [str(a["id"]) for _, a in page.elements if a.get("id")]
    # Clip paths and markers are named by their content: where a name stands twice, so does a shape.
    repeated = {n for n in names if names.count(n) > 1}
    assert all(re.fullmatch(r"[mp][0-9a-f]{10}", n) for n in repeated), repeated
    for tag, attributes in page.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "image")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "data"):
                assert str(value).startswith(("#", "data:"))
    style = path.read_text(encoding="utf-8")
    assert not re.search(r"url\((?!#)", style)
    assert "@import" not in style
    return page
