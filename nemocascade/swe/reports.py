"""Parsing of the runner's test reports: validation, unsealing, and text for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemocascade.swe.seal import Sealed, broken
from nemocascade.types import Outcome, SandboxError

_OUTCOMES = ("passed", "failed", "error", "skipped", "tampered")
_OUTPUT_SHARE = 2000


@dataclass(frozen=True)
class TestReport:
    """Result of one test. name: as requested. values: values that a sealed test reported."""

    __test__ = False  # keeps pytest from collecting the class

    name: str
    id: str
    outcome: str
    text: str
    values: tuple[tuple[int, str], ...]

    def is_of(self, name: str) -> bool:
        """Return True if the report is about the requested `name` or something inside it.

        The report of a file that could not be loaded is about all tests in it.
        """
        inner = (f"{name}.", f"{name}::", f"{name}[")
        if name in (self.name, self.id) or self.id.startswith(inner):
            return True
        return self.outcome == "error" and name.startswith(f"{self.id}::")


def read_reports(outcome: Outcome, nonce: str, framework: str) -> list[TestReport]:
    """Return the reports with the right nonce; malformed ones are dropped.

    Raises SandboxError if the runner did not start loading the repository. The runner writes its
    start mark before that, so code of the repository cannot suppress it.
    """
    mine = [r for r in outcome.results if isinstance(r, dict) and r.get("nonce") == nonce]
    if mine and "unable" in mine[0]:
        raise SandboxError(
            f"{framework} cannot be imported in the sandbox ({mine[0]['unable']}): set "
            "sandbox.packages to a folder that holds it"
        )
    if not mine or "started" not in mine[0]:
        said = outcome.stderr.strip().splitlines()
        raise SandboxError(
            f"the tests never started: {outcome.status}, exit status {outcome.exit_status}, after "
            f"{outcome.wall_s:.1f} s; {said[-1] if said else 'nothing was said'}. If it was the "
            "time or the memory, raise sandbox.time_s or sandbox.memory_mib"
        )
    read = (_report(line) for line in mine[1:])
    return [report for report in read if report is not None]


def _report(line: Mapping[str, Any]) -> TestReport | None:
    """Parse a report; None for a malformed line, which code of the repository has written."""
    match {"name": line.get("id"), "text": "", "values": [], **line}:
        case {
            "name": str(name),
            "id": str(test),
            "outcome": str(outcome),
            "text": str(text),
            "values": list(values),
        } if outcome in _OUTCOMES and all(map(_is_value, values)):
            return TestReport(
                name, test, outcome, text, tuple((key, shown) for key, shown in values)
            )
    return None


def _is_value(value: Any) -> bool:
    match value:
        case [int(), str()]:
            return True
    return False


def opened(report: TestReport, sealed: Mapping[str, Sealed]) -> TestReport:
    """Return the report of a sealed test after checking its values.

    sealed: sealed files by the runner's name of the file plus the separator before a test's name.
    """
    if report.outcome != "passed":
        return report
    expected = {key: text for file in sealed.values() for key, text in file.expected.items()}
    required: tuple[int, ...] = ()
    for start, file in sealed.items():
        if report.id.startswith(start):
            name = report.id[len(start) :].partition("[")[0]
            required = file.required.get(name.replace("::", "."), ())
    reason = broken(expected, required, list(report.values))
    return replace(report, outcome="failed", text=reason) if reason else report


def outcome_of(name: str, reports: Sequence[TestReport]) -> str:
    """Combine the outcomes of all tests that `name` covers."""
    mine = [report.outcome for report in reports if report.is_of(name)]
    bad = [found for found in mine if found not in ("passed", "skipped")]
    if bad or not mine:
        return bad[0] if bad else "missing"
    return "passed" if "passed" in mine else "skipped"


def text_of(outcomes: Mapping[str, str], reports: Sequence[TestReport], outcome: Outcome) -> str:
    """Report failures with reasons, the program's last output, and the count."""
    lines = []
    for report in reports:
        if report.outcome not in ("passed", "skipped"):
            lines += [f"{report.outcome.upper()} {report.id}", report.text.rstrip()]
    lines += [f"MISSING {test}" for test, found in outcomes.items() if found == "missing"]
    printed = (outcome.stdout + outcome.stderr).rstrip()
    if printed:
        lines += ["output:", printed[-_OUTPUT_SHARE:]]
    if outcome.status != "ok":
        lines.append(f"the run ended early: {outcome.status}, exit status {outcome.exit_status}")
    count = sum(found == "passed" for found in outcomes.values())
    lines.append(f"{count} of {len(outcomes)} passed")
    return "\n".join(lines)
