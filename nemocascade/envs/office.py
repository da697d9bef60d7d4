"""A small simulated office: mail, calendar, contacts, tasks, files, and tools to change them.

State is plain data; all arguments arrive as text or JSON values.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from datetime import date, time
from typing import Any

from nemocascade.envs.applications import Application, CallError, tool

Row = dict[str, Any]

EMPTY: Mapping[str, list[Row]] = {
    "mail": [],
    "events": [],
    "contacts": [],
    "tasks": [],
    "files": [],
}


class Office(Application):
    """One office; offices are compared by `state`."""

    def __init__(self, tables: Mapping[str, list[Row]] = EMPTY) -> None:
        """`tables`: the initial state, copied. Raises ValueError for an unknown table, and for one
        that is not a list of objects."""
        unknown = sorted(set(tables) - set(EMPTY))
        if unknown:
            raise ValueError(f"unknown tables {unknown}, known are {sorted(EMPTY)}")
        for name, rows in tables.items():
            if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
                raise ValueError(f"the office's table {name!r} must be a list of objects")
        self._tables = {name: copy.deepcopy(tables.get(name, [])) for name in EMPTY}

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

    def differences(self, other: Office) -> list[str]:
        """Return the names of the tables whose rows differ from those of `other`."""
        mine, theirs = self.state(), other.state()
        return sorted(table for table in mine if mine[table] != theirs[table])

    def _add(self, table: str, **fields: Any) -> Row:
        rows = self._tables[table]
        row = {"id": 1 + max((r["id"] for r in rows), default=0), **fields}
        rows.append(row)
        return row

    def _get(self, table: str, **wanted: Any) -> Row:
        for row in self._tables[table]:
            if all(_same(row.get(key), value) for key, value in wanted.items()):
                return row
        raise CallError(f"no entry in {table} with {wanted}")

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

    @tool
    def send_mail(self, to: str, subject: str, body: str = "") -> Any:
        """Send a mail."""
        return self._add("mail", folder="sent", to=to, subject=subject, body=body)

    @tool
    def list_mail(self, folder: str = "inbox") -> Any:
        """List the mails in a folder."""
        return [r for r in self._tables["mail"] if _same(r["folder"], folder)]

    @tool
    def search_mail(self, query: str) -> Any:
        """Find mails that hold a text."""
        return self._find("mail", query)

    @tool
    def read_mail(self, id: int) -> Any:
        """Read one mail."""
        return self._get("mail", id=id)

    @tool
    def reply_mail(self, id: int, body: str) -> Any:
        """Reply to a mail."""
        mail = self._get("mail", id=id)
        to = mail.get("from") or mail.get("to")
        subject = f"Re: {mail['subject']}"
        return self._add("mail", folder="sent", to=to, subject=subject, body=body)

    @tool
    def forward_mail(self, id: int, to: str) -> Any:
        """Forward a mail."""
        mail = self._get("mail", id=id)
        subject = f"Fwd: {mail['subject']}"
        return self._add("mail", folder="sent", to=to, subject=subject, body=mail["body"])

    @tool
    def move_mail(self, id: int, folder: str) -> Any:
        """Move a mail to a folder."""
        return self._change("mail", {"id": id}, folder=folder)

    @tool
    def delete_mail(self, id: int) -> Any:
        """Delete a mail."""
        return self._remove("mail", id=id)

    @tool
    def add_event(self, title: str, day: str, start: str = "09:00", minutes: int = 30) -> Any:
        """Add an event; day as YYYY-MM-DD, start as HH:MM."""
        return self._add(
            "events", title=title, day=_day(day), start=_start(start), minutes=minutes, guests=[]
        )

    @tool
    def list_events(self, day: str) -> Any:
        """List the events of a day."""
        return [r for r in self._tables["events"] if r["day"] == _day(day)]

    @tool
    def search_events(self, query: str) -> Any:
        """Find events that hold a text."""
        return self._find("events", query)

    @tool
    def move_event(self, id: int, day: str, start: str) -> Any:
        """Move an event."""
        event = self._get("events", id=id)
        event.update(day=_day(day), start=_start(start))
        return event

    @tool
    def rename_event(self, id: int, title: str) -> Any:
        """Give an event another title."""
        return self._change("events", {"id": id}, title=title)

    @tool
    def invite(self, id: int, name: str) -> Any:
        """Invite a contact to an event."""
        return self._name(self._get("events", id=id), "guests", name)

    @tool
    def delete_event(self, id: int) -> Any:
        """Delete an event."""
        return self._remove("events", id=id)

    @tool
    def add_contact(self, name: str, email: str, phone: str = "") -> Any:
        """Add a contact."""
        return self._add("contacts", name=name, email=email, phone=phone)

    @tool
    def find_contact(self, name: str) -> Any:
        """Find contacts by name."""
        return self._find("contacts", name)

    @tool
    def set_email(self, name: str, email: str) -> Any:
        """Change the email address of a contact."""
        return self._change("contacts", {"name": name}, email=email)

    @tool
    def set_phone(self, name: str, phone: str) -> Any:
        """Change the phone number of a contact."""
        return self._change("contacts", {"name": name}, phone=phone)

    @tool
    def delete_contact(self, name: str) -> Any:
        """Delete a contact."""
        return self._remove("contacts", name=name)

    @tool
    def add_task(self, title: str, due: str = "") -> Any:
        """Add a task; due as YYYY-MM-DD."""
        return self._add("tasks", title=title, due=_day(due) if due else "", done=False)

    @tool
    def list_tasks(self) -> Any:
        """List the tasks."""
        return self._tables["tasks"]

    @tool
    def finish_task(self, title: str) -> Any:
        """Mark a task as done."""
        return self._change("tasks", {"title": title}, done=True)

    @tool
    def set_due(self, title: str, due: str) -> Any:
        """Change the day on which a task is due."""
        task = self._get("tasks", title=title)
        task["due"] = _day(due)
        return task

    @tool
    def delete_task(self, title: str) -> Any:
        """Delete a task."""
        return self._remove("tasks", title=title)

    @tool
    def list_files(self) -> Any:
        """List the names of the files."""
        return [r["path"] for r in self._tables["files"]]

    @tool
    def read_file(self, path: str) -> Any:
        """Read a file."""
        return self._get("files", path=path)["text"]

    @tool
    def write_file(self, path: str, text: str) -> Any:
        """Write a file, or replace it."""
        for row in self._tables["files"]:
            if _same(row["path"], path):
                row["text"] = text
                return row
        return self._add("files", path=path, text=text, shared=[])

    @tool
    def rename_file(self, path: str, new_path: str) -> Any:
        """Rename a file."""
        file = self._get("files", path=path)
        if any(_same(row["path"], new_path) for row in self._tables["files"]):
            raise CallError(f"{new_path} exists")
        file["path"] = new_path
        return file

    @tool
    def share_file(self, path: str, name: str) -> Any:
        """Share a file with a contact."""
        return self._name(self._get("files", path=path), "shared", name)

    @tool
    def delete_file(self, path: str) -> Any:
        """Delete a file."""
        return self._remove("files", path=path)


def _same(a: Any, b: Any) -> bool:
    return a.casefold() == b.casefold() if isinstance(a, str) and isinstance(b, str) else a == b


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise CallError(f"{text!r} is not a day of the form YYYY-MM-DD") from None


def _start(text: str) -> str:
    try:
        return time.fromisoformat(text).strftime("%H:%M")
    except ValueError:
        raise CallError(f"{text!r} is not a time of the form HH:MM") from None
