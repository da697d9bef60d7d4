"""Rows in the form of R2E-Gym, as rows in the form of SWE-Gym with the files of their tests.

A row names an image (`docker_image`), which is not needed where a git clone has the commit. It has
the repair (`parsed_commit_content`), the tests and their log before it
(`execution_result_content`), and their results after it (`expected_output_json`). Tests are named
there without their file, and run in `r2e_tests`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemocascade.runtime.strict_json import parse_field
from nemocascade.runtime.turns import kind_of

Row = Mapping[str, Any]
FIELDS = ("parsed_commit_content", "execution_result_content", "expected_output_json")
TEST_FOLDER = "r2e_tests"

_PASSED = "PASSED"
_SUMMARY = "short test summary info"
_RESULT = re.compile(r"(PASSED|FAILED|ERROR) [^:\n]*::(.*)")
_COLOR = re.compile(r"\x1b\[\d+m")
_ISSUE = re.compile(r"\[ISSUE\](.*)\[/ISSUE\]", re.DOTALL)
_SIGNS = {"context": " ", "added": "+", "deleted": "-", "note": "\\ "}
_TEST_FOLDERS = ("test", "tests", "Test", "Tests")


def is_r2e(row: Row) -> bool:
    """Return True if a row has R2E-Gym's form."""
    return all(name in row for name in FIELDS)


def converted(row: Row) -> dict[str, Any]:
    """Return the row in SWE-Gym's form, with `test_files` (text by path) instead of `test_patch`.

    `base_commit` may be a hash with `^`. Tests that fail after the repair, too, are dropped: no
    repair must make them fail. Raises ValueError for a row whose parts do not fit together.
    """
    commit, run, expected = (_object(row, name) for name in FIELDS)
    names, codes = run.get("test_file_names") or [], run.get("test_file_codes") or []
    if not names or len(names) != len(codes):
        raise ValueError(f"{len(names)} test_file_names have {len(codes)} test_file_codes")
    files = {f"{TEST_FOLDER}/{name}": code for name, code in zip(names, codes, strict=True)}
    before = _results(run.get("old_commit_res_stdout") or "")
    if not before:
        raise ValueError("execution_result_content: old_commit_res_stdout holds no test's result")
    after = {_key(name): status for name, status in expected.items()}
    passing = [name for name, status in after.items() if status == _PASSED]
    ids = {name: _id(name, files) for name in passing}
    issue = str(row.get("problem_statement") or "")
    found = _ISSUE.search(issue)
    return {
        "instance_id": f"{row.get('repo_name')}__{str(row.get('commit_hash'))[:12]}",
        "repo": row.get("repo_name"),
        "base_commit": commit.get("old_commit_hash"),
        "problem_statement": (found[1] if found else issue).strip(),
        "patch": "".join(_patch(diff) for diff in commit["file_diffs"] if not _is_test(diff)),
        "test_files": files,
        "FAIL_TO_PASS": [ids[name] for name in passing if before.get(name) != _PASSED],
        "PASS_TO_PASS": [ids[name] for name in passing if before.get(name) == _PASSED],
        "docker_image": row.get("docker_image"),
    }


def _object(row: Row, name: str) -> dict[str, Any]:
    value = row[name]
    value = parse_field(value, name) if isinstance(value, str) else value
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be an object, it is {kind_of(value)}")
    return value


def _results(log: str) -> dict[str, str]:
    """Return the status of each test in the summary of a log of pytest."""
    _, _, summary = _COLOR.sub("", log).partition(_SUMMARY)
    return {_key(name.replace("::", ".")): status for status, name in _RESULT.findall(summary)}


def _key(name: str) -> str:
    return _COLOR.sub("", name).split(" - ")[0].strip()


def _id(name: str, files: Mapping[str, str]) -> str:
    """Return pytest's id of a test that is named `Class.method[parameters]` or `function`."""
    head, bracket, parameters = name.partition("[")
    first = re.escape(head.partition(".")[0])
    defined = re.compile(rf"^(?:class|def|async def) {first}\b", re.MULTILINE)
    found = [path for path, code in files.items() if defined.search(code)]
    if len(found) != 1:
        raise ValueError(f"the test {name!r} is defined in {len(found)} of the files of tests")
    return f"{found[0]}::{head.replace('.', '::')}{bracket}{parameters}"


def _is_test(diff: Row) -> bool:
    *folders, name = diff["header"]["file"]["path"].split("/")
    named = name.startswith("test_") or name.endswith("_test.py")
    return named or any(folder in _TEST_FOLDERS for folder in folders)


def _patch(diff: Row) -> str:
    """Return a file's changes as a unified diff; empty for a file of which no line changed."""
    hunks = "".join(map(_hunk, diff.get("hunks") or ()))
    if not hunks:
        return ""
    return f"--- {diff['minus_file']['path']}\n+++ {diff['plus_file']['path']}\n{hunks}"


def _hunk(hunk: Row) -> str:
    old, new = (_range(hunk["descriptor"][side]) for side in ("old_range", "new_range"))
    lines = hunk["line_group"]["all_lines"]
    text = "".join(f"{_SIGNS[line['type']]}{line['content']}\n" for line in lines)
    return f"@@ -{old} +{new} @@\n{text}"


def _range(span: Row) -> str:
    return f"{span['start']}" if span.get("length") is None else f"{span['start']},{span['length']}"
