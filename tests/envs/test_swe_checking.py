"""`nemocascade check-tasks`: it reports tasks whose tests do not detect a repair."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.sandbox import sandbox_or_skip
from helpers.swe import SANDBOX

from nemocascade import cli
from nemocascade.envs.swe_checking import Checked, check_tasks, summary
from nemocascade.recipe.commands import CheckSettings
from nemocascade.recipe.envs import EnvConfig
from nemocascade.sandbox import launch
from nemocascade.types import SandboxUnavailable

TESTS = """\
import unittest

from cart import total


class TestCart(unittest.TestCase):
    def test_sum(self):
        self.assertEqual(total([1, 2]), 3)

    def test_none(self):
        with self.assertRaises(TypeError):
            total(None)

    def test_odd(self):
        self.assertEqual(total([1]), 7)

    @unittest.skip("not here")
    def test_skipped(self):
        pass
"""
FILES = {"cart.py": "def total(xs):\n    return sum(xs) + 1\n"}
PATCH = "--- a/cart.py\n+++ b/cart.py\n@@ -2 +2 @@\n-    return sum(xs) + 1\n+    return sum(xs)\n"
SUM, NONE, ODD, SKIPPED = (
    f"tests.test_cart.TestCart.test_{name}" for name in ("sum", "none", "odd", "skipped")
)
ROW: dict[str, Any] = {
    "problem_statement": "The total of a cart is wrong.",
    "files": FILES,
    "patch": PATCH,
    "tests": {"files": {"tests/test_cart.py": TESTS}, "sealed": True},
    "FAIL_TO_PASS": [SUM],
    "PASS_TO_PASS": [NONE],
}


@pytest.fixture(scope="module", autouse=True)
def _sandbox() -> None:
    sandbox_or_skip(SANDBOX).close()


def check(path: Path, *rows: dict[str, Any], time_s: float = SANDBOX.time_s) -> list[Checked]:
    path = path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sandbox = replace(SANDBOX, time_s=time_s)
    return list(check_tasks(CheckSettings(str(path), EnvConfig(sandbox=sandbox))))


def test_tasks_that_can_decide_are_right(tmp_path: Path) -> None:
    untested = {**ROW, "tests": None}
    unpatched = {**ROW, "patch": ""}
    other = {"question": "?", "answer": "!"}
    found = check(tmp_path, {**ROW, "instance_id": "a"}, other, untested, unpatched)
    assert found == [
        Checked("a", ()),
        Checked(f"{tmp_path}/rows.jsonl:3", (), tested=False),
        Checked(f"{tmp_path}/rows.jsonl:4", (), patched=False),
    ]
    text = "3 tasks: 3 right, 0 wrong; 1 have no tests; 1 have no patch"
    assert summary(found).startswith(text)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"FAIL_TO_PASS": [SUM, NONE]}, f"FAIL_TO_PASS pass without a repair: {NONE}"),
        ({"PASS_TO_PASS": [NONE, ODD]}, rf"PASS_TO_PASS do not .* {ODD} \(failed\)"),
        ({"PASS_TO_PASS": [SKIPPED]}, rf"{SKIPPED} \(skipped\)"),
        ({"PASS_TO_PASS": [f"{NONE}s"]}, rf"{NONE}s \("),
        ({"FAIL_TO_PASS": [SUM, ODD]}, f"not all tests pass with the patch: .*{ODD}"),
        ({"patch": PATCH.replace("+ 1", "+ 2")}, "cannot be applied: cart.py: hunk 1 does not"),
        ({"patch": PATCH.replace("+    return sum(xs)", "+    return 2")}, "not all tests pass"),
        ({"FAIL_TO_PASS": []}, "ValueError: 'FAIL_TO_PASS' names no test"),
        ({"files": None}, "ValueError: 'repository' and 'files' name no text file"),
        ({"tests": {"files": {"tests/test_cart.py": "while True: pass"}}}, "ended early: time"),
    ],
)
def test_tasks_that_cannot_decide_are_named(
    tmp_path: Path, change: dict[str, Any], fault: str
) -> None:
    # Tests without an end are run three times up to the limit.
    limit = 4.0 if "time" in fault else SANDBOX.time_s
    right, wrong = check(tmp_path, ROW, {**ROW, **change}, time_s=limit)
    assert right.faults == ()
    with pytest.raises(ValueError, match=fault):
        raise ValueError("; ".join(wrong.faults))


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a folder of tasks, as `import-swe` writes them."""
    for name, patch in (("right", PATCH), ("wrong", PATCH.replace("+ 1", "+ 2"))):
        folder = tmp_path / "tasks" / name
        (folder / "repository").mkdir(parents=True)
        (folder / "tests" / "tests").mkdir(parents=True)
        (folder / "repository" / "cart.py").write_text(FILES["cart.py"])
        (folder / "tests" / "tests" / "test_cart.py").write_text(TESTS)
        row = {key: ROW[key] for key in ("problem_statement", "FAIL_TO_PASS", "PASS_TO_PASS")}
        (folder / "row.json").write_text(json.dumps({**row, "patch": patch}))
    arguments = ["nemocascade", "check-tasks", str(tmp_path / "tasks")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--envs.sandbox.workers", "2"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("wrong/row.json: the patch cannot be applied: cart.py: hunk 1")
    assert last == "2 tasks: 1 right, 1 wrong"
    (tmp_path / "tasks" / "wrong" / "row.json").unlink()
    cli.main()
    assert capsys.readouterr().out == "1 tasks: 1 right, 0 wrong\n"
    monkeypatch.setattr(sys, "argv", [*arguments[:2], str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2


def test_a_host_without_isolation_stops_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(launch, "missing", lambda isolation: "forbidden by this test")
    with pytest.raises(SandboxUnavailable):
        check(tmp_path, ROW)
