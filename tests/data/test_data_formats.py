"""Parsing of each row format to a conversation, and errors with their reasons."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nemocascade.data.chat_template import Conversation
from nemocascade.data.formats import Format, detect_format, parse_row
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.row_errors import RowError
from nemocascade.types import Message, Tool, ToolCall

CONFIG = DataConfig()
USER = {"role": "user", "content": "Hi"}
HUMAN = {"from": "human", "value": "Hi"}
REPLY: dict[str, Any] = {"role": "assistant", "content": "Hello"}


def _parse(row: Any, fmt: Format = "messages", config: DataConfig = CONFIG) -> Conversation:
    return parse_row(row, fmt, config)


def _assistant(turn: dict[str, Any], fmt: Format = "messages") -> Message:
    return _parse({"messages": [USER, {"role": "assistant", **turn}]}, fmt).messages[1]


def test_question_and_answer_fields() -> None:
    config = DataConfig(question_field="q", answer_field="a", system_field="s")
    row = {"q": "1+1?", "a": "2", "s": "Be brief.", "id": 7}
    assert _parse(row, "qa", config).messages == (
        Message("system", "Be brief."),
        Message("user", "1+1?"),
        Message("assistant", "2"),
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": "q"}, "no field 'answer'"),
        ({"question": "q", "answer": 3}, "'answer' must be a string, it is int"),
        ({"question": " ", "answer": "a"}, "'question' is empty"),
        (["question"], "a row must be an object, this is list"),
    ],
)
def test_bad_question_rows(row: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        _parse(row, "qa")


def test_content_may_be_parts_and_fields_may_be_null() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"text": "c"}]
    turn = {"content": parts, "reasoning_content": None, "tool_calls": None, "weight": None}
    assert _assistant(turn) == Message("assistant", "abc")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_reasoning_fields(field: str) -> None:
    found = _assistant({"content": "4", field: "\n2+2\n"})
    assert found == Message("assistant", "4", reasoning="2+2")


def test_reasoning_in_the_text() -> None:
    found = _assistant({"content": "<think>\n2+2\nis 4\n</think>\n\n4"})
    assert found == Message("assistant", "4", reasoning="2+2\nis 4")
    later = "No tag at the start: <think>x</think>"
    assert _assistant({"content": later}) == Message("assistant", later)
    assert _assistant({"content": "<think></think>4"}) == Message("assistant", "4")


def test_tool_calls_with_arguments_as_text_or_object() -> None:
    for arguments in ({"b": 1, "a": ["x"]}, '{"b": 1, "a": ["x"]}'):
        function = {"name": "f", "arguments": arguments}
        calls = [{"id": "1", "type": "function", "function": function}, {"name": "g"}]
        for form in (calls, json.dumps(calls)):
            found = _assistant({"content": None, "tool_calls": form}).tool_calls
            assert found == (ToolCall("f", {"b": 1, "a": ["x"]}), ToolCall("g", {}))
            assert list(found[0].arguments) == ["b", "a"]


def test_tools_in_their_forms() -> None:
    schema = {"type": "object", "properties": {"x": {"type": "string"}}}
    function = {"name": "f", "description": "does", "parameters": schema}
    for tools in ([{"type": "function", "function": function}], [function], json.dumps([function])):
        row = {"messages": [USER, REPLY], "tools": tools}
        assert _parse(row).tools == (Tool("f", "does", schema),)
    assert _parse({"messages": [USER, REPLY], "tools": None}).tools == ()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": "\\ud83d"}', "half a surrogate pair"),
        ('{"\\ud83d": 1}', "half a surrogate pair"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested deeper than 128"),
        ('{"a": ' + "[" * 100_000, "nested deeper than 128"),
        ('{"a": NaN}', "the value NaN is not JSON"),
        ('{"a": -Infinity}', "the value -Infinity is not JSON"),
        ('{"a": 1e999}', "beyond float64"),
        ('{"a": ' + "9" * 100_000 + "}", "not JSON .Exceeds the limit"),
        ('{"a": 1, "a": 2}', "the key 'a' occurs twice"),
    ],
)
def test_json_in_texts_is_as_strict_as_rows(text: str, reason: str) -> None:
    """In arguments, calls, tools and schemas, whose values are rendered into the document."""
    calls = [{"name": "f", "arguments": text}]
    function = [{"name": "f", "parameters": text}]
    nested = f'[{{"name": "f", "arguments": {text}}}]'
    for row in (
        {"messages": [USER, {**REPLY, "tool_calls": calls}]},
        {"messages": [USER, {**REPLY, "tool_calls": nested}]},
        {"messages": [USER, REPLY], "tools": function},
        {"messages": [USER, REPLY], "tools": nested.replace("arguments", "parameters")},
        {"conversations": [HUMAN, {"from": "function_call", "value": nested}]},
    ):
        with pytest.raises(RowError, match=reason):
            _parse(row, "sharegpt" if "conversations" in row else "messages")


def test_sharegpt_turns() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    row = {
        "system": "Be brief.",
        "conversations": [
            HUMAN,
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "2"},
            {"from": "gpt", "value": "<think>so</think>Two.", "weight": 1},
        ],
        "tools": json.dumps([{"name": "f", "parameters": {}}]),
    }
    wanted = (
        Message("system", "Be brief."),
        Message("user", "Hi"),
        Message("assistant", "", tool_calls=(ToolCall("f", {"x": 1}),)),
        Message("tool", "2"),
        Message("assistant", "Two.", "so"),
    )
    assert detect_format(row, CONFIG) == "sharegpt"
    assert _parse(row, "sharegpt") == Conversation(wanted, (Tool("f", "", {}),))
    text = {**row, "conversations": json.dumps(row["conversations"])}
    assert _parse(text, "sharegpt").messages == wanted
    named = {"conversations": [USER, {"from": "gpt", "value": "Hello"}]}
    assert _parse(named, "sharegpt").messages == (Message("user", "Hi"), Message(**REPLY))
    for said, reason in (("bot", "unknown role 'bot'"), ([], "unknown role"), (None, "role None")):
        with pytest.raises(RowError, match=rf"message 0: .*{reason}"):
            _parse({"conversations": [{"from": said, "value": "x"}]}, "sharegpt")


def test_messages_may_be_text_and_a_developer_is_the_system() -> None:
    turns = [{"role": "developer", "content": "Be brief."}, USER, REPLY]
    wanted = (Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello"))
    for form in (turns, json.dumps(turns)):
        assert detect_format({"messages": form}, CONFIG) == "messages"
        assert _parse({"messages": form}).messages == wanted


def test_weight_zero_keeps_a_turn_out_of_the_loss() -> None:
    assert _assistant({"content": "a", "weight": 1}).trained
    row = {"messages": [USER, {**REPLY, "weight": 0}, USER, REPLY]}
    assert [m.trained for m in _parse(row).messages if m.role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "no messages"),
        ("Hi", "'messages': not JSON"),
        ('{"role": "user"}', "'messages' must be a list, it is dict"),
        ([USER], "no assistant turn"),
        ([USER, {**REPLY, "weight": 0}], "no assistant turn to train on"),
        ([USER, {"role": "bot", "content": "x"}], "message 1: unknown role 'bot'"),
        ([USER, "Hello"], "message 1 must be an object, it is str"),
        ([USER, {"role": "assistant", "content": ""}], "message 1: the assistant turn is empty"),
        ([{"role": "user", "content": ""}, REPLY], "message 0: the user turn is empty"),
        ([USER, REPLY, {"role": "system", "content": "x"}], "message 2: a system turn must come"),
        ([{"role": "tool", "content": "x"}, REPLY], "message 0: a tool's result must follow"),
        ([USER, {"role": "assistant", "content": 3}], "content must be text or a list"),
        ([USER, {"role": "assistant", "content": [{"type": "image"}]}], "type 'image'"),
        ([USER, {**REPLY, "reasoning": 1}], "reasoning must be a string"),
        ([USER, {**REPLY, "weight": 0.5}], "weight must be 0 or 1"),
        ([USER, {**REPLY, "tool_calls": [{}]}], "a tool call has no name"),
        ([USER, {**REPLY, "tool_calls": {}}], "tool_calls must be a list"),
        (
            [USER, {**REPLY, "tool_calls": [{"name": "f", "arguments": "{"}]}],
            "arguments of f: not JSON",
        ),
        (
            [USER, {**REPLY, "tool_calls": [{"name": "f", "arguments": [1]}]}],
            "arguments of f must be an object",
        ),
    ],
)
def test_bad_chat_rows(messages: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        _parse({"messages": messages})


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ({}, "tools must be a list"),
        ("[", "tools: not JSON"),
        ([{}], r"tools\[0\] has no name"),
        ([{"name": "f", "parameters": [1]}], "must be a JSON schema"),
    ],
)
def test_bad_tools(tools: Any, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        _parse({"messages": [USER, REPLY], "tools": tools})


CALL = (
    "<tool_call>\n<function=run>\n<parameter=code>\nx = 1\nx\n</parameter>\n"
    "</function>\n</tool_call>"
)


def test_released_rows_with_all_written_in_the_text() -> None:
    row = {
        "domain": "math_tool",
        "generator": "a model",
        "messages": [
            {"role": "system", "content": "# Tools\n<tools>..</tools>"},
            {"role": "user", "content": "Compute."},
            {
                "role": "assistant",
                "content": f"<think>\nrun it\n</think>\nRunning.\n{CALL}\n{CALL}",
            },
            {"role": "user", "content": "<tool_response>\n1\n</tool_response>\n"},
            {"role": "assistant", "content": f"<think>again</think>\n{CALL}"},
            {
                "role": "tool",
                "content": "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n"
                "<tool_response>\n\n</tool_response>\n",
            },
            {"role": "assistant", "content": "<think>done</think>\n\\boxed{1}"},
        ],
    }
    call = ToolCall("run", {"code": "x = 1\nx"})
    assert detect_format(row, CONFIG) == "nemotron"
    assert _parse(row, "nemotron").messages == (
        Message("system", "# Tools\n<tools>..</tools>"),
        Message("user", "Compute."),
        Message("assistant", "Running.", "run it", (call, call)),
        Message("tool", "1"),
        Message("assistant", "", "again", (call,)),
        Message("tool", "1"),
        Message("tool", ""),
        Message("assistant", "\\boxed{1}", "done"),
    )


@pytest.mark.parametrize(
    "text",
    [
        f"{CALL} and then text",
        "<tool_call>\n<function=run>\n</tool_call>",
        "Write <tool_call> to call.",
        CALL.replace("</parameter>", ""),
    ],
)
def test_text_that_is_no_call_stays_text(text: str) -> None:
    assert _assistant({"content": text}, "nemotron") == Message("assistant", text)


def test_a_mention_before_a_call_stays_text() -> None:
    found = _assistant({"content": f"I use <tool_call> now.\n{CALL}"}, "nemotron")
    assert found.content == "I use <tool_call> now."
    assert len(found.tool_calls) == 1


def test_the_parser_of_calls_is_linear() -> None:
    text = "<tool_call>\n<function=f>\n" + "<parameter=p>\nv\n</parameter>\n" * 20_000
    assert _assistant({"content": text}, "nemotron").tool_calls == ()


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [USER, REPLY]}, "messages"),
        ({"messages": [USER, REPLY], "generator": "m"}, "nemotron"),
        ({"messages": [USER, {"role": "assistant", "content": "<think>a</think>b"}]}, "nemotron"),
        ({"question": "q", "answer": "a"}, "qa"),
    ],
)
def test_format_is_found_by_the_first_row(row: Any, expected: str) -> None:
    assert detect_format(row, CONFIG) == expected


def test_an_unknown_format_names_the_fields() -> None:
    with pytest.raises(RowError, match=r"\['prompt', 'reply'\].*data.question_field"):
        detect_format({"prompt": "a", "reply": "b"}, CONFIG)
