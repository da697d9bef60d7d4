"""Runs a repository's tests in the sandbox and gives the verdict of hidden tests.

Files that decide how tests run are restored (`protected.py`), and the hidden tests' files are
written last over the edited repository. The tests run in an isolated process of the sandbox. Each
report must carry a nonce drawn for the run. Before every report, the runner checks the functions
and classes of unittest, and of pytest if used; if one was replaced, the test counts as tampered.
So it does if its function, or another one of its file, is not what the file says.
So a program passes nothing by rewriting test files or settings, printing "OK", exiting early,
writing to the result pipe, or replacing parts of the framework. Planting compiled files, plugins,
or modules with the names of the runner's or the tests' does not help either.

Sealed tests (`seal.py`) also keep the expected values outside of the sandbox. Without the seal,
some code can still pass. It can search its interpreter's frames or memory (for the nonce, the
test or the objects of the run), replace modules of tests not yet loaded, or return objects that
claim to be equal to everything. Tests that share an interpreter with the code under test cannot
detect this.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from nemocascade.swe import runner, watched_code
from nemocascade.swe.protected import Protected, file_of, test_files
from nemocascade.swe.reports import opened, outcome_of, read_reports, text_of
from nemocascade.swe.seal import Sealed, seal
from nemocascade.swe.snapshots import Files, check_path, misfit
from nemocascade.types import Outcome, Program, Sandbox, Verdict

Framework = Literal["unittest", "pytest"]

_RUNNER = Path(runner.__file__).read_text(encoding="utf-8")
_WATCHED = Path(watched_code.__file__).read_text(encoding="utf-8")
_IMPORT = next(line for line in _RUNNER.splitlines() if line.startswith("from nemocascade.swe."))
_RUNNER = _RUNNER.replace(_IMPORT, _WATCHED.replace("from __future__ import annotations", ""))
_SHOWN_DETAILS = 8


@dataclass(frozen=True)
class HiddenTests:
    """Tests that decide about an edited repository.

    files: written over the repository. fail_to_pass, pass_to_pass: ids, dotted
    (`tests.test_a.Case.test_b`) or of pytest (`tests/test_a.py::Case::test_b`); all must pass.
    sealed: remove the literals that tests compare with from `files`. Only values of built-in types
    can then equal a literal.
    """

    files: Files
    fail_to_pass: tuple[str, ...]
    pass_to_pass: tuple[str, ...] = ()
    framework: Framework = "unittest"
    sealed: bool = True


@dataclass(frozen=True)
class TestRun:
    """Outcome of each test: "passed", "failed", "error", "skipped", "tampered" or "missing".

    text: a report for people and models. process: outcome of the whole run.
    """

    __test__ = False  # keeps pytest from collecting the class

    outcomes: Mapping[str, str]
    text: str
    process: Outcome

    @property
    def passed(self) -> bool:
        """True if all tests passed and there was at least one."""
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

    tests: ids, or paths of test files; empty = all files with names of test files.
    sealed: the sealed files among `files`, by path.
    Raises SandboxError if the sandbox fails, and ValueError for invalid paths.
    """
    names = {test: _runner_name(test, framework) for test in tests or test_files(files)}
    nonce = secrets.token_hex(16)
    wanted = list(dict.fromkeys(names.values()))
    clean = {check_path(p): data for p, data in files.items() if not p.endswith((".pyc", ".pyo"))}
    paths = sorted({path for test in names if (path := file_of(test, clean)) is not None})
    order = {"nonce": nonce, "framework": framework, "tests": wanted, "files": paths}
    outcome = sandbox.run(Program(_RUNNER, stdin=json.dumps(order), files=clean))
    reports = read_reports(outcome, nonce, framework)
    if sealed:
        separator = "::" if framework == "pytest" else "."
        starts = {_runner_name(p, framework) + separator: file for p, file in sealed.items()}
        reports = [opened(report, starts) for report in reports]
    outcomes = {test: outcome_of(name, reports) for test, name in names.items()}
    return TestRun(outcomes, text_of(outcomes, reports, outcome), outcome)


def judge(sandbox: Sandbox, snapshot: Files, edited: Files, hidden: HiddenTests) -> Verdict:
    """Return reward 1 if every hidden test passes in the edited repository, else 0.

    Edits of files that decide how tests run are ignored and listed in details["ignored"]: the
    versions of `snapshot` and of the hidden tests are used. Raises SandboxError if the sandbox
    fails, and ValueError for tests whose file does not exist; neither is a verdict.
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
        # Either the model's new files conflict, or the row itself is wrong whatever the model did.
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
        "sealed": sum(_is_sealed(test, hidden.framework, sealed) for test in tests),
    }
    stopped = not run.passed and run.process.status in ("time", "output")
    return Verdict(float(run.passed), details=details, fault="answer" if stopped else None)


def _is_sealed(test: str, framework: Framework, sealed: Mapping[str, Sealed]) -> bool:
    """Return True if a test must report the value of at least one comparison."""
    name = _runner_name(test, framework)
    separator = "::" if framework == "pytest" else "."
    for path, file in sealed.items():
        start = _runner_name(path, framework) + separator
        inner = name.removeprefix(start).partition("[")[0].replace("::", ".")
        if name.startswith(start) and file.required.get(inner):
            return True
    return False


def _laid(hidden: HiddenTests) -> tuple[dict[str, bytes], dict[str, Sealed]]:
    """Return the hidden files as they enter the sandbox, and the sealed ones among them."""
    files = dict(hidden.files)
    sealed: dict[str, Sealed] = {}
    for path, data in hidden.files.items() if hidden.sealed else ():
        if not path.endswith(".py"):
            continue
        try:
            sealed[path] = seal(data, first=sum(len(s.expected) for s in sealed.values()))
        except (SyntaxError, ValueError):
            continue  # not Python: data that a test reads
        files[path] = sealed[path].source.encode()
    return files, sealed


def _runner_name(test: str, framework: Framework) -> str:
    """Return the runner's name of a test or a test file."""
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
