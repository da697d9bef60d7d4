"""The findings of a job's checks: what keeps it from running, and what only makes it slow."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class CheckResult:
    """One check. problem: empty if the job can run. warning: it runs, but slower than it should.
    measured: what was seen, for people."""

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
        """Note a check and everything that is wrong with it."""
        found = [CheckResult(check, p, measured) for p in problems]
        found += [CheckResult(check, "", measured, w) for w in warnings]
        self.findings += found or [CheckResult(check, "", measured)]

    @contextmanager
    def guarded(self, check: str) -> Iterator[None]:
        """A check that fails in a way of its own is a finding, and the others go on."""
        try:
            yield
        except Exception as error:  # whatever it is, it would end the job later
            self.add(check, [f"{check}: {type(error).__name__}: {error}"])

    def text(self) -> str:
        """A line a check."""
        lines = [f.line() for f in self.findings]
        count = len(self.problems)
        end = f"{count} problem(s)" if count else "all checks passed"
        return "\n".join(["preflight:", *lines, f"{end} in {self.seconds:.1f} s"])

    def as_json(self) -> str:
        """For machines."""
        value = {
            "passed": not self.problems,
            "seconds": self.seconds,
            "findings": [asdict(f) for f in self.findings],
        }
        return json.dumps(value, indent=1)
