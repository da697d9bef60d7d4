"""The text files of a repository, which edits change; and what rows say of files."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemocascade.envs.swe.edits import checked_path

LARGEST_TEXT = 1 << 20
"""Bytes; larger files, and those that are not UTF-8, are no sources and cannot be edited."""

_BEFORE = re.compile(r"^--- (?:a/)?([^\t\n]+)", re.MULTILINE)
_AFTER = re.compile(r"^\+\+\+ (?:b/)?([^\t\n]+)", re.MULTILINE)


def texts_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """The files that are text, by path."""
    found = {}
    for path, data in files.items():
        if len(data) <= LARGEST_TEXT:
            try:
                found[path] = data.decode()
            except UnicodeDecodeError:
                continue
    return found


def with_texts(files: Mapping[str, bytes], texts: Mapping[str, str]) -> dict[str, bytes]:
    """The files, with those of `texts` in the place of their old contents."""
    return {**files, **{path: text.encode() for path, text in texts.items()}}


def row_files(files: Any) -> dict[str, str]:
    """Files as a row holds them: an object, or a list of objects with `path` and `content`.

    Raises ValueError for a path that leads outside, or a content that is no text.
    """
    pairs = list(files.items() if isinstance(files, Mapping) else map(_pair, files))
    for path, text in pairs:
        if not isinstance(text, str):
            raise ValueError(f"{path}: the content is {type(text).__name__}, not text")
    return {checked_path(path): text for path, text in pairs}


def patched_files(patch: str) -> list[str]:
    """The files that a unified diff changes, as they were named before; new ones as after it."""
    before, after = _BEFORE.findall(patch), _AFTER.findall(patch)
    if not before or len(before) != len(after):
        raise ValueError("'patch' is no unified diff: it has no pairs of --- and +++ lines")
    paths = [b if b != "/dev/null" else a for b, a in zip(before, after, strict=True)]
    return [checked_path(path) for path in dict.fromkeys(paths)]


def _pair(file: Mapping[str, Any]) -> tuple[str, Any]:
    return file["path"], file["content"]
