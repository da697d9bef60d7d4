"""The text files of a repository, which edits change; and what rows say of files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from nemocascade.swe.edits import checked_path
from nemocascade.swe.patches import parse_patch
from nemocascade.swe.rows import snapshot_of

LARGEST_TEXT = 1 << 20
"""Bytes; larger files, and those that are not UTF-8, are no sources and cannot be edited."""


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


@lru_cache(maxsize=8)
def folder_texts(folder: str) -> Mapping[str, str]:
    """The texts in a folder, shared by its rows and rollouts: nobody may change them."""
    return texts_of(snapshot_of({"repository": folder}))


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
    """The text files that a patch changes, as they were named before; new ones as after it.

    Files whose mode alone changes are none. Raises ValueError for a patch that cannot be read.
    """
    files = [f for f in parse_patch(patch) if f.hunks or f.old != f.new]
    return [checked_path(path) for path in dict.fromkeys(f.path for f in files if not f.is_binary)]


def made_files(patch: str) -> set[str]:
    """The files that a patch makes: those that are not there before it."""
    return {file.path for file in parse_patch(patch) if file.old is None}


def _pair(file: Mapping[str, Any]) -> tuple[str, Any]:
    return file["path"], file["content"]
