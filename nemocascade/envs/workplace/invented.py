"""Invented content of the workplace, for rows that were written about it."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any

from nemocascade.envs.applications import CallError
from nemocascade.envs.workplace import Workplace
from nemocascade.envs.workplace.tables import (
    BOARDS,
    LISTS,
    PRODUCTS,
    STATUSES,
    TODAY,
    Record,
    Tables,
)

SOURCES = ("direct", "referral", "search engine", "social media")


def check_invented(asked: str, calls: Sequence[Mapping[str, Any]]) -> None:
    """Raise CallError if the true calls are about another workplace than the invented one.

    They are if one cannot be executed, or names an address that neither the tables nor the prompt
    `asked` has.
    """
    application = Workplace(made_tables())
    for call in calls:
        application.call(call["name"], call["arguments"])
        for value in call["arguments"].values():
            word = str(value).lower()
            known = word in _addresses() or word in asked.lower()
            if "@" in word and " " not in word and not known:
                raise CallError(f"nobody has the address {value!r}")


@lru_cache(maxsize=1)
def made_tables() -> Tables:
    """Invent the content of a workplace, always the same."""
    rng = random.Random("workplace")
    people = [f"{first}.{rng.choice(_LAST)}@{_COMPANY}" for first in _FIRST]
    return {
        "analytics": [_visit(rng, i) for i in range(240)],
        "calendar": [_event(rng, i, people) for i in range(90)],
        "customers": [_customer(rng, i, people) for i in range(80)],
        "emails": [_email(rng, i, people) for i in range(120)],
        "tasks": [_task(rng, i, people) for i in range(90)],
        "directory": [{"email_address": person} for person in people],
    }


@lru_cache(maxsize=1)
def _addresses() -> frozenset[str]:
    """All e-mail addresses of the invented tables, in lower case."""
    cells = (cell for rows in made_tables().values() for row in rows for cell in row.values())
    return frozenset(cell.lower() for cell in cells if isinstance(cell, str) and "@" in cell)


_COMPANY = "larkfield.example"
_FIRST = (
    *("ada", "bruno", "celia", "dario", "edith", "farid", "greta", "hugo", "ines", "jonas"),
    *("katya", "lionel", "maren", "nadir", "olive", "petra", "quentin", "rosa", "stefan", "tilda"),
)
_LAST = ("moss", "fenn", "arlt", "brook", "quist", "vale", "winter", "sand")
_CLIENTS = ("Ivy Thorn", "Noel Marsh", "Pia Stone", "Rudi Lamb", "Sol Reed", "Uma Birch", "Vic Ash")
_SHOPS = ("copperkettle", "blueferry", "oldmill", "redlantern", "tallpine")
_THINGS = ("invoice form", "login page", "search box", "price list", "export job", "help text")
_VERBS = ("Repair the", "Test the", "Rewrite the", "Speed up the", "Review the")
_EVENTS = ("Budget round", "Design hour", "Hiring talk", "Release check", "Team lunch", "Demo")
_FIRST_ID = 70_000_001
"""Ids of invented rows begin here, so that no published row fits them by chance."""


def _id(number: int) -> str:
    return str(_FIRST_ID + number)


def _day(rng: random.Random, first: int, last: int) -> str:
    """Return a day between `first` and `last` days after today."""
    return str(TODAY + timedelta(days=rng.randint(first, last)))


def _visit(rng: random.Random, number: int) -> Record:
    return {
        "date_of_visit": _day(rng, -60, 0),
        "visitor_id": str(7001 + number),
        "page_views": str(rng.randint(1, 20)),
        "session_duration_seconds": str(rng.randint(1, 90)),
        "traffic_source": rng.choice(SOURCES),
        "user_engaged": str(rng.random() < 0.4),
    }


def _event(rng: random.Random, number: int, people: Sequence[str]) -> Record:
    return {
        "event_id": _id(number),
        "event_name": rng.choice(_EVENTS),
        "participant_email": rng.choice(people),
        "event_start": f"{_day(rng, -60, 20)} {rng.randint(9, 16):02}:{rng.choice((0, 30)):02}:00",
        "duration": rng.choice(("30", "60", "90")),
    }


def _customer(rng: random.Random, number: int, people: Sequence[str]) -> Record:
    name = rng.choice(_CLIENTS)
    return {
        "customer_id": _id(number),
        "assigned_to_email": rng.choice(people[:6]),
        "customer_name": name,
        "customer_email": f"{name.lower().replace(' ', '.')}@{rng.choice(_SHOPS)}.example",
        "customer_phone": rng.choice((None, f"555-01{rng.randint(10, 99)}")),
        "last_contact_date": _day(rng, -50, -1),
        "product_interest": rng.choice(PRODUCTS),
        "status": rng.choice(STATUSES),
        "follow_up_by": _day(rng, 1, 30),
        "notes": f"{_day(rng, -50, -1)}: {rng.choice(('Called.', 'Met.', 'Sent an offer.'))}",
    }


def _email(rng: random.Random, number: int, people: Sequence[str]) -> Record:
    thing = rng.choice(_THINGS)
    return {
        "email_id": _id(number),
        "inbox/outbox": rng.choice(("inbox", "inbox", "outbox")),
        "sender/recipient": rng.choice(people),
        "subject": rng.choice((f"About the {thing}", f"Question on the {thing}")),
        "sent_datetime": f"{_day(rng, -60, 0)} {rng.randint(8, 18):02}:{rng.randint(0, 59):02}:00",
        "body": f"Hello, the {thing} needs another look. Thanks.",
    }


def _task(rng: random.Random, number: int, people: Sequence[str]) -> Record:
    return {
        "task_id": _id(number),
        "task_name": f"{rng.choice(_VERBS)} {rng.choice(_THINGS)}",
        "assigned_to_email": rng.choice(people[:10]),
        "list_name": rng.choice(LISTS),
        "due_date": _day(rng, -20, 20),
        "board": rng.choice(BOARDS),
    }
