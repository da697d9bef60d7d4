"""Which files of a repository decide how its tests run: an edit of them does not count."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from pathlib import PurePosixPath

from nemocascade.swe.snapshots import Files, check_path

_SETTINGS = {
    *("conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml"),
    *("tox.ini", "setup.cfg", "pyproject.toml", "sitecustomize.py", "usercustomize.py"),
}
"""Files that configure tests wherever they stand."""
_METADATA = (".egg-info", ".dist-info")
"""Folders whose entry points pytest takes for plugins."""
_TEST_FOLDERS = {"test", "tests", "testing"}
_SOURCES = "src"
"""The folder that the runner imports from, beside the root."""
_AFTER_MODULE = 2
"""Names that may follow a module's in a dotted id: of a class and a method."""


def test_files(files: Iterable[str]) -> list[str]:
    """The paths whose names are those of test files."""
    return sorted(path for path in files if _is_test(path))


test_files.__test__ = False  # type: ignore[attr-defined]


def file_of(test: str, files: Container[str]) -> str | None:
    """The file that holds a test, by the test's id; None if none of `files` does.

    Raises ValueError for an id whose path leads outside.
    """
    path, _, _ = test.partition("::")
    if path.endswith(".py"):
        path = check_path(path)
        return path if path in files else None
    parts = test.split(".")
    for end in range(len(parts), max(0, len(parts) - _AFTER_MODULE - 1), -1):
        stem = "/".join(parts[:end])
        for root in ("", f"{_SOURCES}/"):
            for found in (f"{root}{stem}/__init__.py", f"{root}{stem}.py"):
                if found in files:
                    return found
    return None


def check_tests(tests: Iterable[str], files: Iterable[str]) -> set[str]:
    """Those of the files that hold the tests.

    Raises ValueError for a test that none does: an edit could make its file.
    """
    known = set(files)
    found = {test: file_of(test, known) for test in tests}
    if lost := [test for test, path in found.items() if path is None]:
        raise ValueError(
            f"the file of {lost[0]} is in neither the repository nor tests.files "
            f"({len(lost)} of {len(found)} tests): put it there, or leave the test out"
        )
    return {path for path in found.values() if path is not None}


class Protected:
    """The paths that edits may not touch, given a snapshot, hidden files, and ids of tests.

    These are: files of settings; the hidden files, and those that an id names; a test folder; new
    files that Python would import in the place of a test's. A folder is one of tests if its path
    says so, or if the snapshot has nothing but tests and settings in it. Of another folder, where
    tests lie beside sources, only the files whose names are those of tests count.

    Raises ValueError for an id whose file is in neither the snapshot nor the hidden files.
    """

    def __init__(self, snapshot: Files, hidden: Files, tests: Sequence[str]) -> None:
        self._snapshot = snapshot
        self._files = {*hidden, *check_tests(tests, {*snapshot, *hidden})}
        self._folders: set[str] = set()
        self._beside: set[str] = set()
        for parent in {PurePosixPath(path).parent for path in self._files}:
            if folder := self._test_folder(parent):
                self._folders.add(folder)
            else:
                self._beside.add(str(parent))
        dotted = {tuple(test.split(".")) for test in tests if "/" not in test and "::" not in test}
        self._modules = {_module(path) for path in self._files} | dotted

    def __contains__(self, path: str) -> bool:
        pure = PurePosixPath(path)
        if pure.name in _SETTINGS or any(part.endswith(_METADATA) for part in pure.parts):
            return True
        if path in self._files or any(str(parent) in self._folders for parent in pure.parents):
            return True
        if _is_test(path) and str(pure.parent) in self._beside:
            return True
        return path not in self._snapshot and self._replaces(path)

    def _test_folder(self, folder: PurePosixPath) -> str:
        """The folder of tests that `folder` is or lies in; empty if it holds sources too."""
        for inner in (folder, *folder.parents):
            if inner.name in _TEST_FOLDERS:
                return str(inner)
        start = f"{folder}/"
        inside = (path for path in self._snapshot if path.startswith(start))
        only = all(_is_test(path) or _is_setting(path) for path in inside)
        return str(folder) if only and str(folder) != "." else ""

    def _replaces(self, path: str) -> bool:
        """Whether a module of that path would be imported before a test's, or before a package
        that the test is in."""
        made = tuple(part for part in _module(path) if part != "__init__")
        for known in self._modules:
            size = min(len(made), len(known))
            if made[:size] == known[:size]:
                return True
        return False


def _is_test(path: str) -> bool:
    name = PurePosixPath(path).name
    return name.endswith(".py") and (name.startswith("test") or name.endswith("_test.py"))


def _is_setting(path: str) -> bool:
    return PurePosixPath(path).name in {*_SETTINGS, "__init__.py"}


def _module(path: str) -> tuple[str, ...]:
    """The parts of the name that a file is imported by, whatever its suffix."""
    pure = PurePosixPath(path)
    parts = (*pure.parent.parts, pure.name.partition(".")[0])
    return parts[1:] if parts[0] == _SOURCES else parts
