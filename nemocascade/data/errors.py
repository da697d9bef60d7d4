"""Errors in data, and the count of skipped rows."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemocascade.recipe import UserError

SHOWN_BAD_ROWS = 8


class DataError(UserError, ValueError):
    """The data cannot be used with these settings; the message has value, rule and remedy."""


class TokenizerError(DataError):
    """A tokenizer file is unreadable, or has no token that the template needs."""


class RowError(ValueError):
    """One row breaks its format. The message is the reason, without file and line."""


@dataclass
class BadRows:
    """Count of rows that do not parse; an error once they exceed `limit`."""

    limit: int
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """`file:line: reason` of the first few bad rows."""

    def add(self, source: str, reason: str) -> None:
        """Count the row at `source` (`file:line`). Only `check` compares it with the limit."""
        self.count += 1
        if len(self.examples) < SHOWN_BAD_ROWS:
            self.examples.append(f"{source}: {reason}")

    def check(self) -> None:
        """Raise DataError if more rows are bad than `limit` allows."""
        if self.count <= self.limit:
            return
        rows = "\n  ".join(self.examples)
        hidden = self.count - len(self.examples)
        more = f"\n  and {hidden} more" if hidden else ""
        raise DataError(
            f"{self.count} bad rows, data.max_bad_rows is {self.limit}: correct them, or raise "
            f"data.max_bad_rows to skip them\n  {rows}{more}"
        )

    def summary(self) -> str:
        """One line for the log; empty if no row was bad."""
        if not self.count:
            return ""
        return f"skipped {self.count} bad rows (limit {self.limit}), first: {self.examples[0]}"
