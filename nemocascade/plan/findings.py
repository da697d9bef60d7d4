"""Findings of a job's checks: problems that keep it from running, and warnings of slowness."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class CheckResult:
    """Result of one check. problem: empty if the job can run. warning: the job runs, but slower
    than it should. measured: readable measurement."""

    check: str
    problem: str = ""
    measured: str = ""
    warning: str = ""

    def line(self) -> str:
        mark = "FAIL" if self.problem else "slow" if self.warning else "ok  "
        return f"  {mark} {self.check}: {self.problem or self.warning or self.measured or 'fine'}"


@dataclass
class Preflight:
    """All findings of a job."""

    findings: list[CheckResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def problems(self) -> list[str]:
        return [f.problem for f in self.findings if f.problem]

    @property
    def warnings(self) -> list[str]:
        return [f.warning for f in self.findings if f.warning]

    def add(
        self, check: str, problems: list[str], measured: str = "", warnings: Sequence[str] = ()
    ) -> None:
        """Record a check with all its problems and warnings."""
        found = [CheckResult(check, p, measured) for p in problems]
        found += [CheckResult(check, "", measured, w) for w in warnings]
        self.findings += found or [CheckResult(check, "", measured)]

    @contextmanager
    def guarded(self, check: str) -> Iterator[None]:
        """Record an exception of a check as a finding, so that the other checks run."""
        try:
            yield
        except Exception as error:  # any error here would end the job later
            self.add(check, [f"{check}: {type(error).__name__}: {error}"])

    def text(self) -> str:
        """Readable report, one line for each check."""
        lines = [f.line() for f in self.findings]
        count = len(self.problems)
        end = f"{count} problem(s)" if count else "all checks passed"
        return "\n".join(["preflight:", *lines, f"{end} in {self.seconds:.1f} s"])

    def as_json(self) -> str:
        """JSON report."""
        value = {
            "passed": not self.problems,
            "seconds": self.seconds,
            "findings": [asdict(f) for f in self.findings],
        }
        return json.dumps(value, indent=1)
