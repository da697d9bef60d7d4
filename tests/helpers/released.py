"""Five rows of each form that NeMo Gym publishes, with invented content, and answers to them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemocascade.envs.workplace import Workplace
from nemocascade.envs.workplace.invented import made_tables
from nemocascade.types import Message, ToolCall


@dataclass(frozen=True)
class Released:
    """A row, a right answer, and a wrong one."""

    row: dict[str, Any]
    right: tuple[Message, ...]
    wrong: tuple[Message, ...]


def said(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text, "I think."),)


def called(*calls: tuple[str, Mapping[str, Any]], done: bool = True) -> tuple[Message, ...]:
    """An answer with one call a turn, all arguments as text, as a template's calls have them."""
    turns: list[Message] = []
    for name, arguments in calls:
        given = {k: v if isinstance(v, str) else json.dumps(v) for k, v in arguments.items()}
        turns.append(Message("assistant", "", "I call.", (ToolCall(name, given),)))
        turns += [Message("tool", "{}")] if done else []
    return (*turns, Message("assistant", "Done.", "All is done.")) if done else tuple(turns)


def row(ask: str, system: str = "", params: Mapping[str, Any] | None = None, **fields: Any) -> Any:
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": ask})
    agent = {"type": "responses_api_agents", "name": "simple_agent"}
    params = {"input": turns, **(params or {})}
    return {"responses_create_params": params, "agent_ref": agent, **fields}


def workplace(declared: int = 27) -> list[Released]:
    """Rows of workplace_assistant. declared: number of tools that each declares."""
    tables = made_tables()
    mails = [m for m in tables["emails"] if m["inbox/outbox"] == "inbox"]
    mail = max(mails, key=lambda m: m["sent_datetime"])
    event = tables["calendar"][4]
    won = [c for c in tables["customers"] if c["status"] == "Won"][:3]
    person, colleague = (r["email_address"] for r in tables["directory"][:2])
    crm = "customer_relationship_manager"
    update, delete = f"{crm}_update_customer", f"{crm}_delete_customer"
    find, search = "company_directory_find_email_address", "email_search_emails"
    reply = ("email_reply_email", {"email_id": mail["email_id"], "body": "I will look."})
    rename = {"event_id": event["event_id"], "field": "event_name", "new_value": "Risk Forum"}
    task = {
        "task_name": "Repair the price list",
        "assigned_to_email": tables["tasks"][0]["assigned_to_email"],
        "list_name": "Backlog",
        "due_date": "2023-12-07",
        "board": "Front end",
    }
    plot = {"time_min": "2023-11-01", "time_max": "2023-11-30", "value_to_plot": "total_visits"}
    plot["plot_type"] = "bar"
    moved = [
        (update, {"customer_id": c["customer_id"], "field": "assigned_to_email", "new_value": a})
        for c, a in zip(won, (person, person, person), strict=True)
    ]
    gone = [(delete, {"customer_id": c["customer_id"]}) for c in won[:2]]
    made = [
        (
            f"Answer {mail['sender/recipient'].split('.')[0]}'s last mail with 'I will look.'",
            "email",
            [reply],
            [(search, {"query": mail["subject"], "page": 1}), (reply[0], {**reply[1]})],
            [(reply[0], {**reply[1], "body": "I look."})],
        ),
        (
            f"Call the event {event['event_id']} Risk Forum.",
            "calendar",
            [("calendar_update_event", rename)],
            [("calendar_update_event", {**rename, "new_value": "RISK forum"})],
            [("calendar_update_event", {**rename, "field": "duration"})],
        ),
        (f"Ada takes over {len(moved)} customers.", crm, moved, moved[::-1], moved[:2]),
        (
            "Delete the first two customers that we won.",
            crm,
            gone,
            [*gone, (delete, {"customer_id": "00000009"})],
            [*gone, (delete, {"customer_id": won[2]["customer_id"]})],
        ),
        (
            f"Add a task, plot November's visits, and write to {colleague}.",
            "multi",
            [
                ("project_management_create_task", task),
                ("analytics_create_plot", plot),
                ("email_send_email", {"recipient": colleague, "subject": "Plot", "body": "Done"}),
            ],
            [
                ("analytics_create_plot", plot),
                ("email_send_email", {"recipient": colleague, "subject": "plot", "body": "done"}),
                (find, {"name": "bruno"}),
                ("project_management_create_task", task),
            ],
            [
                ("project_management_create_task", {**task, "board": "Design"}),
                ("analytics_create_plot", plot),
                ("email_send_email", {"recipient": colleague, "subject": "Plot", "body": "Done"}),
            ],
        ),
    ]
    tools = [
        {
            "type": "function",
            "name": t.name,
            "description": t.description,
            "parameters": {**t.parameters, "additionalProperties": False},
            "strict": False,
        }
        for t in Workplace.tools()[:declared]
    ]
    system = "Today's date is Thursday, 2023-11-30 and the current time is 23:59:00."
    return [
        Released(
            row(
                ask,
                system,
                {"tools": tools, "parallel_tool_calls": False, "temperature": 1.0},
                id=number,
                ground_truth=[{"name": n, "arguments": json.dumps(a)} for n, a in truth],
                category=f"workplace_assistant_{category}",
                environment_name="workplace_assistant",
            ),
            called(*right),
            called(*wrong),
        )
        for number, (ask, category, truth, right, wrong) in enumerate(made)
    ]


SCHEMA: dict[str, Any] = {
    "type": "object",
    "additionalProperties": False,
    "required": ["name", "year"],
    "properties": {
        "name": {"type": "string"},
        "year": {"type": ["integer", "null"]},
        "open": {"type": "boolean"},
        "code": {"type": ["string", "null"]},
        "at": {
            "type": "object",
            "properties": {"lat": {"type": "number"}},
            "required": ["lat"],
        },
    },
}
VALUE: dict[str, Any] = {"name": "Mill", "year": 1907, "open": True, "code": "12", "at": {"lat": 5}}
VALUES: dict[str, Any] = {"type": "array", "items": SCHEMA}


def structured_text() -> list[Released]:
    """Rows of structured_outputs whose answers are texts."""
    pairs = [
        (json.dumps(VALUE), json.dumps({**VALUE, "more": 1})),
        (json.dumps({**VALUE, "year": None}), json.dumps({**VALUE, "year": "1907"})),
        (json.dumps(VALUE, indent=2), f"```json\n{json.dumps(VALUE)}\n```"),
        (f" {json.dumps(VALUE)}\n", json.dumps({k: v for k, v in VALUE.items() if k != "open"})),
        (json.dumps([VALUE, VALUE]), json.dumps(VALUE)),
    ]
    return [
        Released(
            row(
                "Extract the mill as JSON.",
                schema_str=json.dumps(VALUES if number == 4 else SCHEMA),
                schema_type="json",
                schema_fields_count="5",
            ),
            said(right),
            said(wrong),
        )
        for number, (right, wrong) in enumerate(pairs)
    ]


def structured_call() -> list[Released]:
    """Rows of structured_outputs whose answers are calls, with the layouts of the tools."""
    direct = {**SCHEMA, "required": list(VALUE)}
    other: dict[str, Any] = {"type": "object", "properties": {"x": {"type": "string"}}}
    wrapped = {"type": "object", "properties": {"extraction": SCHEMA}, "required": ["extraction"]}
    several = {"type": "object", "properties": {"data": other, "extraction": VALUES}}
    layouts: list[tuple[str, dict[str, Any], str | None, dict[str, Any], Any]] = [
        ("extraction_wrapper", wrapped, "extraction", SCHEMA, VALUE),
        ("multi_key_object", several, "extraction", VALUES, [VALUE]),
        ("direct", direct, None, SCHEMA, VALUE),
        (
            "random_wrapper",
            {"type": "object", "properties": {"result": {}}},
            "result",
            SCHEMA,
            VALUE,
        ),
        ("extraction_wrapper", several, "extraction", VALUES, [VALUE, VALUE]),
    ]
    made = []
    for number, (mode, declared, key, schema, value) in enumerate(layouts):
        name = f"response_tool_{number}"
        given = {key: value} if key else value
        turns = called((name, given), done=False)
        wrongs = [
            said(json.dumps(value)),
            turns + turns,
            called((name, {**VALUE, "year": "soon"}), done=False),
            called(("response_tool_9", given), done=False),
            called((name, {"extraction": VALUE}), done=False),
        ]
        tools = [
            {"type": "function", "name": n, "description": "Submit.", "parameters": p}
            for n, p in ((name, declared), ("response_tool_9", wrapped))
        ]
        made.append(
            Released(
                row(
                    "Fill the function.",
                    params={"tools": tools, "tool_choice": "auto", "parallel_tool_calls": True},
                    schema_str=json.dumps(schema),
                    schema_type="json",
                    response_mode="tool_call",
                    problem_type="direct_tool_call",
                    tool_name=name,
                    tool_schema_mode=mode,
                    tool_payload_key=key,
                    tool_choice="auto",
                    parallel_tool_calls=number % 2 == 0,
                    schema_repr="tool",
                    source_format="xml",
                    source_schema_type="xml",
                    tool_name_style="numbered",
                    distractor_style="numbered_tools",
                    tool_union_mode=None,
                    num_turns=1,
                    num_tools=2,
                    num_distractors=1,
                    has_distractors=True,
                    instruction_layout="compact_user_message",
                    instruction_detail_level="concise",
                    system_instruction_style="none",
                    source_record_id=f"r-{number}",
                ),
                turns,
                wrongs[number],
            )
        )
    return made


def mcqa() -> list[Released]:
    """Rows of mcqa; the last has a pattern of its own."""
    options = [{"A": "a lake"}, {"B": "a hill"}, {"C": "a port"}]
    template: dict[str, Any] = {"template_metadata": {"output_regex": r"Answer:\s*([A-C])"}}
    rights = [r"\boxed{B}", r"I say \boxed{ B }.", r"\boxed{A} no, \boxed{B}", r"\boxed{\text{B}}"]
    return [
        Released(
            row(
                "Which is high?\nA: a lake\nB: a hill\nC: a port",
                options=options,
                expected_answer="B",
                grading_mode="strict_single_letter_boxed",
                uuid=f"u-{number}",
                **(template if number == 4 else {}),
            ),
            said(right),
            said(right.replace("B", "C")),
        )
        for number, right in enumerate([*rights, "Answer: B"])
    ]


def math() -> list[Released]:
    """Rows of math_with_judge."""
    made = [
        ("32", "32", "31"),
        (r"\(\frac{3}{7}\)", r"\frac{3}{7}", r"\frac{7}{3}"),
        (r"\(\sqrt{2}\)", r"\sqrt2", "2"),
        ("-3", "-3", "3"),
        (r"\(\frac{1+\sqrt{5}}{2}\)", r"\frac{\sqrt{5}+1}{2}", r"\frac{\sqrt{5}-1}{2}"),
    ]
    return [
        Released(
            row("Solve it, with the answer inside \\boxed{}.", question="It.", expected_answer=e),
            said(f"So \\boxed{{{right}}}."),
            said(f"So \\boxed{{{wrong}}}."),
        )
        for e, right, wrong in made
    ]


def code() -> list[Released]:
    """Rows of code_gen; one calls a function, and one has its tests as JSON text."""
    double = {"inputs": ["4\n", "7\n"], "outputs": ["8\n", "14\n"], "fn_name": None}
    call = {"inputs": ["[1, 2]", "[]"], "outputs": ["3", "0"], "fn_name": "total"}
    script = "```python\nprint(int(input()) * 2)\n```"
    total = "```python\ndef total(xs):\n    return sum(xs)\n```"
    made = [
        ({"unit_tests": double}, script),
        ({"unit_tests": json.dumps(double)}, script),
        ({"unit_tests": call, "difficulty": "easy"}, total),
        ({"unit_tests": {**double, "outputs": ["8", "14"]}}, script),
        ({"unit_tests": {"inputs": ["1 2\n"], "outputs": ["2 4"]}}, "```python\nprint(2, 4)\n```"),
    ]
    return [
        Released(
            row(
                "Use python only.",
                verifier_metadata=metadata,
                hash_id=f"h-{number}",
                dataset="made",
                source="made",
            ),
            said(right),
            said(right.replace("* 2", "* 3").replace("sum(xs)", "len(xs)").replace("2, 4", "4, 2")),
        )
        for number, (metadata, right) in enumerate(made)
    ]


def instructions() -> list[Released]:
    """Rows of instruction_following, with the arguments of other kinds as null."""
    made: list[tuple[list[str], list[dict[str, Any] | None], str, str]] = [
        (["punctuation:no_comma"], [{"keywords": None}], "a cat", "a cat, a dog"),
        (["keywords:existence"], [{"keywords": ["owl"]}], "an owl", "a cat"),
        (
            ["keywords:forbidden_words", "detectable_format:title"],
            [{"forbidden_words": ["part"]}, None],
            "<<Owls>> fly",
            "Owls fly",
        ),
        (
            ["length_constraints:number_words"],
            [{"num_words": 3, "relation": "less than"}],
            "two words",
            "these are four words",
        ),
        (
            ["detectable_content:number_placeholders", "length_constraints:number_sentences"],
            [{"num_placeholders": 1}, {"num_sentences": 2, "relation": "at least"}],
            "Go to [place]. Then rest.",
            "Go to [place].",
        ),
    ]
    return [
        Released(
            row(
                "Write.",
                params={"tools": [], "parallel_tool_calls": False},
                id=number,
                instruction_id_list=kinds,
                prompt="Write.",
                kwargs=arguments,
            ),
            said(right),
            said(wrong),
        )
        for number, (kinds, arguments, right, wrong) in enumerate(made)
    ]


def long_context() -> list[Released]:
    """Rows with documents in the prompt and a reference in `ground_truth`."""
    places = ("the lake", "Port 7", "3.5", "hill", "the old mill")
    return [
        Released(
            row(
                f"1. Fay is at {place}.\n2. Gus is at home.\nWhere is Fay?",
                ground_truth=place,
                metadata={"documents": 2},
            ),
            said(f"She is there.\nAnswer: {place.upper()}"),
            said("Answer: home"),
        )
        for place in places
    ]


def preference() -> list[Released]:
    """Rows of genrm_compare: only turns. The first answer wins where the judge prefers it."""
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello, what now?"},
        {"role": "user", "content": "Name a bird."},
    ]
    made = [row("Name a bird.", params={"tools": []}, dataset="made") for _ in range(5)]
    made[0]["responses_create_params"]["input"] = turns
    return [Released(r, said("An owl."), said("No.")) for r in made]


def swe_agentless() -> list[Released]:
    """Rows with the repository inside; the answer is an edit."""
    made = []
    for number in range(2, 7):
        source = f"def times(x):\n    return x * {number + 1}\n"
        test = (
            "import unittest\n\nfrom f import times\n\n\nclass TestTimes(unittest.TestCase):\n"
            f"    def test_times(self):\n        self.assertEqual(times(3), {3 * number})\n"
        )
        edit = (
            "### f.py\n<<<<<<< SEARCH\n    return x * {0}\n=======\n    return x * {1}\n"
            ">>>>>>> REPLACE"
        )
        made.append(
            Released(
                row(
                    "Repair it.",
                    instance_id=f"made__f-{number}",
                    problem_statement=f"times must give {number} times x.",
                    files={"f.py": source},
                    golden_files=["f.py"],
                    tests={
                        "files": {"tests/test_f.py": test},
                        "FAIL_TO_PASS": ["tests.test_f.TestTimes.test_times"],
                    },
                ),
                said(edit.format(number + 1, number)),
                said(edit.format(number + 1, number + 2)),
            )
        )
    return made


FORMS: Mapping[str, tuple[str, Sequence[Released]]] = {
    "workplace_assistant": ("tool_calling", workplace()),
    "structured_outputs, text": ("structured_output", structured_text()),
    "structured_outputs, tool_call": ("structured_output", structured_call()),
    "mcqa": ("multiple_choice", mcqa()),
    "math_with_judge": ("math", math()),
    "code_gen": ("code", code()),
    "instruction_following": ("instruction_following", instructions()),
    "long_context": ("long_context", long_context()),
    "genrm_compare": ("preference", preference()),
    "swe_agentless": ("swe_agentless", swe_agentless()),
}
"""Domain and rows of each form."""
