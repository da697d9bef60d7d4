"""Tables of the simulated workplace, and its CSV files in the published form."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from nemocascade.envs.applications import CallError
from nemocascade.runtime.row_errors import DataError

Record = Mapping[str, Any]
Tables = Mapping[str, Sequence[Record]]

TODAY = date(2023, 11, 30)
NOW = f"{TODAY} 23:59:00"
"""Time of the published tasks: every mail that an episode sends has it."""
FILES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "analytics": (
        "analytics_data.csv",
        (
            *("date_of_visit", "visitor_id", "page_views", "session_duration_seconds"),
            *("traffic_source", "user_engaged"),
        ),
    ),
    "calendar": (
        "calendar_events.csv",
        ("event_id", "event_name", "participant_email", "event_start", "duration"),
    ),
    "customers": (
        "customer_relationship_manager_data.csv",
        (
            *("customer_id", "assigned_to_email", "customer_name", "customer_email"),
            *("customer_phone", "last_contact_date", "product_interest", "status"),
            *("follow_up_by", "notes"),
        ),
    ),
    "emails": (
        "emails.csv",
        ("email_id", "inbox/outbox", "sender/recipient", "subject", "sent_datetime", "body"),
    ),
    "tasks": (
        "project_tasks.csv",
        ("task_id", "task_name", "assigned_to_email", "list_name", "due_date", "board"),
    ),
    "directory": ("email_addresses.csv", ("email_address",)),
}
"""File and columns of each table. The directory's file has no header."""
STATUSES = ("Qualified", "Won", "Lost", "Lead", "Proposal")
PRODUCTS = ("Software", "Hardware", "Services", "Consulting", "Training")
LISTS = ("Backlog", "In Progress", "In Review", "Completed")
BOARDS = ("Back end", "Front end", "Design")

_MISSING = {"", "NA", "N/A", "n/a", "NaN", "nan", "NULL", "null", "None", "<NA>", "#N/A", "#NA"}
"""Texts that a CSV file has for a missing value."""
_CASED = ("status", "list_name", "board")
"""Columns that are compared with case."""


class Table:
    """Rows with labels. Rows are never changed, only replaced, so copies are cheap.

    Labels follow the published comparison, which also compares the index of its data frames: a
    deletion leaves a gap, and a new row renumbers all rows or gets the label 0 (`renumber`).
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.rows = list(enumerate(records))

    def copy(self) -> Table:
        """Return a table with the same rows."""
        new = Table(())
        new.rows = list(self.rows)
        return new

    def records(self) -> list[Record]:
        """Return all rows in order."""
        return [record for _, record in self.rows]

    def where(self, column: str, value: Any) -> list[Record]:
        """Return the rows with this value."""
        return [record for _, record in self.rows if record[column] == value]

    def get(self, column: str, value: Any) -> Record:
        """Return the first row with this value. Raises CallError without one."""
        found = self.where(column, value)
        if not found:
            raise CallError(f"there is no {column} {value!r}")
        return found[0]

    def next_id(self, column: str) -> int:
        """Return one more than the last id in the order of texts."""
        return int(max((str(r[column]) for r in self.records()), default="0")) + 1

    def add(self, record: Record, *, renumber: bool = True) -> None:
        """Append a row."""
        self.rows.append((0, record))
        if renumber:
            self.rows = list(enumerate(self.records()))

    def change(self, column: str, value: Any, field: str, new: Any) -> None:
        """Set a field of the rows with this value. Raises CallError without one."""
        self.get(column, value)
        self.rows = [
            (label, {**r, field: new} if r[column] == value else r) for label, r in self.rows
        ]

    def remove(self, column: str, value: Any) -> None:
        """Delete the rows with this value. Raises CallError without one."""
        self.get(column, value)
        self.rows = [(label, r) for label, r in self.rows if r[column] != value]

    def same(self, other: Table) -> bool:
        """Return True if labels and rows agree; only `_CASED` columns have a case.

        Elsewhere, values that are not texts all count as missing.
        """
        return len(self.rows) == len(other.rows) and all(
            label == its and (mine is theirs or _folded(mine) == _folded(theirs))
            for (label, mine), (its, theirs) in zip(self.rows, other.rows, strict=True)
        )


def read_tables(folder: str) -> Tables:
    """Read the files of a workplace, anywhere below `folder`. Raises DataError for a wrong file."""
    found: dict[str, Sequence[Record]] = {}
    for table, (name, columns) in FILES.items():
        paths = sorted(Path(folder).rglob(name))
        if len(paths) != 1:
            raise DataError(
                f"envs.tool_calling.workplace_data({folder!r}) holds {len(paths)} files {name}, it "
                f"must hold one: name a folder with {', '.join(file for file, _ in FILES.values())}"
            )
        try:
            with paths[0].open(newline="", encoding="utf-8") as file:
                header = columns if table == "directory" else None
                reader = csv.DictReader(file, header, strict=True)
                rows, given = list(reader), tuple(reader.fieldnames or ())
        except (OSError, ValueError, csv.Error) as error:
            raise DataError(f"{paths[0]} is not a CSV file in UTF-8: {error}") from error
        if any(set(names) != set(columns) for names in (given, *rows)):
            raise DataError(f"{paths[0]} has columns {list(given)}, they must be {list(columns)}")
        found[table] = [{k: None if v in _MISSING else v for k, v in r.items()} for r in rows]
    return found


def _folded(record: Record) -> dict[str, Any]:
    return {
        column: value if column in _CASED else (value.lower() if isinstance(value, str) else None)
        for column, value in record.items()
    }
