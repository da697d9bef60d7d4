"""The office, its tools, and verdicts by end states."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemocascade.envs.applications import MAX_CALLS, CallError
from nemocascade.envs.office import EMPTY, Office
from nemocascade.envs.tool_calling import ToolCalling
from nemocascade.types import Message, Prompt, ToolCall

START: dict[str, list[dict[str, Any]]] = {
    "mail": [
        {"id": 1, "folder": "inbox", "from": "ana", "to": "me", "subject": "Plan", "body": "Read."}
    ],
    "events": [
        {
            "id": 1,
            "title": "talk",
            "day": "2026-01-02",
            "start": "09:00",
            "minutes": 30,
            "guests": [],
        }
    ],
    "contacts": [{"id": 1, "name": "Ben", "email": "b@x", "phone": ""}],
    "tasks": [{"id": 1, "title": "buy milk", "due": "", "done": False}],
    "files": [{"id": 1, "path": "notes", "text": "old", "shared": []}],
}

# Every tool that changes something, and the row that is different after it.
CHANGES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("send_mail", {"to": "ben", "subject": "Hi"}, "mail", {"to": "ben", "folder": "sent"}),
    ("reply_mail", {"id": "1", "body": "Yes"}, "mail", {"to": "ana", "subject": "Re: Plan"}),
    ("forward_mail", {"id": 1, "to": "ben"}, "mail", {"to": "ben", "body": "Read."}),
    ("move_mail", {"id": "1", "folder": "done"}, "mail", {"folder": "done"}),
    ("add_event", {"title": "x", "day": "2026-03-04"}, "events", {"title": "x", "minutes": 30}),
    (
        "move_event",
        {"id": "1", "day": "2026-03-04", "start": "10:30"},
        "events",
        {"start": "10:30"},
    ),
    ("rename_event", {"id": "1", "title": "y"}, "events", {"title": "y"}),
    ("invite", {"id": "1", "name": "ben"}, "events", {"guests": ["ben"]}),
    ("add_contact", {"name": "Cy", "email": "c@x"}, "contacts", {"name": "Cy"}),
    ("set_email", {"name": "ben", "email": "z"}, "contacts", {"email": "z"}),
    ("set_phone", {"name": "ben", "phone": "12"}, "contacts", {"phone": "12"}),
    ("add_task", {"title": "go", "due": "2026-01-01"}, "tasks", {"due": "2026-01-01"}),
    ("finish_task", {"title": "Buy Milk"}, "tasks", {"done": True}),
    ("set_due", {"title": "buy milk", "due": "2026-01-01"}, "tasks", {"due": "2026-01-01"}),
    ("write_file", {"path": "new", "text": "t"}, "files", {"path": "new", "text": "t"}),
    ("write_file", {"path": "notes", "text": "t"}, "files", {"path": "notes", "text": "t"}),
    ("rename_file", {"path": "notes", "new_path": "n"}, "files", {"path": "n"}),
    ("share_file", {"path": "notes", "name": "ben"}, "files", {"shared": ["ben"]}),
]
DELETIONS = [
    ("delete_mail", {"id": "1"}, "mail"),
    ("delete_event", {"id": 1}, "events"),
    ("delete_contact", {"name": "BEN"}, "contacts"),
    ("delete_task", {"title": "buy milk"}, "tasks"),
    ("delete_file", {"path": "notes"}, "files"),
]
READERS: list[tuple[str, dict[str, Any], str]] = [
    ("list_mail", {}, "Plan"),
    ("search_mail", {"query": "PLAN"}, "Read."),
    ("read_mail", {"id": "1"}, "Read."),
    ("list_events", {"day": "2026-01-02"}, "talk"),
    ("search_events", {"query": "talk"}, "09:00"),
    ("find_contact", {"name": "ben"}, "b@x"),
    ("list_tasks", {}, "buy milk"),
    ("list_files", {}, "notes"),
    ("read_file", {"path": "notes"}, "old"),
]


@pytest.mark.parametrize(("tool", "arguments", "table", "row"), CHANGES)
def test_a_tool_that_changes(
    tool: str, arguments: dict[str, Any], table: str, row: dict[str, Any]
) -> None:
    office = Office(START)
    before = office.state()
    office.call(tool, arguments)
    after = office.state()
    assert [t for t in EMPTY if before[t] != after[t]] == [table]
    wanted = json.loads(json.dumps(row).casefold())
    assert any(wanted.items() <= json.loads(r).items() for r in after[table])


@pytest.mark.parametrize(("tool", "arguments", "table"), DELETIONS)
def test_a_tool_that_deletes(tool: str, arguments: dict[str, Any], table: str) -> None:
    office = Office(START)
    office.call(tool, arguments)
    assert office.state()[table] == []
    with pytest.raises(CallError, match=f"no entry in {table}"):
        office.call(tool, arguments)


@pytest.mark.parametrize(("tool", "arguments", "shown"), READERS)
def test_a_tool_that_reads(tool: str, arguments: dict[str, Any], shown: str) -> None:
    office = Office(START)
    before = office.state()
    assert shown in office.call(tool, arguments)
    assert office.state() == before


def test_every_tool_is_tried_and_declares_itself() -> None:
    names = {tool.name for tool in Office.tools()}
    assert names == {row[0] for row in [*CHANGES, *DELETIONS, *READERS]}
    assert len(names) >= 20
    for tool in Office.tools():
        assert tool.description
        assert set(tool.parameters["required"]) <= set(tool.parameters["properties"])


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("fly", {}),
        ("__init__", {}),
        ("add_task", {}),
        ("add_task", {"title": "x", "colour": "red"}),
        ("add_task", {"title": "x", "due": "tomorrow"}),
        ("add_task", {"title": ["x"]}),
        ("read_mail", {"id": "one"}),
        ("read_mail", {"id": 9}),
        ("read_mail", {"id": True}),
        ("add_event", {"title": "x", "day": "2026-01-01", "start": "late"}),
        ("rename_file", {"path": "notes", "new_path": "NOTES"}),
    ],
)
def test_a_call_that_cannot_be_executed_changes_nothing(
    tool: str, arguments: dict[str, Any]
) -> None:
    office = Office(START)
    before = office.state()
    with pytest.raises(CallError):
        office.call(tool, arguments)
    assert office.state() == before


def test_offices_share_nothing() -> None:
    one, other = Office(START), Office(START)
    one.call("finish_task", {"title": "buy milk"})
    one.call("invite", {"id": 1, "name": "ben"})
    assert other.state() == Office(START).state()


def prompt(calls: list[ToolCall], allowed: list[str] | None = None) -> Prompt:
    answer = {
        "office": START,
        "calls": [{"name": c.name, "arguments": dict(c.arguments)} for c in calls],
        "allowed": allowed or [tool.name for tool in Office.tools()],
    }
    return Prompt("x", "tool_calling", (Message("user", "go"),), answer)


ADD = ToolCall("add_task", {"title": "go"})
MAIL = ToolCall("send_mail", {"to": "ben", "subject": "Hi"})
WRONG = ToolCall("add_task", {"title": "stay"})
BROKEN = ToolCall("finish_task", {"title": "nothing"})


@pytest.mark.parametrize(
    ("made", "reward"),
    [
        ([[ADD, MAIL]], 1.0),
        ([[MAIL], [ADD]], 1.0),
        ([[ADD, BROKEN, MAIL]], 1.0),
        ([[ADD, ToolCall("list_tasks", {})], [MAIL]], 1.0),
        ([[ADD, WRONG], [MAIL, ToolCall("delete_task", {"title": "stay"})]], 1.0),
        ([[ToolCall("add_task", {"title": "GO"}), MAIL]], 1.0),
        ([[ADD]], 0.0),
        ([[ADD, ADD, MAIL]], 0.0),
        ([[ADD, MAIL, WRONG]], 0.0),
        ([[]], 0.0),
        ([[ADD, MAIL] + [BROKEN] * MAX_CALLS], 0.0),
    ],
)
def test_end_states_decide(made: list[list[ToolCall]], reward: float) -> None:
    response = [Message("assistant", "", tool_calls=tuple(calls)) for calls in made]
    verdict = ToolCalling().score(prompt([ADD, MAIL]), [*response, Message("assistant", "Done.")])
    assert verdict.reward == reward
    assert verdict.details["calls"] == sum(map(len, made))


def test_a_true_call_that_fails_is_an_error_of_the_task() -> None:
    verdict = ToolCalling().score(prompt([BROKEN]), [Message("assistant", "", tool_calls=(ADD,))])
    assert verdict.reward is None
    assert "no entry in tasks" in str(verdict.error)


def test_a_session_answers_every_call() -> None:
    session = ToolCalling().session(prompt([ADD], allowed=["add_task"]))
    answers = session.step([ADD, MAIL, ToolCall("add_task", {})])
    assert [m.role for m in answers] == ["tool"] * 3
    assert json.loads(answers[0].content)["title"] == "go"
    assert answers[1].content == "error: unknown tool send_mail"
    assert answers[2].content.startswith("error: add_task: unknown arguments [], missing")
    # The state continues from step to step, and the next episode starts afresh.
    (second,) = session.step([ADD])
    assert json.loads(second.content)["id"] == 3
    (first,) = ToolCalling().session(prompt([ADD])).step([ADD])
    assert json.loads(first.content)["id"] == 2


def test_demonstrations_hold_what_a_session_answers() -> None:
    domain = ToolCalling()
    for level in range(4):
        for task in domain.prompts(seed=1, count=10, difficulty=level):
            asked, *results, last = task.demonstration
            assert domain.session(task).step(asked.tool_calls) == results
            assert last.content == "Done."
            assert asked.reasoning
            assert last.reasoning
            assert len(asked.tool_calls) == (2 if level >= 2 else 1)
            assert bool(task.tools) == (level >= 3)
