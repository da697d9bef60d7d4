"""What can be wrong with data, and the account of rows that were skipped."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemocascade.recipe import UserError

SHOWN_BAD_ROWS = 8


class DataError(UserError, ValueError):
    """The data cannot be used as the settings ask; the message names value, rule and remedy."""


class TokenizerError(DataError):
    """A tokenizer file that cannot be read, or that lacks what the template needs."""


class RowError(ValueError):
    """One row breaks its format. The message is the reason, without the row's place."""


@dataclass
class BadRows:
    """Counts rows that don't parse; refuses when they are more than `limit`."""

    limit: int
    count: int = 0
    examples: list[str] = field(default_factory=list)
    """`file:line: reason` of the first few."""

    def add(self, source: str, reason: str) -> None:
        """Count the row at `source` (`file:line`). `check` decides whether it was one too many."""
        self.count += 1
        if len(self.examples) < SHOWN_BAD_ROWS:
            self.examples.append(f"{source}: {reason}")

    def check(self) -> None:
        """Raises DataError if more rows are bad than `limit` allows."""
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
        """One line for the log; empty when no row was bad."""
        if not self.count:
            return ""
        return f"skipped {self.count} bad rows (limit {self.limit}), first: {self.examples[0]}"
