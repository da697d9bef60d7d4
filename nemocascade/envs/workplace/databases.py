"""Databases of the workplace, and the checks of arguments that its tools share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Self

from nemocascade.envs.applications import Application, CallError
from nemocascade.envs.workplace.tables import FILES, Record, Table, Tables

_STATES = ("plots", "calendar", "customers", "emails", "tasks")
"""Tables that tools can change."""
_TIME = re.compile(r"(\d{4})[-/](\d{1,2})[-/](\d{1,2})(?:[ T](\d{1,2}):(\d{2})(?::(\d{2}))?)?")


class Databases(Application):
    """Tables of one workplace. New ids depend on the order of calls, and so does the end state."""

    def __init__(self, tables: Tables) -> None:
        self.tables = {name: Table(tables.get(name, ())) for name in (*FILES, "plots")}

    def copy(self) -> Self:
        """Return a workplace in the same state."""
        new = type(self)({})
        new.tables = {name: table.copy() for name, table in self.tables.items()}
        return new

    def differences(self, other: Databases) -> list[str]:
        """Return the names of the tables that differ from those of `other`, see `Table.same`."""
        return [n for n in _STATES if not self.tables[n].same(other.tables[n])]

    def read(self, key: str, value: Any, kind: type) -> Any:
        """Convert an argument. Numbers for texts stay numbers, and null means not given."""
        if kind is str and (value is None or isinstance(value, str | int | float)):
            return value
        return super().read(key, value, kind)

    def shown(self, result: Any) -> str:
        """Return `{"output": result}`."""
        return json.dumps({"output": result}, ensure_ascii=False, separators=(",", ":"))

    def field_of(self, table: str, key: str, value: Any, field: Any) -> Any:
        need(**{key: value, "field": field})
        one_of("field", field, FILES[table][1])
        return {field: self.tables[table].get(key, value)[field]}

    def add(self, table: str, key: str, values: Record) -> str:
        new = str(self.tables[table].next_id(key)).zfill(8)
        self.tables[table].add({key: new, **values})
        return new

    def remove(self, table: str, key: str, value: Any) -> str:
        need(**{key: value})
        self.tables[table].remove(key, value)
        return "deleted"


def need(**values: Any) -> None:
    missing = [name for name, value in values.items() if not value]
    if missing:
        raise CallError(f"not given: {', '.join(missing)}")


def one_of(name: str, value: Any, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        raise CallError(f"{name} {value!r} must be one of: {', '.join(allowed)}")


def text_of(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CallError(f"{name} must be text, it is {value!r}")
    return value


def lower(name: str, value: Any) -> str:
    return text_of(name, value).lower()


def holds(cell: Any, part: Any) -> bool:
    return isinstance(cell, str) and lower("a search", part) in cell.lower()


def matching(records: Iterable[Record], parts: Record) -> list[Record]:
    wanted = {field: part for field, part in parts.items() if part}
    return [r for r in records if all(holds(r[field], part) for field, part in wanted.items())]


def between(cell: Any, low: Any, high: Any) -> bool:
    if not isinstance(cell, str):
        return not low and not high
    return (not low or cell >= text_of("a bound", low)) and (
        not high or cell <= text_of("a bound", high)
    )


def time_of(text: Any) -> datetime:
    found = _TIME.fullmatch(text_of("a time", text).strip())
    try:
        if found:
            year, month, day, hour, minute, second = (int(part or 0) for part in found.groups())
            return datetime(year, month, day, hour, minute, second)
        return datetime.fromisoformat(text).replace(tzinfo=None)
    except ValueError:
        raise CallError(f"{text!r} is not a time of the form YYYY-MM-DD HH:MM:SS") from None


def page_of(name: str, found: Sequence[Record], page: int, page_size: int) -> Any:
    """Return one page; a number beyond the last page gives the last."""
    if page_size < 1:
        raise CallError(f"page_size {page_size} must be at least 1")
    if not found:
        raise CallError(f"no {name} found")
    pages = -(-len(found) // page_size)
    page = max(1, min(page, pages))
    counts = {f"total_{name}": len(found), "page": page, "page_size": page_size}
    start = (page - 1) * page_size
    return {
        name: found[start : start + page_size],
        "pagination": {**counts, "total_pages": pages},
    }
