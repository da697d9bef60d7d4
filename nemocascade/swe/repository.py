"""A repository's tests run in the sandbox, and the verdict of hidden tests.

What decides: files that decide how tests run are as they were (`protected.py`), and the hidden
tests' files are laid over the edited repository last. The tests run in a process behind the
sandbox's walls. Each report must carry a nonce that is drawn for the run. The runner looks at the
functions and classes of unittest, or of pytest too, before every report: where one is another than
at the start, the test counts as tampered with. So a program that rewrites test files or settings,
prints "OK", ends early, writes to the result pipe, plants compiled files, plugins, or modules named
as the runner's or the tests', or replaces parts of the framework passes nothing.

Sealed tests (`seal.py`) also keep the values that they compare with outside. Without the seal, code
that searches its interpreter's frames or memory (for the nonce, for the test or the objects of the
run), that replaces the modules of tests not yet loaded, or that returns objects that claim to be
equal to everything, can pass: tests that run in one interpreter with what they test cannot tell.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from nemocascade.swe import runner
from nemocascade.swe.protected import Protected, test_files
from nemocascade.swe.reports import opened, outcome_of, read_reports, text_of
from nemocascade.swe.seal import Sealed, seal
from nemocascade.swe.snapshots import Files, check_path, misfit
from nemocascade.types import Outcome, Program, Sandbox, Verdict

Framework = Literal["unittest", "pytest"]

_RUNNER = Path(runner.__file__).read_text(encoding="utf-8")
_SHOWN_DETAILS = 8


@dataclass(frozen=True)
class HiddenTests:
    """The tests that decide over an edited repository.

    files: laid over it. fail_to_pass, pass_to_pass: ids, dotted (`tests.test_a.Case.test_b`) or of
    pytest (`tests/test_a.py::Case::test_b`); every one must pass.
    sealed: take the literals that tests compare with out of `files`. Values that are of no built-in
    type then equal no literal.
    """

    files: Files
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...] = ()
    framework: Framework = "unittest"
    sealed: bool = False


@dataclass(frozen=True)
class TestRun:
    """How tests ended: "passed", "failed", "error", "skipped", "tampered" or "missing", by name.

    text: a report for people and models. process: how the run itself ended.
    """

    __test__ = False  # pytest takes classes of such a name for tests

    outcomes: Mapping[str, str]
    text: str
    process: Outcome

    @property
    def passed(self) -> bool:
        """All of them did, and there was one."""
        return bool(self.outcomes) and set(self.outcomes.values()) == {"passed"}


def run_tests(
    sandbox: Sandbox,
    files: Files,
    tests: Sequence[str] = (),
    *,
    framework: Framework = "unittest",
    sealed: Mapping[str, Sealed] | None = None,
) -> TestRun:
    """Run tests of a repository in a scratch copy of it.

    tests: ids, or paths of test files; empty = all files whose names are those of tests.
    sealed: by path, the files among `files` that were sealed.
    Raises SandboxError if the sandbox fails, and ValueError for paths that cannot be.
    """
    names = {test: _runner_name(test, framework) for test in tests or test_files(files)}
    nonce = secrets.token_hex(16)
    wanted = list(dict.fromkeys(names.values()))
    order = {"nonce": nonce, "framework": framework, "tests": wanted}
    clean = {check_path(p): data for p, data in files.items() if not p.endswith((".pyc", ".pyo"))}
    outcome = sandbox.run(Program(_RUNNER, stdin=json.dumps(order), files=clean))
    reports = read_reports(outcome, nonce, framework)
    if sealed:
        separator = "::" if framework == "pytest" else "."
        starts = {_runner_name(p, framework) + separator: file for p, file in sealed.items()}
        reports = [opened(report, starts) for report in reports]
    outcomes = {test: outcome_of(name, reports) for test, name in names.items()}
    return TestRun(outcomes, text_of(outcomes, reports, outcome), outcome)


def judge(sandbox: Sandbox, snapshot: Files, edited: Files, hidden: HiddenTests) -> Verdict:
    """1 if every hidden test passes in the edited repository, else 0.

    Edits of files that decide how tests run do not count: those are as in `snapshot`, with the
    hidden tests' laid over; details["ignored"] names such edits. Raises SandboxError if the sandbox
    fails, and ValueError for tests whose file is nowhere: neither is a verdict.
    """
    tests = (*hidden.fail_to_pass, *hidden.pass_to_pass)
    protected = Protected(snapshot, hidden.files, tests)
    files = {p: data for p, data in edited.items() if p not in protected}
    files |= {p: data for p, data in snapshot.items() if p in protected}
    changed = (p for p in {**snapshot, **edited} if edited.get(p) != snapshot.get(p))
    ignored = sorted(p for p in changed if p in protected)
    laid, sealed = _laid(hidden)
    files |= laid
    if reason := misfit(files):
        # The model has made such files; a row's own would be wrong whatever it did.
        if fault := misfit({**snapshot, **laid}):
            raise ValueError(f"the repository with tests.files: {fault}")
        return Verdict(0.0, details={"reason": reason, "ignored": ignored})
    run = run_tests(sandbox, files, tests, framework=hidden.framework, sealed=sealed)
    wrong = {test: outcome for test, outcome in run.outcomes.items() if outcome != "passed"}
    details = {
        "passed": len(tests) - len(wrong),
        "tests": len(tests),
        "not_passed": dict(list(wrong.items())[:_SHOWN_DETAILS]),
        "ignored": ignored,
        "process": run.process.status,
    }
    return Verdict(float(run.passed), details=details)


def _laid(hidden: HiddenTests) -> tuple[dict[str, bytes], dict[str, Sealed]]:
    """The hidden files as they enter the sandbox, and those among them that were sealed."""
    files = dict(hidden.files)
    sealed: dict[str, Sealed] = {}
    for path, data in hidden.files.items() if hidden.sealed else ():
        if not path.endswith(".py"):
            continue
        try:
            sealed[path] = seal(data, first=sum(len(s.expected) for s in sealed.values()))
        except (SyntaxError, ValueError):
            continue  # no Python: something that a test reads
        files[path] = sealed[path].source.encode()
    return files, sealed


def _runner_name(test: str, framework: Framework) -> str:
    """How the runner names a test or a test file."""
    path, mark, inner = test.partition("::")
    if not path.endswith(".py"):
        if framework == "unittest":
            return test
        raise ValueError(f"{test}: pytest names tests as tests/test_a.py::Case::test_b")
    path = check_path(path)
    if framework == "pytest":
        return path + mark + inner
    module = ".".join(PurePosixPath(path).with_suffix("").parts)
    return ".".join([module, *inner.split("::")]) if inner else module
