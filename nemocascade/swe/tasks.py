"""Repair tasks of rows, with repository and tests in folders or in the row itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from nemocascade.swe.edits import checked_path
from nemocascade.swe.patches import parse_patch
from nemocascade.swe.protected import check_tests
from nemocascade.swe.repository import HiddenTests
from nemocascade.swe.rows import (
    answer_of,
    check_imported,
    hidden_of,
    inner_folder,
    snapshot_of,
    test_settings_of,
)
from nemocascade.swe.snapshots import Files
from nemocascade.types import Row

LARGEST_TEXT = 1 << 20
"""Maximum bytes of a text; larger files and those that are not UTF-8 cannot be edited."""


@dataclass(frozen=True)
class RepairTask:
    """A repair task of a row.

    where: `{"repository": folder}` or `{"files": texts by path}`. patch: the correct repair, or
    empty. tests: None if a judge must decide.
    """

    where: Mapping[str, Any]
    patch: str
    tests: HiddenTests | None

    @property
    def snapshot(self) -> Files:
        """The repository before the repair."""
        return snapshot_of(self.where)

    @property
    def texts(self) -> Mapping[str, str]:
        """Text files of the repository."""
        return texts_at(self.where)


def texts_at(where: Mapping[str, Any]) -> Mapping[str, str]:
    """Return the texts of `RepairTask.where`; those of a folder are shared by all callers."""
    return where["files"] if "files" in where else folder_texts(where["repository"])


def task_of(row: Row, folder: Path) -> RepairTask:
    """Parse the task of a row. folder: names in the row are relative to it.

    The repository is `files` (path to text), or `repository`: such an object, or the name of a
    folder. Raises ValueError for malformed fields, and for tests that are in no file.
    """
    check_imported(row)
    named = row.get("repository", row.get("files"))
    where: dict[str, Any]
    if isinstance(named, str):
        where = {"repository": str(inner_folder(folder, named, "repository"))}
    else:
        where = {"files": row_files(named or {})}
    if not texts_at(where):
        raise ValueError("'repository' and 'files' name no text file: there is nothing to edit")
    tests = _tests(row, where, folder) if row.get("tests") else None
    return RepairTask(where, str(row.get("patch") or ""), tests)


def _tests(row: Row, where: Mapping[str, Any], folder: Path) -> HiddenTests:
    """Parse `tests.files` (path to text, or a folder), `FAIL_TO_PASS`, and more; see `swe.rows`."""
    tests = row["tests"]
    files = tests.get("files")
    if not files:
        raise ValueError("'tests.files' is empty: tests that an edit could change decide nothing")
    if "repository" in where:
        files = row_files(files) if isinstance(files, list) else files
        row = {**row, **where, "tests": {**tests, "files": files}}
        return hidden_of(answer_of(row, folder))
    hidden = hidden_of({"tests": row_files(files), **test_settings_of(row, tests)})
    names = (*hidden.fail_to_pass, *hidden.pass_to_pass)
    check_tests(names, [*where["files"], *hidden.files])
    return hidden


def texts_of(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the text files by path."""
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
    """Return the texts in a folder, shared by rows and rollouts: do not change them."""
    return texts_of(snapshot_of({"repository": folder}))


def with_texts(files: Mapping[str, bytes], texts: Mapping[str, str]) -> dict[str, bytes]:
    """Return the files with the contents in `texts` replaced."""
    return {**files, **{path: text.encode() for path, text in texts.items()}}


def row_files(files: Any) -> dict[str, str]:
    """Parse files of a row: an object, or a list of objects with `path` and `content`.

    Raises ValueError for a path that leads outside, or a content that is not text.
    """
    pairs = list(files.items() if isinstance(files, Mapping) else map(_pair, files))
    for path, text in pairs:
        if not isinstance(text, str):
            raise ValueError(f"{path}: the content is {type(text).__name__}, not text")
    return {checked_path(path): text for path, text in pairs}


def patched_files(patch: str) -> list[str]:
    """Return the text files that a patch changes, by their old names; new files by their new ones.

    Files with only a mode change are skipped. Raises ValueError for a patch that cannot be parsed.
    """
    files = [f for f in parse_patch(patch) if f.hunks or f.old != f.new]
    return [checked_path(path) for path in dict.fromkeys(f.path for f in files if not f.is_binary)]


def made_files(patch: str) -> set[str]:
    """Return the files that a patch creates."""
    return {file.path for file in parse_patch(patch) if file.old is None}


def _pair(file: Mapping[str, Any]) -> tuple[str, Any]:
    return file["path"], file["content"]
