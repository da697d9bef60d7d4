"""Rows of every published form, from the file to the verdict."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.graded import WrittenJudge
from helpers.released import FORMS, Released, called, workplace

from nemocascade.envs.applications import CallError
from nemocascade.envs.base import Domain
from nemocascade.envs.checks.schema import typed
from nemocascade.envs.preference import Preference
from nemocascade.envs.registry import close_environments, make_environments
from nemocascade.envs.tool_calling import ToolCalling
from nemocascade.envs.workplace import Workplace
from nemocascade.envs.workplace.invented import made_tables
from nemocascade.envs.workplace.tables import FILES, Tables
from nemocascade.recipe.envs import EnvConfig, SandboxConfig, ToolCallingConfig
from nemocascade.rl.trial import try_verifiers
from nemocascade.runtime.row_errors import BadRows, DataError
from nemocascade.types import Answer, Message, ToolCall

TEXT = [name for name in FORMS if name != "genrm_compare"]


@pytest.fixture(scope="module")
def environments() -> Iterator[dict[str, Domain]]:
    config = EnvConfig(if_language_check="letters", sandbox=SandboxConfig(workers=1))
    made = make_environments(config)
    yield made
    close_environments(made)


def file_of(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("form", TEXT)
def test_right_and_wrong_answers_to_released_rows(
    environments: dict[str, Domain], tmp_path: Path, form: str
) -> None:
    """A file that mixes all forms and a bad row is read whole, and every row is decided rightly."""
    name, released = FORMS[form]
    domain = environments[name]
    everything = [r.row for _, rows in FORMS.values() for r in rows]
    others = [environments[other] for other in environments if other != name]
    bad = BadRows(1)
    path = file_of(tmp_path / "rows.jsonl", *everything, {"expected_answer": []})
    prompts = {p.source: p for p in domain.read(path, bad.skip, others)}
    assert bad.count == (name == "math")
    first = [r.row for _, rows in FORMS.values() for r in rows].index(released[0].row)
    assert len(released) == 5
    for number, r in enumerate(released, start=first + 1):
        prompt = prompts[f"{path}:{number}"]
        right, wrong = domain.score(prompt, r.right), domain.score(prompt, r.wrong)
        assert (right.reward, wrong.reward) == (1.0, 0.0), (right, wrong)
    try_verifiers(prompts.values(), environments)


@pytest.mark.parametrize("form", TEXT)
def test_no_field_of_released_rows_is_unknown(
    environments: dict[str, Domain], tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    name, released = FORMS[form]
    path = file_of(tmp_path / "rows.jsonl", *(r.row for r in released))
    assert len(list(environments[name].read(path))) == 5
    assert "does not know" not in caplog.text
    changed = {**released[0].row, "tolerance": 1}
    list(environments[name].read(file_of(path, changed)))
    assert "'tolerance' in 1 rows" in caplog.text


def test_rows_of_preference(tmp_path: Path) -> None:
    """The judge prefers the answer that names a bird."""
    _, released = FORMS["genrm_compare"]

    class Birds(WrittenJudge):
        def ask(self, questions: Any) -> list[Answer]:
            found = []
            for question in questions:
                text = str(question.messages)
                first = text.rindex("An owl.") < text.rindex("No.")
                scores = {"score_1": 5, "score_2": 1, "ranking": 1}
                turned = {"score_1": 1, "score_2": 5, "ranking": 6}
                found.append(Answer(json.dumps(scores if first else turned)))
            return found

    domain = Preference(Birds())
    prompts = list(domain.read(file_of(tmp_path / "rows.jsonl", *(r.row for r in released))))
    assert len(prompts) == 5
    assert [len(p.messages) for p in prompts] == [3, 1, 1, 1, 1]
    for prompt, r in zip(prompts, released, strict=True):
        ((right, wrong),) = domain.score_groups([(prompt, [r.right, r.wrong])])
        assert right.reward is not None
        assert wrong.reward is not None
        assert right.reward > wrong.reward


@pytest.mark.parametrize("form", FORMS)
def test_fields_may_stand_in_verifier_metadata(
    environments: dict[str, Domain], tmp_path: Path, form: str
) -> None:
    name, (released, *_) = FORMS[form]
    domain = Preference(WrittenJudge()) if name == "preference" else environments[name]
    inner = dict(released.row)
    params = inner.pop("responses_create_params")
    inner |= inner.pop("verifier_metadata", {})
    rows = [
        {"responses_create_params": params, "verifier_metadata": given}
        for given in (inner, json.dumps(inner))
    ]
    if name == "preference":  # a row with verifier_metadata is of another domain
        with pytest.raises(DataError, match="it is not a row of preference"):
            list(domain.read(file_of(tmp_path / "rows.jsonl", *rows)))
        return
    for prompt in domain.read(file_of(tmp_path / "rows.jsonl", *rows)):
        assert domain.score(prompt, released.right).reward == 1.0
        assert domain.score(prompt, released.wrong).reward == 0.0


def test_calls_and_reasoning_of_a_prompt_may_be_items(
    environments: dict[str, Domain], tmp_path: Path
) -> None:
    call = {"type": "function_call", "name": "look", "arguments": '{"x": 1}', "call_id": "c"}
    items = [
        {"role": "user", "content": "Look.", "type": "message"},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "I look."}]},
        call,
        {**call, "name": "see"},
        {"type": "function_call_output", "output": "a cat", "call_id": "c"},
        {"type": "reasoning", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "A cat."}]},
        call,
        {"type": "function_call_output", "output": "a dog"},
    ]
    params = {"input": items, "instructions": "Be brief."}
    row = {"responses_create_params": params, "expected_answer": "1"}
    (prompt,) = environments["math"].read(file_of(tmp_path / "rows.jsonl", row))
    look, see = ToolCall("look", {"x": 1}), ToolCall("see", {"x": 1})
    assert prompt.messages == (
        Message("system", "Be brief."),
        Message("user", "Look."),
        Message("assistant", "", "I look.", (look, see)),
        Message("tool", "a cat"),
        Message("assistant", "A cat.", "", (look,)),
        Message("tool", "a dog"),
    )
    items.insert(0, {"role": "system", "content": "Be long."})
    with pytest.raises(DataError, match="'instructions' and a system turn"):
        list(environments["math"].read(file_of(tmp_path / "rows.jsonl", row)))


def test_a_session_of_the_workplace_answers_as_published(tmp_path: Path) -> None:
    domain = ToolCalling()
    (prompt, *_) = domain.read(file_of(tmp_path / "r.jsonl", *(r.row for r in workplace())))
    assert len(prompt.tools) == 27
    person = made_tables()["directory"][0]["email_address"]
    find = ToolCall("company_directory_find_email_address", {"name": "ADA"})
    lost = ToolCall("email_delete_email", {"email_id": "00000001"})
    found, failed, other = domain.session(prompt).step([find, lost, ToolCall("fly", {})])
    assert found.content == json.dumps({"output": [person]}, separators=(",", ":"))
    assert failed.content == "error: there is no email_id '00000001'"
    assert other.content == "error: unknown tool fly"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"email_id": "00000057", "body": "Hi"}, "there is no email_id '00000057'.*workplace_data"),
        ({"email_id": made_tables()["emails"][0]["email_id"]}, "not given: body.*workplace_data"),
    ],
)
def test_rows_about_another_workplace_are_rejected(
    tmp_path: Path, arguments: dict[str, Any], reason: str
) -> None:
    (released, *_) = workplace()
    truth = [{"name": "email_reply_email", "arguments": json.dumps(arguments)}]
    path = file_of(tmp_path / "rows.jsonl", {**released.row, "ground_truth": truth})
    with pytest.raises(DataError, match=reason):
        list(ToolCalling().read(path))
    sent = {"recipient": "eva@elsewhere.example", "subject": "Hi", "body": "Hi"}
    truth = [{"name": "email_send_email", "arguments": json.dumps(sent)}]
    with pytest.raises(DataError, match=r"nobody has the address 'eva@.*workplace_data"):
        list(ToolCalling().read(file_of(path, {**released.row, "ground_truth": truth})))


def write_csv(folder: Path, tables: Tables, **columns: str) -> str:
    """Write tables in the published layout: processed/, and the directory without a header."""
    for name, (file, header) in FILES.items():
        place = folder / ("raw" if name == "directory" else "processed") / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shown = columns.get(name, ",".join(header))
        lines = [] if name == "directory" else [shown]
        lines += [",".join(str(row[c] or "") for c in header) for row in tables[name]]
        place.write_text("\n".join(lines) + "\n")
    return str(folder)


def small_tables() -> Tables:
    """Other content than the invented: the mails' comma-free bodies can be written plainly."""
    found = {name: [dict(row) for row in rows[:9]] for name, rows in made_tables().items()}
    for number, mail in enumerate(found["emails"], start=1):
        mail.update(email_id=f"{number:08}", body="Hello.", subject="Plan")
    return found


def test_files_of_a_workplace_decide(tmp_path: Path) -> None:
    domain = ToolCalling(ToolCallingConfig(write_csv(tmp_path / "csv_data", small_tables())))
    (released, *_) = workplace()
    calls = [
        {"name": "email_delete_email", "arguments": '{"email_id": "00000003"}'},
        {"name": "email_delete_email", "arguments": '{"email_id": "99999999"}'},
    ]
    row = {**released.row, "ground_truth": json.dumps(calls)}
    (prompt,) = domain.read(file_of(tmp_path / "rows.jsonl", row))
    for number, reward in (("00000003", 1.0), ("00000004", 0.0)):
        answer = called(("email_delete_email", {"email_id": number}))
        assert domain.score(prompt, answer).reward == reward


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("missing", r"holds 0 files emails\.csv, it must hold one"),
        ("twice", r"holds 2 files emails\.csv"),
        ("columns", r"calendar_events\.csv has columns \['event_id', 'x'\], they must be"),
        ("bytes", r"emails\.csv is not a CSV file in UTF-8"),
    ],
)
def test_files_that_are_not_a_workplace_are_rejected(
    tmp_path: Path, change: str, reason: str
) -> None:
    columns = {"calendar": "event_id,x"} if change == "columns" else {}
    folder = write_csv(tmp_path / "csv_data", small_tables(), **columns)
    emails = tmp_path / "csv_data" / "processed" / "emails.csv"
    if change == "missing":
        emails.unlink()
    elif change == "twice":
        (tmp_path / "csv_data" / "emails.csv").write_text("x\n")
    elif change == "bytes":
        emails.write_bytes(b"\xff\xfe\n")
    with pytest.raises(DataError, match=reason):
        ToolCalling(ToolCallingConfig(folder))


MAIL, TASK, CLIENT, EVENT = (
    made_tables()[table][1][key]
    for table, key in (
        ("emails", "email_id"),
        ("tasks", "task_id"),
        ("customers", "customer_id"),
        ("calendar", "event_id"),
    )
)
TEAM = made_tables()["tasks"][0]["assigned_to_email"]
CRM, PROJECT = "customer_relationship_manager", "project_management"
NEW_EVENT = {
    "event_name": "Talk",
    "participant_email": "A@b.c",
    "event_start": "2023-12-01 9:00",
    "duration": "30",
}
NEW_TASK = {
    "task_name": "Go",
    "assigned_to_email": TEAM.upper(),
    "list_name": "Backlog",
    "due_date": "2023-12-01",
    "board": "Design",
}
PLOT = {"time_min": "2023-11-01", "time_max": "2023-11-02", "value_to_plot": "visits_direct"}
CHANGES: list[tuple[str, dict[str, Any], str, dict[str, Any]]] = [
    ("email_send_email", {"recipient": "A@b.c", "subject": "S", "body": "B"}, "emails", {}),
    ("email_forward_email", {"email_id": MAIL, "recipient": "A@b.c"}, "emails", {}),
    ("email_reply_email", {"email_id": MAIL, "body": "B"}, "emails", {"inbox/outbox": "outbox"}),
    ("email_delete_email", {"email_id": MAIL}, "emails", {}),
    ("calendar_create_event", NEW_EVENT, "calendar", {"participant_email": "a@b.c"}),
    ("calendar_delete_event", {"event_id": EVENT}, "calendar", {}),
    (
        "calendar_update_event",
        {"event_id": EVENT, "field": "duration", "new_value": "45"},
        "calendar",
        {"duration": "45"},
    ),
    ("analytics_create_plot", {**PLOT, "plot_type": "bar"}, "plots", {}),
    (f"{PROJECT}_create_task", NEW_TASK, "tasks", {"assigned_to_email": TEAM}),
    (f"{PROJECT}_delete_task", {"task_id": TASK}, "tasks", {}),
    (
        f"{PROJECT}_update_task",
        {"task_id": TASK, "field": "board", "new_value": "Design"},
        "tasks",
        {"board": "Design"},
    ),
    (
        f"{CRM}_add_customer",
        {"customer_name": "N", "assigned_to_email": "A@b.c", "status": "Lead"},
        "customers",
        {"assigned_to_email": "a@b.c", "notes": "", "customer_phone": None},
    ),
    (
        f"{CRM}_update_customer",
        {"customer_id": CLIENT, "field": "notes", "new_value": "Called."},
        "customers",
        {"notes": "Called."},
    ),
    (f"{CRM}_delete_customer", {"customer_id": CLIENT}, "customers", {}),
]
READERS: list[tuple[str, dict[str, Any], str]] = [
    ("company_directory_find_email_address", {"name": "ada"}, "@"),
    ("email_get_email_information_by_id", {"email_id": MAIL, "field": "subject"}, "subject"),
    ("email_search_emails", {"query": "HELLO look", "date_max": "2023-11-20"}, "pagination"),
    ("calendar_get_event_information_by_id", {"event_id": EVENT, "field": "duration"}, "duration"),
    ("calendar_search_events", {"query": "demo", "time_min": "2023-10-05 10:00:00"}, "Demo"),
    ("analytics_get_visitor_information_by_id", {"visitor_id": "7001"}, "user_engaged"),
    ("analytics_engaged_users_count", {"time_min": "2023-11-01"}, "2023-11-"),
    ("analytics_traffic_source_count", {"traffic_source": "direct"}, "2023-"),
    ("analytics_total_visits_count", {"time_max": "2023-11-01"}, "2023-10-"),
    ("analytics_get_average_session_duration", {}, "2023-"),
    (f"{PROJECT}_get_task_information_by_id", {"task_id": TASK, "field": "board"}, "board"),
    (f"{PROJECT}_search_tasks", {"board": "design", "assigned_to_email": TEAM}, "Design"),
    (f"{CRM}_search_customers", {"status": "won", "page": "9", "page_size": "2"}, "pagination"),
]


def test_every_tool_of_the_workplace_is_tried() -> None:
    names = {tool.name for tool in Workplace.tools()}
    assert names == {c[0] for c in CHANGES} | {r[0] for r in READERS}
    assert len(names) == 27
    (released, *_) = workplace()
    assert len(released.row["responses_create_params"]["tools"]) == 27


@pytest.mark.parametrize(("tool", "arguments", "table", "fields"), CHANGES)
def test_a_workplace_tool_that_changes(
    tool: str, arguments: dict[str, Any], table: str, fields: dict[str, Any]
) -> None:
    one, other = Workplace(made_tables()), Workplace(made_tables())
    one.call(tool, arguments)
    assert one.differences(other) == [table]
    rows = one.tables[table].records()
    assert not fields or any(fields.items() <= dict(row).items() for row in rows)
    other.call(tool, arguments)
    assert one.differences(other) == []


@pytest.mark.parametrize(("tool", "arguments", "shown"), READERS)
def test_a_workplace_tool_that_reads(tool: str, arguments: dict[str, Any], shown: str) -> None:
    one, other = Workplace(made_tables()), Workplace(made_tables())
    assert shown in one.call(tool, arguments)
    assert one.differences(other) == []


@pytest.mark.parametrize(
    ("tool", "change"),
    [
        ("email_send_email", {"recipient": "nobody"}),
        ("email_send_email", {"body": ""}),
        ("email_forward_email", {"email_id": "1"}),
        ("calendar_create_event", {"event_start": "soon"}),
        ("calendar_create_event", {"duration": "-5"}),
        ("calendar_create_event", {"color": "red"}),
        ("calendar_delete_event", {"event_id": "1"}),
        ("calendar_update_event", {"field": "event_id"}),
        ("analytics_create_plot", {"plot_type": "pie"}),
        (f"{PROJECT}_create_task", {"assigned_to_email": "a@b.c"}),
        (f"{PROJECT}_update_task", {"new_value": "design"}),
        (f"{CRM}_update_customer", {"field": "status", "new_value": "won"}),
        (f"{CRM}_update_customer", {"field": "colour"}),
        (f"{CRM}_update_customer", {"new_value": ["x"]}),
        (f"{CRM}_search_customers", {"page_size": 0}),
        (f"{CRM}_search_customers", {"page": "one"}),
        ("email_search_emails", {"query": "zebra"}),
    ],
)
def test_a_workplace_call_that_cannot_be_executed_changes_nothing(
    tool: str, change: dict[str, Any]
) -> None:
    given = {c[0]: c[1] for c in CHANGES} | {r[0]: r[1] for r in READERS}
    one = Workplace(made_tables())
    with pytest.raises(CallError):
        one.call(tool, {**given[tool], **change})
    assert one.differences(Workplace(made_tables())) == []


SEND = ("email_send_email", {"recipient": "a@b.c", "subject": "S", "body": "B"})
REPLY = ("email_reply_email", {"email_id": MAIL, "body": "B"})
GONE = ("email_delete_email", {"email_id": MAIL})
MOVE = ("calendar_update_event", {"event_id": EVENT, "field": "event_name", "new_value": "Talk"})
LEFT = ("calendar_delete_event", {"event_id": EVENT})
TALK = ("calendar_create_event", NEW_EVENT)
WON = (f"{CRM}_update_customer", {"customer_id": CLIENT, "field": "notes", "new_value": "X"})
WHOSE = (f"{CRM}_add_customer", {"customer_name": "N", "assigned_to_email": "a@b.c"})
ADDED = (WHOSE[0], {**WHOSE[1], "status": "Lead"})


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        # Independent tables: the order does not matter. New rows of one table: it does.
        ([SEND, MOVE], [MOVE, SEND], True),
        ([SEND, REPLY], [REPLY, SEND], False),
        ([SEND, SEND], [SEND], False),
        # A new mail numbers the rows anew, so that a deletion before it leaves no gap.
        ([GONE, SEND], [SEND, GONE], False),
        # A new event gets the label 0, and the other labels stay.
        ([LEFT, TALK], [TALK, LEFT], True),
        ([MOVE, WON], [(MOVE[0], {**MOVE[1], "new_value": "TALK"}), WON], True),
        ([ADDED], [(ADDED[0], {**ADDED[1], "status": "LEAD"})], False),
        ([ADDED], [(ADDED[0], {**ADDED[1], "customer_name": "n"})], True),
        ([ADDED], [(ADDED[0], {**ADDED[1], "notes": None})], False),
        # A number is not text, and counts as missing.
        ([(WON[0], {**WON[1], "new_value": 3})], [(WON[0], {**WON[1], "new_value": 4})], True),
        ([(WON[0], {**WON[1], "new_value": 3})], [(WON[0], {**WON[1], "new_value": "3"})], False),
    ],
)
def test_end_states_are_compared_as_published(
    one: list[tuple[str, Any]], other: list[tuple[str, Any]], same: bool
) -> None:
    ends = []
    for calls in (one, other):
        ends.append(Workplace(made_tables()))
        for name, arguments in calls:
            ends[-1].call(name, arguments)
    assert (not ends[0].differences(ends[1])) == same


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("12", {"type": "integer"}, 12),
        ("12", {"type": "string"}, "12"),
        ("12", {"type": ["string", "null"]}, "12"),
        ("null", {"type": ["string", "null"]}, None),
        ("None", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("True", {"type": "boolean"}, True),
        ("{'a': (1, 2)}", {"type": "object"}, {"a": [1, 2]}),
        ("5", {"type": "number"}, 5),
        ("5.0", {"type": "integer"}, 5.0),
        ("[1]", {"$ref": "#/x"}, [1]),
        ("1", {"enum": ["1"]}, "1"),
        ("NaN", {"type": "number"}, "NaN"),
        ("{1}", {}, "{1}"),
        ("soon", {"type": "integer"}, "soon"),
        ("[1]", {"type": "object"}, [1]),
        ("[1]", {"type": ["string", "integer"]}, "[1]"),
        ("1", {"type": 3, "enum": 4, "anyOf": 5}, 1),
        (7, {"type": "string"}, 7),
    ],
)
def test_texts_of_a_call_become_values(text: Any, schema: Any, value: Any) -> None:
    found = typed(text, schema)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"response_mode": "audio"}, "response_mode 'audio' must be text or tool_call"),
        ({"tool_name": "nobody"}, r"tool_name\('nobody'\) is not one of the declared tools"),
        ({"schema_str": "[]"}, "a schema must be an object"),
        ({"tool_payload_key": {"a": 1}}, "tool_payload_key must be a text, it is dict"),
    ],
)
def test_rows_of_calls_that_cannot_be_verified(
    environments: dict[str, Domain], tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    released: Released = FORMS["structured_outputs, tool_call"][1][0]
    path = file_of(tmp_path / "rows.jsonl", {**released.row, **change})
    with pytest.raises(DataError, match=reason):
        list(environments["structured_output"].read(path))


def test_any_declared_tool_may_answer_a_row_that_names_none(
    environments: dict[str, Domain], tmp_path: Path
) -> None:
    domain, released = (
        environments["structured_output"],
        FORMS["structured_outputs, tool_call"][1][0],
    )
    path = file_of(tmp_path / "rows.jsonl", {**released.row, "tool_name": None})
    (prompt,) = domain.read(path)
    (asked,) = released.right
    (call,) = asked.tool_calls
    other = replace(asked, tool_calls=(replace(call, name="response_tool_9"),))
    assert domain.score(prompt, [other]).reward == 1.0
    unknown = replace(asked, tool_calls=(replace(call, name="fly"),))
    verdict = domain.score(prompt, [unknown])
    assert verdict.reward == 0.0
    assert re.search(r"a call of fly, it must be of", str(verdict.details["problem"]))
