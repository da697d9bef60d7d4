"""The chat template of Nemotron-Cascade 2 (arXiv 2603.19220), as segments.

Every turn is `<|im_start|>role\\n...<|im_end|>\\n`. A system block, possibly empty, always comes
first. An assistant turn opens with `<think>\\nREASONING\\n</think>\\n`, or with `<think></think>`
when it has no reasoning, when thinking is off, and in all turns before the last user turn. Tools
are declared in the system block, calls end an assistant turn, and results form a user turn.

A segment is either one of the template's own tags (control) or text. It is trained if the
assistant wrote it. Text is tokenised with special tokens disabled, so a user's `<|im_end|>` becomes
ordinary tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Message, Tool, ToolCall

TEMPLATE_VERSION = 1
"""Part of the cache key: increment it with every change of the rendered text."""

TOOLS_INTRO = "# Tools\n\nThese functions can be called:\n\n"
TOOLS_USAGE = (
    "\n\nA call ends the reply and has this form, one block for each call:\n\n"
    "<tool_call>\n<function=NAME>\n<parameter=PARAMETER>\nVALUE\n</parameter>\n</function>\n"
    "</tool_call>\n\nGive every required parameter. A value may span lines."
)
_CALL_TAGS = re.compile("(</?tool_call>)")


@dataclass(frozen=True)
class Conversation:
    """Turns in order. A system turn is allowed only as the first."""

    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] = ()

    @property
    def last_user(self) -> int:
        """Index of the last user turn, -1 if there is none. Tool results are not user turns."""
        users = [i for i, m in enumerate(self.messages) if m.role == "user"]
        return users[-1] if users else -1


class Segment(NamedTuple):
    """One segment of a rendered conversation.

    control: the text is exactly one tag of the template, such as `<|im_end|>`.
    trained: the assistant writes this text, so the loss covers it.
    """

    text: str
    control: bool = False
    trained: bool = False


def render(conversation: Conversation, *, thinking: bool) -> list[Segment]:
    """Render the whole conversation for training.

    The trained segments are the assistant's text after its generation prompt, up to and including
    the closing `<|im_end|>`. The generation prompt (`<|im_start|>assistant\\n<think>\\n` or
    `<|im_start|>assistant\\n<think></think>`) is not trained.
    """
    return list(_turns(conversation, thinking))


def render_prompt(conversation: Conversation, *, thinking: bool) -> list[Segment]:
    """Render the conversation up to the assistant's next turn, with nothing trained.

    Raises DataError if the conversation ends with an assistant turn.
    """
    if not conversation.messages or conversation.messages[-1].role in ("assistant", "system"):
        raise DataError("a prompt must end with a user turn or with a tool's result")
    body = [s._replace(trained=False) for s in _turns(conversation, thinking)]
    return [*body, *_opening(reasons=thinking)]


def render_results(messages: Iterable[Message], *, thinking: bool) -> list[Segment]:
    """Render tool results and the generation prompt of the assistant's next turn.

    The preceding assistant turn ended with `<|im_end|>`. Nothing is trained.
    """
    return [
        Segment("\n"),
        *_header("user"),
        *(segment for message in messages for segment in _result(message)),
        *_footer(),
        *_opening(reasons=thinking),
    ]


def encode(segments: Iterable[Segment], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return token ids, and for each id a flag that says if it is trained.

    Adjacent text is tokenised as one run, split where training starts or ends, because generation
    starts at the same split. A tag that is not one token of the tokenizer is treated as text.
    """
    ids: list[int] = []
    trained: list[bool] = []
    run = ""
    run_trained = False

    def flush() -> None:
        nonlocal run
        if run:
            piece = tokenizer.encode(run)
            ids.extend(piece)
            trained.extend([run_trained] * len(piece))
            run = ""

    for segment in segments:
        special = tokenizer.special_tokens.get(segment.text) if segment.control else None
        if special is not None or segment.trained != run_trained:
            flush()
            run_trained = segment.trained
        if special is None:
            run += segment.text
        else:
            ids.append(special)
            trained.append(segment.trained)
    flush()
    return ids, trained


def _turns(conversation: Conversation, thinking: bool) -> Iterator[Segment]:
    messages = conversation.messages
    system = messages[0].content if messages and messages[0].role == "system" else ""
    yield from _header("system")
    yield Segment(system)
    if conversation.tools:
        yield Segment("\n\n" if system else "")
        yield from _tools(conversation.tools)
    yield from _footer()
    last_user = conversation.last_user
    for i, message in enumerate(messages):
        if message.role == "assistant":
            yield from _assistant(message, keep_reasoning=thinking and i > last_user)
        elif message.role == "tool":
            # Consecutive results share one user turn.
            if messages[i - 1].role != "tool":
                yield from _header("user")
            yield from _result(message)
            if i + 1 == len(messages) or messages[i + 1].role != "tool":
                yield from _footer()
        elif message.role == "user":
            yield from _header("user")
            yield Segment(message.content)
            yield from _footer()


def _result(message: Message) -> Iterator[Segment]:
    yield Segment("<tool_response>", control=True)
    yield Segment(f"\n{message.content}\n")
    yield Segment("</tool_response>", control=True)
    yield Segment("\n")


def _header(role: str) -> Iterator[Segment]:
    yield Segment("<|im_start|>", control=True)
    yield Segment(f"{role}\n")


def _footer(trained: bool = False) -> Iterator[Segment]:
    yield Segment("<|im_end|>", control=True, trained=trained)
    yield Segment("\n")


def _opening(*, reasons: bool) -> Iterator[Segment]:
    """The generation prompt."""
    yield from _header("assistant")
    yield Segment("<think>", control=True)
    if reasons:
        yield Segment("\n")
    else:
        yield Segment("</think>", control=True)


def _assistant(message: Message, *, keep_reasoning: bool) -> Iterator[Segment]:
    trained = message.trained
    reasons = keep_reasoning and bool(message.reasoning)
    yield from _opening(reasons=reasons)
    if reasons:
        yield Segment(f"{message.reasoning}\n", trained=trained)
        yield Segment("</think>", control=True, trained=trained)
        yield Segment("\n", trained=trained)
    yield Segment(message.content, trained=trained)
    if message.tool_calls:
        on_new_line = message.content.endswith("\n") or (reasons and not message.content)
        yield Segment("" if on_new_line else "\n", trained=trained)
        for call in message.tool_calls:
            for segment in _call(call):
                yield segment._replace(trained=trained)
    yield from _footer(trained)


def _call(call: ToolCall) -> Iterator[Segment]:
    yield Segment("<tool_call>", control=True)
    lines = [f"\n<function={call.name}>\n"]
    for name, value in call.arguments.items():
        lines.append(f"<parameter={name}>\n{_plain(value)}\n</parameter>\n")
    yield Segment("".join(lines) + "</function>\n")
    yield Segment("</tool_call>", control=True)
    yield Segment("\n")


def _tools(tools: Iterable[Tool]) -> Iterator[Segment]:
    yield Segment(TOOLS_INTRO)
    yield Segment("<tools>", control=True)
    for tool in tools:
        yield Segment(_declaration(tool))
    yield Segment("\n")
    yield Segment("</tools>", control=True)
    for i, part in enumerate(_CALL_TAGS.split(TOOLS_USAGE)):
        yield Segment(part, control=i % 2 == 1)


def _declaration(tool: Tool) -> str:
    lines = ["", "<function>", f"<name>{tool.name}</name>"]
    if tool.description:
        lines.append(f"<description>{tool.description}</description>")
    lines.append("<parameters>")
    schema = dict(tool.parameters)
    for name, fields in (schema.pop("properties", None) or {}).items():
        lines += ["<parameter>", f"<name>{name}</name>"]
        known = fields if isinstance(fields, Mapping) else {}
        lines += [f"<{key}>{_plain(value)}</{key}>" for key, value in known.items()]
        lines.append("</parameter>")
    # A declaration is always an object; everything else in the schema is kept.
    schema.pop("type", None)
    lines += [f"<{key}>{_plain(value)}</{key}>" for key, value in schema.items()]
    lines += ["</parameters>", "</function>"]
    return "\n".join(lines)


def _plain(value: Any) -> str:
    """Return strings unchanged and everything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
