"""Repair tasks from rows in the style of SWE-Gym and R2E-Gym, with snapshots in folders.

A row names the folder of the repository before the repair, and has the text of the issue and the
hidden tests:

    {"instance_id": "...", "problem_statement": "...", "repository": "folder",
     "tests": {"files": {"tests/test_a.py": "..."}, "framework": "pytest"},
     "FAIL_TO_PASS": ["tests/test_a.py::test_b"], "PASS_TO_PASS": [...]}

`files` may also be the name of a folder; a file that is not UTF-8 is `{"base64": "..."}` in the
row. Names of tests may be a JSON string, as in SWE-Gym. They may be inside `tests`, which takes
precedence, and under lower-case keys. Without a `framework`, pytest runs the tests if all have
names in its form. A `test_patch` must have been applied: its files are `tests.files`. A test whose
file is not among those runs as it is in the snapshot.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from nemocascade.runtime.row_errors import DataError, RowError
from nemocascade.runtime.row_files import is_data_file
from nemocascade.runtime.strict_json import parse_field, parse_json
from nemocascade.swe.protected import check_tests
from nemocascade.swe.repository import HiddenTests
from nemocascade.swe.snapshots import Files, check_path, read_snapshot, snapshot_paths

Row = Mapping[str, Any]
ROW, SNAPSHOT, TESTS = "row.json", "repository", "tests"
"""Content of each task's folder in a folder of tasks."""


def folder_rows(folder: Path) -> Iterator[tuple[str, Any]]:
    """Yield (path below the folder, row) of a folder of task folders.

    An unreadable row is a RowError. Raises DataError for none.
    """
    found = sorted(folder.glob(f"*/{ROW}"))
    if not found:
        raise DataError(
            f"{folder} holds no */{ROW}: a task is a folder with {ROW}, {SNAPSHOT}/ and {TESTS}/"
        )
    for path in found:
        try:
            row = parse_json(path.read_bytes())
        except (RowError, OSError) as error:
            yield str(path.relative_to(folder)), RowError(str(error))
            continue
        if not isinstance(row, dict):
            yield str(path.relative_to(folder)), row
            continue
        base: dict[str, Any] = {"repository": f"{path.parent.name}/{SNAPSHOT}"}
        if (path.parent / TESTS).is_dir():
            base["tests"] = {"files": f"{path.parent.name}/{TESTS}"}
        yield str(path.relative_to(folder)), {**base, **row}


def is_task_folder(folder: Path) -> bool:
    """Return True if a folder has task folders in it, or no data file."""
    files = (file for file in folder.rglob("*") if file.name != ROW)
    return any(folder.glob(f"*/{ROW}")) or not any(map(is_data_file, files))


def inner_folder(folder: Path, name: str, field: str) -> Path:
    """Return the folder that a row names. Raises ValueError if it is missing or outside `folder`.

    Links are followed first: rows come from downloads, and what they name may enter a prompt.
    """
    outer = folder.resolve()
    try:
        root = (outer / name).resolve()
        there = root.is_dir()
    except (OSError, ValueError) as error:
        raise ValueError(f"{field!r}: {name[:80]!r} is not a path ({error})") from error
    if not root.is_relative_to(outer) or root == outer:
        raise ValueError(f"{field!r}: {name[:80]!r} is not inside of {outer}, the rows' own folder")
    if not there:
        raise ValueError(f"{field!r}: there is no folder {root}")
    return root


def issue_of(row: Row) -> str:
    """Return the text of the issue. Raises ValueError if it is empty."""
    issue = str(row.get("problem_statement") or row.get("issue") or "").strip()
    if not issue:
        raise ValueError("'problem_statement' (or 'issue') is empty")
    return issue


def check_imported(row: Row) -> None:
    """Raise ValueError for a row as published, whose repository is in an image or on a server."""
    if row.get("repository") or row.get("files"):
        return
    if named := [name for name in ("docker_image", "base_commit") if row.get(name)]:
        raise ValueError(
            f"{named[0]}({row[named[0]]!r}) says where the repository is, but images are not run "
            "and nothing is downloaded: make tasks of the rows with nemocascade import-swe"
        )


def answer_of(row: Row, folder: Path) -> dict[str, Any]:
    """Return the verifier's answer of a row as JSON. folder: names in the row are relative to it.

    Raises ValueError for missing or malformed fields, for a snapshot that could not be read later,
    and for tests that are in no file.
    """
    check_imported(row)
    where = row.get("repository")
    if not isinstance(where, str) or not where:
        raise ValueError("'repository' must name the folder with the snapshot")
    root = inner_folder(folder, where, "repository")
    tests = row.get("tests") or {}
    answer = {
        "repository": str(root),
        "tests": _test_files(tests.get("files"), folder),
        **test_settings_of(row, tests),
    }
    names = (*answer["fail_to_pass"], *answer["pass_to_pass"])
    check_tests(names, [*_listed_once(str(root)), *answer["tests"]])
    return answer


def test_settings_of(row: Row, tests: Row) -> dict[str, Any]:
    """Return the fields of `HiddenTests` except the files: names of tests and framework.

    tests: the row's `tests`, which may contain the names itself. Raises ValueError for names that
    are not a list of strings, for an empty FAIL_TO_PASS, and for an unknown or unusable framework.
    """
    names = {key.lower(): _names(row, tests, key) for key in ("FAIL_TO_PASS", "PASS_TO_PASS")}
    if not names["fail_to_pass"]:
        raise ValueError(
            "'FAIL_TO_PASS' names no test, in the row or in 'tests': a repair must make one pass"
        )
    dotted = [name for found in names.values() for name in found if not _is_of_pytest(name)]
    framework = tests.get("framework") or ("unittest" if dotted else "pytest")
    if framework not in ("unittest", "pytest"):
        raise ValueError(f"tests.framework({framework!r}) must be unittest or pytest")
    if framework == "pytest" and dotted:
        raise ValueError(
            f"{dotted[0]!r} is not a test's name in pytest: name it as "
            "tests/test_a.py::Case::test_b"
        )
    return {**names, "framework": framework, "sealed": bool(tests.get("sealed", True))}


def snapshot_of(answer: Mapping[str, Any]) -> Files:
    """Return the repository before the repair: `files` by path, or the folder `repository`."""
    if "files" in answer:
        return {path: text.encode() for path, text in answer["files"].items()}
    return _read_once(answer["repository"])


def hidden_of(answer: Mapping[str, Any]) -> HiddenTests:
    """Return the tests that decide."""
    return HiddenTests(
        files={path: _bytes(path, content) for path, content in answer["tests"].items()},
        fail_to_pass=tuple(answer["fail_to_pass"]),
        pass_to_pass=tuple(answer["pass_to_pass"]),
        framework=answer["framework"],
        sealed=answer["sealed"],
    )


@lru_cache(maxsize=32)
def _read_once(folder: str) -> Files:
    """Read a snapshot; cached because many episodes of one task share its files."""
    return read_snapshot(folder)


@lru_cache(maxsize=32)
def _listed_once(folder: str) -> tuple[str, ...]:
    """List a folder; cached because many rows may share it."""
    return tuple(snapshot_paths(folder))


def _names(row: Row, tests: Row, key: str) -> list[str]:
    """Return the names of `tests`, else of the row; null counts as missing."""
    places = ((tests, key), (tests, key.lower()), (row, key), (row, key.lower()))
    found: Any = next((v for where, name in places if (v := where.get(name)) is not None), [])
    if isinstance(found, str):
        found = parse_field(found, f"{key}({found[:80]!r}), a list of test ids")
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise ValueError(f"{key}({str(found)[:80]}) must be a list of test ids, or its JSON text")
    return found


def _is_of_pytest(name: str) -> bool:
    return name.partition("::")[0].endswith(".py")


def _test_files(files: Any, folder: Path) -> dict[str, Any]:
    """Return file contents as JSON values, by path."""
    if isinstance(files, str):
        root = inner_folder(folder, files, "tests.files")
        return {path: _content(data) for path, data in read_snapshot(root).items()}
    if not isinstance(files, Mapping) or not files:
        raise ValueError("'tests.files' must be a folder, or an object of paths and texts")
    for path, content in files.items():
        _bytes(path, content)
    return {check_path(path): content for path, content in files.items()}


def _content(data: bytes) -> Any:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def _bytes(path: str, content: Any) -> bytes:
    """Decode a value made by `_content`. Raises ValueError for other values."""
    try:
        match content:
            case str():
                return content.encode()
            case {"base64": str(data)}:
                return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise ValueError(f"tests.files: {path!r} cannot be read: {error}") from error
    raise ValueError(
        f"tests.files: {path!r} is {type(content).__name__}: give a text, or an object with "
        "'base64' for a file that is none"
    )
