"""Files in a prompt: within the size limit, and without revealing the golden ones."""

from __future__ import annotations

import difflib
import re

import pytest

from nemocascade.swe.prompt_files import SEPARATOR, shown_files

LINES = [f"line {i}" for i in range(1, 301)]
TEXT = "\n".join(LINES) + "\n"


def patch_of(path: str, *changed: int) -> str:
    new = [f"{line} new" if i in changed else line for i, line in enumerate(LINES, start=1)]
    names = (f"a/{path}", f"b/{path}")
    return "\n".join(difflib.unified_diff(LINES, new, *names, lineterm="")) + "\n"


def size(shown: dict[str, str]) -> int:
    return len(SEPARATOR.join(shown.values()))


def test_retrieved_files_fill_the_room_by_rank() -> None:
    files = {
        "gold.py": "x\n" * 50,
        "best.py": "cart cart cart " * 40,
        "good.py": "cart cart\n",
        "fair.py": "cart and more of it\n",
        "more.py": "cart and a lot of other things\n",
    }
    shown = shown_files("cart", files, ["gold.py"], max_chars=10_000, retrieved=3)
    assert list(shown) == ["best.py", "fair.py", "gold.py", "good.py"]
    # The best one does not fit; nothing worse than the third takes its place.
    shown = shown_files("cart", files, ["gold.py"], max_chars=300, retrieved=3)
    assert list(shown) == ["fair.py", "gold.py", "good.py"]
    assert size(shown) <= 300


@pytest.mark.parametrize("max_chars", [400, 700, 1500, 3000])
def test_golden_files_are_cut_around_their_changes(max_chars: int) -> None:
    files = {"a.py": TEXT, "b.py": TEXT, "c.py": "line 1\n"}
    patch = patch_of("a.py", 100, 200) + patch_of("b.py", 50)
    shown = shown_files(
        "line", files, ["a.py", "b.py"], max_chars=max_chars, retrieved=5, patch=patch
    )
    assert max_chars - 200 < size(shown) <= max_chars
    windows = {
        path: [
            tuple(map(int, found)) for found in re.findall(r"\[lines (\d+)-(\d+) of 300\]", text)
        ]
        for path, text in shown.items()
    }
    around = windows["b.py"][0][1] - 50
    assert windows["b.py"] == [(max(1, 50 - around), 50 + around)]
    if around < 50:
        expected = [(100 - around, 100 + around), (200 - around, 200 + around)]
    else:
        expected = [(100 - around, 200 + around)]
    assert windows["a.py"] == expected
    for path, found in windows.items():
        for first, last in found:
            assert "\n```\n" + "\n".join(LINES[first - 1 : last]) + "\n```" in shown[path]


def test_golden_files_are_never_omitted() -> None:
    shown = shown_files(
        "", {"a.py": TEXT}, ["a.py"], max_chars=1, retrieved=5, patch=patch_of("a.py", 9)
    )
    assert shown == {"a.py": "### a.py\n[lines 9-9 of 300]\n```\nline 9\n```"}
    # Without a patch nobody knows where to cut.
    shown = shown_files("", {"a.py": TEXT}, ["a.py"], max_chars=1, retrieved=5)
    assert shown == {"a.py": f"### a.py\n```\n{TEXT}\n```"}


def test_no_text_closes_its_fence() -> None:
    text = "```python\nx\n```\n[lines 1-2 of 3]\n````\n"
    shown = shown_files("", {"a.md": text}, ["a.md"], max_chars=1000, retrieved=0)
    assert shown == {"a.md": f"### a.md\n`````\n{text}\n`````"}
