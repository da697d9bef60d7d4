"""Tools of the workplace for its directory, mails and calendar."""

from __future__ import annotations

import re
from typing import Any

from nemocascade.envs.applications import CallError, tool
from nemocascade.envs.workplace.databases import (
    Databases,
    holds,
    lower,
    need,
    one_of,
    page_of,
    text_of,
    time_of,
)
from nemocascade.envs.workplace.tables import FILES, NOW

_EVENT_FIELDS = FILES["calendar"][1]
_EVENT_ID = re.compile(r"\d{8}")


class Correspondence(Databases):
    """Directory, mails and calendar."""

    @tool
    def company_directory_find_email_address(self, name: str = "") -> Any:
        """Find e-mail addresses by a part of a name."""
        need(name=name)
        addresses = self.tables["directory"].records()
        return [a["email_address"] for a in addresses if holds(a["email_address"], name)]

    @tool
    def email_get_email_information_by_id(
        self, email_id: str | None = None, field: str | None = None
    ) -> Any:
        """Return one field of a mail."""
        return self.field_of("emails", "email_id", email_id, field)

    @tool
    def email_search_emails(
        self,
        query: str = "",
        date_min: str | None = None,
        date_max: str | None = None,
        page: int = 1,
        page_size: int = 5,
    ) -> Any:
        """Find mails that hold all words of the query, latest first."""
        words = text_of("query", query or "").lower().split()
        fields = ("subject", "body", "sender/recipient")
        found = [
            mail
            for mail in self.tables["emails"].records()
            if all(word in " ".join(str(mail[f]) for f in fields).lower() for word in words)
        ]
        found.sort(key=lambda mail: time_of(mail["sent_datetime"]), reverse=True)
        low, high = (time_of(day).date() if day else None for day in (date_min, date_max))
        days = [(time_of(mail["sent_datetime"]).date(), mail) for mail in found]
        found = [m for day, m in days if (not low or day >= low) and (not high or day <= high)]
        return page_of("emails", found, page, page_size)

    @tool
    def email_send_email(
        self, recipient: str | None = None, subject: str | None = None, body: str | None = None
    ) -> Any:
        """Send a mail."""
        need(recipient=recipient, subject=subject, body=body)
        self._send(recipient, subject, body)
        return "sent"

    @tool
    def email_delete_email(self, email_id: str | None = None) -> Any:
        """Delete a mail."""
        return self.remove("emails", "email_id", email_id)

    @tool
    def email_forward_email(self, email_id: str | None = None, recipient: str | None = None) -> Any:
        """Forward a mail."""
        need(email_id=email_id, recipient=recipient)
        mail = self.tables["emails"].get("email_id", email_id)
        self._send(recipient, f"FW: {mail['subject']}", mail["body"])
        return "forwarded"

    @tool
    def email_reply_email(self, email_id: str | None = None, body: str | None = None) -> Any:
        """Reply to a mail; an own mail is answered to its recipient."""
        need(email_id=email_id, body=body)
        mail = self.tables["emails"].get("email_id", email_id)
        self._send(mail["sender/recipient"], f"RE: {mail['subject']}", body)
        return "replied"

    @tool
    def calendar_get_event_information_by_id(
        self, event_id: str | None = None, field: str | None = None
    ) -> Any:
        """Return one field of an event."""
        return self.field_of("calendar", "event_id", _event_id(event_id), field)

    @tool
    def calendar_search_events(
        self,
        query: str = "",
        time_min: str | None = None,
        time_max: str | None = None,
        page: int = 1,
        page_size: int = 5,
    ) -> Any:
        """Find events by name or participant, latest first; both times bound the start."""
        low, high = (time_of(text) if text else None for text in (time_min, time_max))
        found = [
            (time_of(event["event_start"]), event)
            for event in self.tables["calendar"].records()
            if any(holds(event[f], query or "") for f in ("event_name", "participant_email"))
        ]
        found.sort(key=lambda pair: pair[0], reverse=True)
        events = [e for at, e in found if (not low or at >= low) and (not high or at <= high)]
        return page_of("events", events, page, page_size)

    @tool
    def calendar_create_event(
        self,
        event_name: str | None = None,
        participant_email: str | None = None,
        event_start: str | None = None,
        duration: str | None = None,
    ) -> Any:
        """Create an event of `duration` minutes."""
        values = {
            "event_name": event_name,
            "participant_email": participant_email,
            "event_start": event_start,
            "duration": duration,
        }
        need(**values)
        values = {field: _event_value(field, value) for field, value in values.items()}
        table = self.tables["calendar"]
        new = str(table.next_id("event_id")).zfill(8)
        table.add({"event_id": new, **values}, renumber=False)
        return new

    @tool
    def calendar_delete_event(self, event_id: str | None = None) -> Any:
        """Delete an event."""
        return self.remove("calendar", "event_id", _event_id(event_id))

    @tool
    def calendar_update_event(
        self, event_id: str | None = None, field: str | None = None, new_value: str | None = None
    ) -> Any:
        """Change one field of an event."""
        need(event_id=event_id, field=field, new_value=new_value)
        one_of("field", field, _EVENT_FIELDS[1:])
        value = _event_value(str(field), new_value)
        self.tables["calendar"].change("event_id", _event_id(event_id), str(field), value)
        return "updated"

    def _send(self, recipient: Any, subject: Any, body: Any) -> None:
        address = lower("recipient", recipient)
        if "@" not in address or "." not in address:
            raise CallError(f"{recipient!r} is not an e-mail address")
        table = self.tables["emails"]
        table.add(
            {
                "email_id": str(table.next_id("email_id")),
                "inbox/outbox": "outbox",
                "sender/recipient": address,
                "subject": subject,
                "sent_datetime": NOW,
                "body": body,
            }
        )


def _event_id(value: Any) -> str:
    if not isinstance(value, str) or not _EVENT_ID.fullmatch(value):
        raise CallError(f"event_id {value!r} must have 8 digits")
    return value


def _event_value(field: str, value: Any) -> Any:
    """Return an event's value as stored. Raises CallError for one that the field cannot have."""
    if field == "event_start":
        time_of(value)
    if field == "duration":
        try:
            minutes = int(value)
        except ValueError:
            minutes = 0
        if minutes <= 0:
            raise CallError(f"duration {value!r} must be a positive number of minutes")
    return lower(field, value) if field == "participant_email" else value
