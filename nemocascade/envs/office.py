"""A small simulated office: mail, calendar, contacts, tasks, files, and tools to change them.

State is plain data. Tools are methods marked with `@_tool`. Their signature is their schema; all
arguments arrive as text or JSON values.
"""

from __future__ import annotations

import copy
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date, time
from typing import Any

from nemocascade.types import Tool

Row = dict[str, Any]

EMPTY: Mapping[str, list[Row]] = {
    "mail": [],
    "events": [],
    "contacts": [],
    "tasks": [],
    "files": [],
}


class OfficeError(ValueError):
    """A call that cannot be executed. The message is returned to the model."""


@dataclass(frozen=True)
class _Entry:
    tool: Tool
    run: Callable[..., Any]
    types: Mapping[str, type]
    required: tuple[str, ...]


_TOOLS: dict[str, _Entry] = {}
_SCHEMA_TYPES = {str: "string", int: "integer"}


def _tool(function: Callable[..., Any]) -> Callable[..., Any]:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    types = {p.name: {"str": str, "int": int}[str(p.annotation)] for p in parameters}
    required = tuple(p.name for p in parameters if p.default is inspect.Parameter.empty)
    schema = {
        "type": "object",
        "properties": {name: {"type": _SCHEMA_TYPES[kind]} for name, kind in types.items()},
        "required": list(required),
    }
    name = function.__name__
    tool = Tool(name, (function.__doc__ or "").strip(), schema)
    _TOOLS[name] = _Entry(tool, function, types, required)
    return function


class Office:
    """One office. `call` runs a tool; offices are compared by `state`."""

    def __init__(self, tables: Mapping[str, list[Row]] = EMPTY) -> None:
        """`tables`: the initial state, copied. Raises ValueError for an unknown table."""
        unknown = sorted(set(tables) - set(EMPTY))
        if unknown:
            raise ValueError(f"unknown tables {unknown}, known are {sorted(EMPTY)}")
        self._tables = {name: copy.deepcopy(tables.get(name, [])) for name in EMPTY}

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Run a tool and return its result as JSON. Raises OfficeError and then changes nothing."""
        entry = _TOOLS.get(name)
        if entry is None:
            raise OfficeError(f"unknown tool {name}")
        unknown = [key for key in arguments if key not in entry.types]
        missing = [key for key in entry.required if key not in arguments]
        if unknown or missing:
            raise OfficeError(f"{name}: unknown arguments {unknown}, missing {missing}")
        values = {key: _read(key, value, entry.types[key]) for key, value in arguments.items()}
        return json.dumps(entry.run(self, **values), ensure_ascii=False)

    def state(self) -> dict[str, list[str]]:
        """Return every table as sorted rows, without ids and in lower case.

        The order of independent calls and capitalisation therefore make no difference.
        """
        return {
            name: sorted(
                json.dumps({k: v for k, v in row.items() if k != "id"}, sort_keys=True).casefold()
                for row in rows
            )
            for name, rows in self._tables.items()
        }

    def _add(self, table: str, **fields: Any) -> Row:
        rows = self._tables[table]
        row = {"id": 1 + max((r["id"] for r in rows), default=0), **fields}
        rows.append(row)
        return row

    def _get(self, table: str, **wanted: Any) -> Row:
        for row in self._tables[table]:
            if all(_same(row.get(key), value) for key, value in wanted.items()):
                return row
        raise OfficeError(f"no entry in {table} with {wanted}")

    def _change(self, table: str, wanted: dict[str, Any], **fields: Any) -> Row:
        row = self._get(table, **wanted)
        row.update(fields)
        return row

    @staticmethod
    def _name(row: Row, field: str, name: str) -> Row:
        """Add a name to a list of names, once."""
        if not any(_same(name, other) for other in row[field]):
            row[field] = sorted([*row[field], name])
        return row

    def _remove(self, table: str, **wanted: Any) -> str:
        self._tables[table].remove(self._get(table, **wanted))
        return "deleted"

    def _find(self, table: str, text: str) -> list[Row]:
        found = text.casefold()
        return [r for r in self._tables[table] if found in json.dumps(list(r.values())).casefold()]

    @_tool
    def send_mail(self, to: str, subject: str, body: str = "") -> Any:
        """Send a mail."""
        return self._add("mail", folder="sent", to=to, subject=subject, body=body)

    @_tool
    def list_mail(self, folder: str = "inbox") -> Any:
        """List the mails in a folder."""
        return [r for r in self._tables["mail"] if _same(r["folder"], folder)]

    @_tool
    def search_mail(self, query: str) -> Any:
        """Find mails that hold a text."""
        return self._find("mail", query)

    @_tool
    def read_mail(self, id: int) -> Any:
        """Read one mail."""
        return self._get("mail", id=id)

    @_tool
    def reply_mail(self, id: int, body: str) -> Any:
        """Reply to a mail."""
        mail = self._get("mail", id=id)
        to = mail.get("from") or mail.get("to")
        subject = f"Re: {mail['subject']}"
        return self._add("mail", folder="sent", to=to, subject=subject, body=body)

    @_tool
    def forward_mail(self, id: int, to: str) -> Any:
        """Forward a mail."""
        mail = self._get("mail", id=id)
        subject = f"Fwd: {mail['subject']}"
        return self._add("mail", folder="sent", to=to, subject=subject, body=mail["body"])

    @_tool
    def move_mail(self, id: int, folder: str) -> Any:
        """Move a mail to a folder."""
        return self._change("mail", {"id": id}, folder=folder)

    @_tool
    def delete_mail(self, id: int) -> Any:
        """Delete a mail."""
        return self._remove("mail", id=id)

    @_tool
    def add_event(self, title: str, day: str, start: str = "09:00", minutes: int = 30) -> Any:
        """Add an event; day as YYYY-MM-DD, start as HH:MM."""
        return self._add(
            "events", title=title, day=_day(day), start=_start(start), minutes=minutes, guests=[]
        )

    @_tool
    def list_events(self, day: str) -> Any:
        """List the events of a day."""
        return [r for r in self._tables["events"] if r["day"] == _day(day)]

    @_tool
    def search_events(self, query: str) -> Any:
        """Find events that hold a text."""
        return self._find("events", query)

    @_tool
    def move_event(self, id: int, day: str, start: str) -> Any:
        """Move an event."""
        event = self._get("events", id=id)
        event.update(day=_day(day), start=_start(start))
        return event

    @_tool
    def rename_event(self, id: int, title: str) -> Any:
        """Give an event another title."""
        return self._change("events", {"id": id}, title=title)

    @_tool
    def invite(self, id: int, name: str) -> Any:
        """Invite a contact to an event."""
        return self._name(self._get("events", id=id), "guests", name)

    @_tool
    def delete_event(self, id: int) -> Any:
        """Delete an event."""
        return self._remove("events", id=id)

    @_tool
    def add_contact(self, name: str, email: str, phone: str = "") -> Any:
        """Add a contact."""
        return self._add("contacts", name=name, email=email, phone=phone)

    @_tool
    def find_contact(self, name: str) -> Any:
        """Find contacts by name."""
        return self._find("contacts", name)

    @_tool
    def set_email(self, name: str, email: str) -> Any:
        """Change the email address of a contact."""
        return self._change("contacts", {"name": name}, email=email)

    @_tool
    def set_phone(self, name: str, phone: str) -> Any:
        """Change the phone number of a contact."""
        return self._change("contacts", {"name": name}, phone=phone)

    @_tool
    def delete_contact(self, name: str) -> Any:
        """Delete a contact."""
        return self._remove("contacts", name=name)

    @_tool
    def add_task(self, title: str, due: str = "") -> Any:
        """Add a task; due as YYYY-MM-DD."""
        return self._add("tasks", title=title, due=_day(due) if due else "", done=False)

    @_tool
    def list_tasks(self) -> Any:
        """List the tasks."""
        return self._tables["tasks"]

    @_tool
    def finish_task(self, title: str) -> Any:
        """Mark a task as done."""
        return self._change("tasks", {"title": title}, done=True)

    @_tool
    def set_due(self, title: str, due: str) -> Any:
        """Change the day on which a task is due."""
        task = self._get("tasks", title=title)
        task["due"] = _day(due)
        return task

    @_tool
    def delete_task(self, title: str) -> Any:
        """Delete a task."""
        return self._remove("tasks", title=title)

    @_tool
    def list_files(self) -> Any:
        """List the names of the files."""
        return [r["path"] for r in self._tables["files"]]

    @_tool
    def read_file(self, path: str) -> Any:
        """Read a file."""
        return self._get("files", path=path)["text"]

    @_tool
    def write_file(self, path: str, text: str) -> Any:
        """Write a file, or replace it."""
        for row in self._tables["files"]:
            if _same(row["path"], path):
                row["text"] = text
                return row
        return self._add("files", path=path, text=text, shared=[])

    @_tool
    def rename_file(self, path: str, new_path: str) -> Any:
        """Rename a file."""
        file = self._get("files", path=path)
        if any(_same(row["path"], new_path) for row in self._tables["files"]):
            raise OfficeError(f"{new_path} exists")
        file["path"] = new_path
        return file

    @_tool
    def share_file(self, path: str, name: str) -> Any:
        """Share a file with a contact."""
        return self._name(self._get("files", path=path), "shared", name)

    @_tool
    def delete_file(self, path: str) -> Any:
        """Delete a file."""
        return self._remove("files", path=path)


def tools() -> tuple[Tool, ...]:
    """Return all tools of the office, with their schemas."""
    return tuple(entry.tool for entry in _TOOLS.values())


def _same(a: Any, b: Any) -> bool:
    return a.casefold() == b.casefold() if isinstance(a, str) and isinstance(b, str) else a == b


def _read(key: str, value: Any, kind: type) -> Any:
    """Convert an argument to the type of its schema; a template's call has text."""
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int | str):
            raise OfficeError(f"{key} must be an integer, it is {value!r}")
        try:
            return int(value)
        except ValueError:
            raise OfficeError(f"{key} must be an integer, it is {value!r}") from None
    if isinstance(value, list | dict | bool) or value is None:
        raise OfficeError(f"{key} must be text, it is {value!r}")
    return str(value).strip()


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise OfficeError(f"{text!r} is no day of the form YYYY-MM-DD") from None


def _start(text: str) -> str:
    try:
        return time.fromisoformat(text).strftime("%H:%M")
    except ValueError:
        raise OfficeError(f"{text!r} is no time of the form HH:MM") from None
