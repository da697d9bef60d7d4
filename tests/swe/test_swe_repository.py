"""Tests of repositories in the sandbox: outcomes, verdicts, and edits that try to fake them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType

import pytest
from helpers.sandbox import sandbox_or_skip
from helpers.swe_attacks import (
    ALL,
    ALL_BUT_CHECK,
    ATTACKS,
    CASE,
    FIXED,
    HIDDEN,
    HONEST_TESTS,
    REPLACED,
    SNAPSHOT,
)

from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.swe import repository
from nemocascade.swe.repository import HiddenTests, judge, run_tests
from nemocascade.swe.runner import show
from nemocascade.swe.snapshots import read_snapshot
from nemocascade.types import SandboxError, Verdict


def hidden(*, sealed: bool, tests: tuple[str, ...] = ("test_double", "test_text")) -> HiddenTests:
    ids = tuple(f"{CASE}.{name}" for name in tests)
    return HiddenTests({"tests/test_calc.py": HIDDEN}, ids, (f"{CASE}.test_check",), sealed=sealed)


@pytest.fixture(scope="module")
def sandbox() -> Iterator[SandboxPool]:
    made = sandbox_or_skip(SandboxConfig(time_s=3.0, workers=1, output_kib=256))
    yield made
    made.close()


def verdict(sandbox: SandboxPool, edits: dict[str, bytes], *, sealed: bool = False) -> Verdict:
    return judge(sandbox, SNAPSHOT, SNAPSHOT | edits, hidden(sealed=sealed))


@pytest.mark.parametrize("sealed", [False, True])
def test_a_repaired_repository_passes_and_the_broken_one_does_not(
    sandbox: SandboxPool, sealed: bool
) -> None:
    found = verdict(sandbox, {"pack/calc.py": FIXED}, sealed=sealed)
    assert (found.reward, found.details["passed"]) == (1.0, 3), found
    half = FIXED.replace(b"x < 0", b"x < -5")
    assert verdict(sandbox, {"pack/calc.py": half}, sealed=sealed).reward == 0.0
    broken = verdict(sandbox, {}, sealed=sealed)
    assert (broken.reward, broken.details["passed"]) == (0.0, 0)
    assert broken.details["not_passed"][f"{CASE}.test_double"] == "failed"


def test_reports_show_what_failed(sandbox: SandboxPool) -> None:
    run = run_tests(sandbox, SNAPSHOT)
    assert run.outcomes == {"tests/test_calc.py": "failed"}
    assert "AssertionError: 1 != 0" in run.text
    assert 'tests/test_calc.py", line 6' in run.text
    assert "0 of 1 passed" in run.text
    assert run_tests(sandbox, SNAPSHOT | {"pack/calc.py": FIXED}).passed
    by_id = run_tests(
        sandbox, SNAPSHOT, (f"{CASE}.test_zero", "tests/test_calc.py::CalcTest::test_zero", "no.x")
    )
    assert list(by_id.outcomes.values()) == ["failed", "failed", "error"]


@pytest.mark.parametrize(
    ("source", "outcome"),
    [
        ("raise SystemExit(0)", "error"),
        ("import os; os._exit(0)", "missing"),
        ("import os; os.abort()", "missing"),
        ("while True: pass", "missing"),
        ("x = 'a' * (1 << 40)", "error"),
        ("def f(: pass", "error"),
        ("import os\nwhile True: os.write(1, b'x' * 65536)", "missing"),
        ("import socket; socket.socket()", "error"),
        ("open('/etc/passwd')", "error"),
        ("open('../escape', 'w')", "error"),
    ],
)
def test_code_that_ends_the_run_passes_nothing(
    sandbox: SandboxPool, source: str, outcome: str
) -> None:
    run = run_tests(sandbox, SNAPSHOT | {"pack/calc.py": source.encode()}, (f"{CASE}.test_zero",))
    assert run.outcomes == {f"{CASE}.test_zero": outcome}, run.text
    assert not run.passed


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("name", ATTACKS)
def test_an_edit_cannot_fake_a_pass(sandbox: SandboxPool, name: str, sealed: bool) -> None:
    edits = {path: text.encode() for path, text in ATTACKS[name].items()}
    found = verdict(sandbox, edits, sealed=sealed)
    assert found.reward == 0.0, found
    if "pack/calc.py" not in edits:
        # The rest of such an edit does not count: a repair beside it is a repair.
        repaired = verdict(sandbox, {**edits, "pack/calc.py": FIXED}, sealed=sealed)
        assert repaired.reward == 1.0, repaired


def test_compiled_files_are_not_taken_for_sources(sandbox: SandboxPool, tmp_path: Path) -> None:
    import py_compile

    fake = tmp_path / "test_calc.py"
    fake.write_bytes(HIDDEN.replace(b"calc.double(self.start), 10", b"1, 1"))
    compiled = py_compile.compile(
        str(fake),
        cfile=str(tmp_path / "x.pyc"),
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    assert compiled is not None
    data = Path(compiled).read_bytes()
    folder = "tests/__pycache__/test_calc.cpython-312"
    assert verdict(sandbox, {f"{folder}.pyc": data, f"{folder}.opt-1.pyc": data}).reward == 0.0


EQUAL_TO_ALL = b"""
class Equal:
    __hash__ = None
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __gt__(self, other): return True
    def __add__(self, other): return self
def double(x): return Equal()
def check(x): raise ValueError
"""


def test_only_the_seal_keeps_out_objects_that_equal_everything(sandbox: SandboxPool) -> None:
    """Tests without the seal behave as `repository.py` says."""
    assert verdict(sandbox, {"pack/calc.py": EQUAL_TO_ALL}, sealed=False).reward == 1.0
    assert verdict(sandbox, {"pack/calc.py": EQUAL_TO_ALL}, sealed=True).reward == 0.0


STOLEN_NONCE = b"""
import json, os, sys
frame = sys._getframe()
while frame is not None and "nonce" not in frame.f_locals:
    frame = frame.f_back
nonce = frame.f_locals["nonce"]
channel = frame.f_locals["channel"]
for test in %r:
    line = {"nonce": nonce, "name": test, "id": test, "outcome": "passed", "text": "", "values": []}
    os.write(channel, json.dumps(line).encode() + b"\\n")
os._exit(0)
"""


def test_only_the_seal_keeps_out_a_nonce_that_was_found(sandbox: SandboxPool) -> None:
    edit = {"pack/calc.py": STOLEN_NONCE % ALL}
    assert verdict(sandbox, edit, sealed=False).reward == 1.0
    assert verdict(sandbox, edit, sealed=True).reward == 0.0


@pytest.mark.parametrize("name", REPLACED)
def test_an_edit_cannot_replace_tests(sandbox: SandboxPool, name: str) -> None:
    """Not even those without a sealed comparison."""
    found = verdict(sandbox, {"pack/calc.py": REPLACED[name].encode()}, sealed=True)
    assert found.reward == 0.0, found
    assert found.details["not_passed"][f"{CASE}.test_check"] == "tampered"
    honest = verdict(sandbox, {"pack/calc.py": ALL_BUT_CHECK.encode()}, sealed=True)
    assert honest.details["not_passed"] == {f"{CASE}.test_check": "failed"}


def test_unusual_tests_that_are_honest_pass(sandbox: SandboxPool) -> None:
    tests = HiddenTests({"tests/test_calc.py": HONEST_TESTS}, ("tests/test_calc.py",))
    found = judge(sandbox, SNAPSHOT, SNAPSHOT | {"pack/calc.py": FIXED}, tests)
    assert found.reward == 1.0, found


@pytest.mark.parametrize(
    ("value", "equal"),
    [
        (Decimal("1.0"), 1),
        (Decimal("0.5"), 0.5),
        (Fraction(3, 2), 1.5),
        ({1: 2}.keys(), {1}),
        ({1: 2}.items(), {(1, 2)}),
        (MappingProxyType({1: 2}), {1: 2}),
        (bytearray(b"a"), b"a"),
        (Decimal("inf"), float("inf")),
    ],
)
def test_sealed_values_that_equal_built_in_ones(value: object, equal: object) -> None:
    assert value == equal
    assert show(value) == show(equal)
    assert show(Decimal("0.1")) != show(0.1)


def test_tests_are_sealed_by_default_and_counted(sandbox: SandboxPool) -> None:
    assert hidden(sealed=True) == replace(hidden(sealed=False), sealed=True)
    assert HiddenTests({}, ()).sealed
    assert verdict(sandbox, {"pack/calc.py": FIXED}, sealed=True).details["sealed"] == 1
    assert verdict(sandbox, {"pack/calc.py": FIXED}).details["sealed"] == 0


MALFORMED = [
    {},
    {"unable": "x"},
    {"id": 3, "outcome": "passed"},
    {"id": "%s", "name": None, "outcome": "passed"},
    {"id": "%s", "outcome": "splendid"},
    {"id": "%s", "outcome": ["passed"]},
    {"id": "%s", "outcome": "passed", "text": 1},
    {"id": "%s", "outcome": "passed", "values": 1},
    {"id": "%s", "outcome": "passed", "values": [[1]]},
    {"id": "%s", "outcome": "passed", "values": [["1", "x"]]},
]


@pytest.mark.parametrize("line", MALFORMED, ids=str)
def test_a_report_of_another_form_is_none(sandbox: SandboxPool, line: dict[str, object]) -> None:
    """Not even with the nonce: it neither passes a test nor makes an error of the verdict."""
    _, tail = STOLEN_NONCE.split(b"for test in %r:")
    body = tail.split(b"    os.write")[0]
    source = STOLEN_NONCE.replace(body, b"\n    line = json.loads(LINE)\n") % ALL
    text = json.dumps(line).replace("%s", ALL[0])
    head = f"LINE = {text!r}\n".encode()
    source = source.replace(
        b"line = json.loads(LINE)", b'line = {"nonce": nonce} | json.loads(LINE)'
    )
    found = verdict(sandbox, {"pack/calc.py": head + source})
    assert found.error is None
    assert found.reward == 0.0
    assert set(found.details["not_passed"].values()) == {"missing"}


def test_a_run_that_never_started_is_no_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time was over before anything of the repository was loaded."""
    slow = repository._RUNNER.replace("    main()", "    import time; time.sleep(9)\n    main()")
    monkeypatch.setattr(repository, "_RUNNER", slow)
    short = sandbox_or_skip(SandboxConfig(time_s=0.5, workers=1))
    with pytest.raises(SandboxError, match=r"never started: time.*raise sandbox\.time_s"):
        verdict(short, {"pack/calc.py": FIXED})
    short.close()


def test_reports_of_thousands_of_tests_fit() -> None:
    """In 256 KiB: those of tests that pass; and failures, whose texts are bounded together."""
    sandbox = sandbox_or_skip(SandboxConfig(time_s=60.0, workers=1, output_kib=256))
    lines = "\n".join(f"    def test_a_part_of_it_{i}(self): pass" for i in range(1500))
    many = f"import unittest\nclass CalcTest(unittest.TestCase):\n{lines}\n"
    files = SNAPSHOT | {"tests/test_calc.py": many.encode()}
    ids = [f"{CASE}.test_a_part_of_it_{i}" for i in range(1500)]
    assert run_tests(sandbox, files, ids).passed
    failing = many.replace("pass", "self.fail('x' * 5000)").encode()
    run = run_tests(sandbox, files | {"tests/test_calc.py": failing}, ids[:200])
    sandbox.close()
    assert set(run.outcomes.values()) == {"failed"}


def test_paths_lead_nowhere_else(sandbox: SandboxPool) -> None:
    for path in ("/etc/x", "../x", "a/../../x", "a\\b", "", ".", "a\0b"):
        with pytest.raises(ValueError, match=r"path|names"):
            run_tests(sandbox, {path: b""}, ("x",))


def test_a_repository_that_does_not_fit_is_no_verdict(sandbox: SandboxPool) -> None:
    with pytest.raises(SandboxError, match=r"sandbox\.scratch_mib\(16\)"):
        run_tests(sandbox, {"big": bytes(9 << 20)}, ("x",))
    with pytest.raises(SandboxError, match="raise it"):
        run_tests(sandbox, {f"f{i}": b"" for i in range(600)}, ("x",))


def test_snapshots(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no file"):
        read_snapshot(tmp_path)
    for path in ("a/b.py", ".git/config", "a/__pycache__/b.pyc"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x" * 1000)
    os.symlink("/etc/passwd", tmp_path / "link")
    assert read_snapshot(tmp_path) == {"a/b.py": b"x" * 1000}
    with pytest.raises(ValueError, match="more than 0 MiB"):
        read_snapshot(tmp_path, most_mib=0)


def test_a_missing_framework_is_no_verdict(sandbox: SandboxPool) -> None:
    tests = HiddenTests({}, ("tests/test_calc.py::test_four",), framework="pytest")
    for edits in ({}, {"pytest.py": b"def main(*a, **k): pass\n"}):
        with pytest.raises(SandboxError, match=r"No module named 'pytest'.*sandbox\.packages"):
            judge(sandbox, SNAPSHOT, SNAPSHOT | edits, tests)


def test_packages_must_be_folders() -> None:
    with pytest.raises(ValueError, match=r"sandbox\.packages: /nowhere"):
        SandboxPool(SandboxConfig(packages=("/nowhere",)))
