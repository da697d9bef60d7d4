"""Findings of a job's checks: problems that keep it from running, and warnings of slowness."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class CheckResult:
    """Result of one check. problem: empty if the job can run. warning: the job may run, but slower
    than it should, or only once something else has started. measured: readable measurement."""

    check: str
    problem: str = ""
    measured: str = ""
    warning: str = ""

    def line(self) -> str:
        mark = "FAIL" if self.problem else "warn" if self.warning else "ok  "
        return f"  {mark} {self.check}: {self.problem or self.warning or self.measured or 'fine'}"


@dataclass
class Preflight:
    """All findings of a job. prefix: of the names of checks. show: is called with the line of each
    finding as soon as it is there."""

    findings: list[CheckResult] = field(default_factory=list)
    seconds: float = 0.0
    prefix: str = ""
    show: Callable[[str], None] | None = None

    def part(self, name: str) -> Preflight:
        """Findings of a part of the job, which are recorded here under its name."""
        return Preflight(self.findings, prefix=f"{self.prefix}{name}: ", show=self.show)

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
        name = self.prefix + check
        found = [CheckResult(name, p, measured) for p in problems]
        found += [CheckResult(name, "", measured, w) for w in warnings]
        found = found or [CheckResult(name, "", measured)]
        self.findings += found
        if self.show is not None:
            for each in found:
                self.show(each.line())

    @contextmanager
    def guarded(self, check: str) -> Iterator[None]:
        """Record an exception of a check as a finding, so that the other checks run."""
        try:
            yield
        except Exception as error:  # any error here would end the job later
            self.add(check, [f"{check}: {type(error).__name__}: {error}"])

    def text(self) -> str:
        """Readable report, one line for each check."""
        return "\n".join(["preflight:", *(f.line() for f in self.findings), self.conclusion()])

    def conclusion(self) -> str:
        """Number of problems and warnings, and the time."""
        counts = {"problem(s)": len(self.problems), "warning(s)": len(self.warnings)}
        found = [f"{count} {what}" for what, count in counts.items() if count]
        end = ", ".join(found) or "all checks passed"
        return f"{end} in {self.seconds:.1f} s"

    def as_json(self) -> str:
        """JSON report."""
        value = {
            "passed": not self.problems,
            "seconds": self.seconds,
            "findings": [asdict(f) for f in self.findings],
        }
        return json.dumps(value, indent=1)
