"""Parsing of an assistant's reply: the inverse of the chat template, and malformed text."""

from __future__ import annotations

import pytest
from helpers.data import own_template, text_of

from nemocascade.data.chat_template import Conversation
from nemocascade.types import Message, ToolCall

USER = Message("user", "go")
parse = own_template().parse
MESSAGES = [
    Message("assistant", "plain"),
    Message("assistant", "two\n\nlines", "first this\nthen that"),
    Message("assistant", "", "why", (ToolCall("add", {"a": "1", "b": "two\nlines"}),)),
    Message("assistant", "see:", "", (ToolCall("f", {}), ToolCall("g", {"x": "<b>"}))),
]


@pytest.mark.parametrize("message", MESSAGES)
def test_it_inverts_the_template(message: Message) -> None:
    """From the generation prompt to the end of the turn."""
    text = text_of(own_template().render(Conversation((USER, message)), thinking=True))
    opening = "<think>\n" if message.reasoning else "<think></think>"
    written = text.rpartition(f"<|im_start|>assistant\n{opening}")[2]
    reply = parse(written, thinking=bool(message.reasoning))
    assert reply.message == message
    assert reply.faults == ()


def test_reasoning_that_never_ends_has_no_answer() -> None:
    reply = parse("so then \\boxed{4} and", thinking=True)
    assert reply.message == Message("assistant", "", "so then \\boxed{4} and")
    assert parse("a</think>", thinking=True).message.content == ""


CALL = "<tool_call>\n<function=f>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<tool_call>\n</tool_call>", "a call must be"),
        ("<tool_call>\nf(1)\n</tool_call>", "a call must be"),
        ('<tool_call>{"name": "f"}</tool_call>', "a call must be"),
        (CALL.removesuffix("</tool_call>"), "not closed"),
        (CALL.replace("</parameter>", ""), "f: a parameter must be"),
        (CALL.replace("<parameter=x>", "<parameter=x>\n1\n</parameter>\n<parameter=x>"), "twice"),
    ],
)
def test_malformed_calls_are_faults(text: str, fault: str) -> None:
    """They are not executed, stay in the content, and raise nothing."""
    reply = parse(f"look {text}<|im_end|>\n", thinking=False)
    assert reply.message.tool_calls == ()
    assert reply.message.content.startswith("look <tool_call>")
    assert len(reply.faults) == 1
    assert fault in reply.faults[0]


def test_a_right_call_beside_a_wrong_one_is_kept() -> None:
    reply = parse(f"{CALL}\n<tool_call>\nf\n</tool_call>\n<|im_end|>", thinking=False)
    assert reply.message.tool_calls == (ToolCall("f", {"x": "1"}),)
    assert len(reply.faults) == 1


def test_nothing_after_the_end_of_the_turn_counts() -> None:
    reply = parse("4<|im_end|>\n<|im_start|>user\nno", thinking=False)
    assert reply.message.content == "4"
