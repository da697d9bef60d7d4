"""Protected files of a repository: they decide how tests run, so edits of them are ignored."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from pathlib import PurePosixPath

from nemocascade.swe.snapshots import Files, check_path

_SETTINGS = {
    *("conftest.py", "pytest.ini", ".pytest.ini", "pytest.toml", ".pytest.toml"),
    *("tox.ini", "setup.cfg", "pyproject.toml", "sitecustomize.py", "usercustomize.py"),
}
"""Files that configure tests in any folder."""
_METADATA = (".egg-info", ".dist-info")
"""Folders whose entry points pytest loads as plugins."""
_TEST_FOLDERS = {"test", "tests", "testing"}
_SOURCES = "src"
"""Import folder of the runner, besides the root."""
_AFTER_MODULE = 2
"""Names after the module's in a dotted id: class and method."""


def test_files(files: Iterable[str]) -> list[str]:
    """Return the paths whose names are those of test files."""
    return sorted(path for path in files if _is_test(path))


test_files.__test__ = False  # type: ignore[attr-defined]


def file_of(test: str, files: Container[str]) -> str | None:
    """Return the file of a test, by the test's id; None if it is not in `files`.

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
    """Return the files that contain the tests.

    Raises ValueError for a test that is in no file: an edit could create it.
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
    """Set of paths that edits may not change, for a snapshot, hidden files, and ids of tests.

    It holds files of settings, the hidden files, files named by an id, and files in test folders.
    It also holds new files that Python would import instead of a test's. A folder is a test folder
    if its path says so, or if the snapshot has only tests and settings in it. In a folder with both
    tests and sources, only files with names of test files are protected.

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
        """Return the test folder that is or contains `folder`; empty if it has sources too."""
        for inner in (folder, *folder.parents):
            if inner.name in _TEST_FOLDERS:
                return str(inner)
        start = f"{folder}/"
        inside = (path for path in self._snapshot if path.startswith(start))
        only = all(_is_test(path) or _is_setting(path) for path in inside)
        return str(folder) if only and str(folder) != "." else ""

    def _replaces(self, path: str) -> bool:
        """Return True if Python would import this path before a test's module or its package."""
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
    """Return the parts of a file's import name, whatever its suffix."""
    pure = PurePosixPath(path)
    parts = (*pure.parent.parts, pure.name.partition(".")[0])
    return parts[1:] if parts[0] == _SOURCES else parts
