"""A repository as files by path, its tests run in the sandbox, and the verdict of hidden tests.

What decides: the hidden tests' files are laid over the edited repository last; they run in a
process behind the sandbox's walls; each report must carry a nonce that is drawn for the run. So a
program that rewrites test files, prints "OK", ends early, writes to the result pipe, plants
compiled files or modules named as the runner's, or replaces functions of unittest passes nothing.
Sealed tests (`seal.py`) also keep the values that they compare with outside. Without the seal, code
that searches its interpreter's memory for the nonce, or returns objects that claim to be equal to
everything, can pass: tests that run in one interpreter with what they test cannot tell.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from nemocascade.envs.sandbox.pool import Outcome, Program, Sandbox, SandboxError
from nemocascade.envs.swe import runner
from nemocascade.envs.swe.seal import Sealed, broken, seal
from nemocascade.types import Verdict

Framework = Literal["unittest", "pytest"]
Files = Mapping[str, bytes]
"""A repository: contents by relative path, `/` between folders."""

_RUNNER = Path(runner.__file__).read_text(encoding="utf-8")
_SUPPORT = {"conftest.py", "pytest.ini", "tox.ini", "setup.cfg", "pyproject.toml"}
"""Files that configure tests wherever they stand: an edit of them does not count."""
_SHOWN_DETAILS = 8
_LOGGER = logging.getLogger("nemocascade")
_OUTPUT_SHARE = 2000


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


def check_path(path: str) -> str:
    """The path in its plain form. Raises ValueError if it leads out of the repository."""
    pure = PurePosixPath(path)
    if not path or "\0" in path or "\\" in path or pure.is_absolute() or ".." in pure.parts:
        raise ValueError(f"{path!r} is no path inside of the repository: name it from its root")
    if str(pure) == ".":
        raise ValueError(f"{path!r} names no file")
    return str(pure)


def read_snapshot(folder: str | Path, *, most_mib: int = 256) -> dict[str, bytes]:
    """The files below a folder. Version control and compiled files stay behind, and so do links.

    Raises ValueError if there is no file, or more than `most_mib`.
    """
    root = Path(folder)
    found: dict[str, bytes] = {}
    size = links = 0
    for path in sorted(root.rglob("*")):
        relative = path.relative_to(root)
        if {".git", "__pycache__"} & set(relative.parts):
            continue
        if path.is_symlink():
            links += 1
            continue
        if path.is_file():
            found[relative.as_posix()] = path.read_bytes()
            size += len(found[relative.as_posix()])
            if size > most_mib << 20:
                raise ValueError(f"{root} holds more than {most_mib} MiB: is it a repository?")
    if not found:
        raise ValueError(f"{root} holds no file: a snapshot is a folder with the repository's")
    if links:
        _LOGGER.info("%s: %d links are left out", root, links)
    return found


def test_files(files: Iterable[str]) -> list[str]:
    """The paths whose names are those of test files."""
    names = ((path, PurePosixPath(path).name) for path in files)
    return sorted(
        path
        for path, name in names
        if name.endswith(".py") and (name.startswith("test") or name.endswith("_test.py"))
    )


test_files.__test__ = False  # type: ignore[attr-defined]


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
    Raises SandboxError if the sandbox fails, and ValueError for a path that leads outside.
    """
    names = {test: _runner_name(test, framework) for test in tests or test_files(files)}
    nonce = secrets.token_hex(16)
    wanted = list(dict.fromkeys(names.values()))
    order = {"nonce": nonce, "framework": framework, "tests": wanted}
    clean = {check_path(p): data for p, data in files.items() if not p.endswith((".pyc", ".pyo"))}
    outcome = sandbox.run(Program(_RUNNER, stdin=json.dumps(order), files=clean))
    reports = [r for r in outcome.results if isinstance(r, dict) and r.get("nonce") == nonce]
    if reports and "unable" in reports[0]:
        raise SandboxError(
            f"{framework} cannot be imported in the sandbox ({reports[0]['unable']}): set "
            "sandbox.packages to a folder that holds it"
        )
    if sealed:
        reports = [_opened(report, sealed, framework) for report in reports]
    outcomes = {test: _outcome(name, reports) for test, name in names.items()}
    return TestRun(outcomes, _text(outcomes, reports, outcome), outcome)


def judge(sandbox: Sandbox, snapshot: Files, edited: Files, hidden: HiddenTests) -> Verdict:
    """1 if every hidden test passes in the edited repository, else 0.

    Edits of test folders and of test settings do not count: those files are as in `snapshot`, with
    the hidden tests' laid over. Raises SandboxError if the sandbox fails, which is no verdict.
    """
    files = {p: data for p, data in edited.items() if not _is_support(p, hidden.files)}
    files |= {p: data for p, data in snapshot.items() if _is_support(p, hidden.files)}
    sealed: dict[str, Sealed] = {}
    for path, data in hidden.files.items():
        files[path] = data
        if hidden.sealed and path.endswith(".py"):
            first = sum(len(s.expected) for s in sealed.values())
            sealed[path] = seal(data.decode(), first=first)
            files[path] = sealed[path].source.encode()
    tests = (*hidden.fail_to_pass, *hidden.pass_to_pass)
    run = run_tests(sandbox, files, tests, framework=hidden.framework, sealed=sealed)
    wrong = {test: outcome for test, outcome in run.outcomes.items() if outcome != "passed"}
    details = {
        "passed": len(tests) - len(wrong),
        "tests": len(tests),
        "not_passed": dict(list(wrong.items())[:_SHOWN_DETAILS]),
        "process": run.process.status,
    }
    return Verdict(float(run.passed), details=details)


def _is_support(path: str, hidden: Files) -> bool:
    """Whether a file may change what the hidden tests test, other than by being tested."""
    pure = PurePosixPath(path)
    folders = {str(PurePosixPath(p).parent) for p in hidden} - {"."}
    return pure.name in _SUPPORT or any(str(parent) in folders for parent in pure.parents)


def _runner_name(test: str, framework: Framework) -> str:
    """How the runner names a test or a test file."""
    path, _, inner = test.partition("::")
    if not path.endswith(".py"):
        if framework == "unittest":
            return test
        raise ValueError(f"{test}: pytest names tests as tests/test_a.py::Case::test_b")
    if framework == "pytest":
        return test
    module = ".".join(PurePosixPath(check_path(path)).with_suffix("").parts)
    return ".".join([module, *inner.split("::")]) if inner else module


def _outcome(name: str, reports: Sequence[Mapping[str, Any]]) -> str:
    """How the tests that `name` stands for ended: all as one."""
    mine = [r["outcome"] for r in reports if _is_of(r, name)]
    bad = [found for found in mine if found not in ("passed", "skipped")]
    if bad or not mine:
        return str(bad[0]) if bad else "missing"
    return "passed" if "passed" in mine else "skipped"


def _is_of(report: Mapping[str, Any], name: str) -> bool:
    """Whether a report is of what was asked for as `name`, or of something inside of it."""
    inner = (f"{name}.", f"{name}::", f"{name}[")
    return name == report["name"] or str(report["id"]) == name or report["id"].startswith(inner)


def _opened(
    report: dict[str, Any], sealed: Mapping[str, Sealed], framework: Framework
) -> dict[str, Any]:
    """The report of a test, with what its values say."""
    expected = {key: text for file in sealed.values() for key, text in file.expected.items()}
    required: tuple[int, ...] = ()
    for path, file in sealed.items():
        start = _runner_name(path, framework)
        separator = "::" if framework == "pytest" else "."
        if str(report["id"]).startswith(start + separator):
            name = str(report["id"])[len(start + separator) :].partition("[")[0]
            required = file.required.get(name.replace("::", "."), ())
    if report["outcome"] != "passed":
        return report
    reason = broken(expected, required, report["values"])
    return {**report, "outcome": "failed", "text": reason} if reason else report


def _text(
    outcomes: Mapping[str, str], reports: Sequence[Mapping[str, Any]], outcome: Outcome
) -> str:
    """Failures with their reasons, what the program printed last, and the count."""
    lines = []
    for report in reports:
        if report["outcome"] not in ("passed", "skipped"):
            lines += [f"{report['outcome'].upper()} {report['id']}", str(report["text"]).rstrip()]
    lines += [f"MISSING {test}" for test, found in outcomes.items() if found == "missing"]
    printed = (outcome.stdout + outcome.stderr).rstrip()
    if printed:
        lines += ["output:", printed[-_OUTPUT_SHARE:]]
    if outcome.status != "ok":
        lines.append(f"the run ended early: {outcome.status}, exit status {outcome.exit_status}")
    count = sum(found == "passed" for found in outcomes.values())
    lines.append(f"{count} of {len(outcomes)} passed")
    return "\n".join(lines)
