"""Errors in data files, and the count of skipped rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NoReturn

from nemocascade.recipe import UserError

SHOWN_BAD_ROWS = 8


class DataError(UserError, ValueError):
    """The data cannot be used with these settings; the message has value, rule and remedy."""


class RowError(ValueError):
    """One row breaks its format. The message is the reason, without file and line."""


def reject_row(where: str, reason: str) -> NoReturn:
    """Raise DataError for the row at `where` (`file:row`)."""
    raise DataError(f"{where}: {reason}")


@dataclass
class BadRows:
    """Count of rows that do not parse; an error once they exceed `limit`.

    setting: name of the setting that holds the limit.
    """

    limit: int
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """`file:line: reason` of the first few bad rows."""
    setting: str = "data.max_bad_rows"

    def add(self, source: str, reason: str) -> None:
        """Count the row at `source` (`file:line`). Only `check` compares it with the limit."""
        self.count += 1
        if len(self.examples) < SHOWN_BAD_ROWS:
            self.examples.append(f"{source}: {reason}")

    def skip(self, source: str, reason: str) -> None:
        """Count the row at `source`. Raises DataError if it is one too many."""
        self.add(source, reason)
        self.check()

    def check(self) -> None:
        """Raise DataError if more rows are bad than `limit` allows."""
        if self.count <= self.limit:
            return
        rows = "\n  ".join(self.examples)
        hidden = self.count - len(self.examples)
        more = f"\n  and {hidden} more" if hidden else ""
        raise DataError(
            f"{self.count} bad rows, {self.setting} is {self.limit}: correct them, or raise "
            f"{self.setting} to skip them\n  {rows}{more}"
        )

    def summary(self) -> str:
        """One line for the log; empty if no row was bad."""
        if not self.count:
            return ""
        return f"skipped {self.count} bad rows (limit {self.limit}), first: {self.examples[0]}"
