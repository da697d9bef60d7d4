"""Jinja chat templates: rendering, marks, and conversations in OpenAI's form."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from types import CodeType
from typing import Any

import jinja2

from nemocascade.data.jinja_sandbox import MAX_SOURCE, Rendering, TemplateSandbox
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Message, Tool


@functools.lru_cache(maxsize=8)
def _compiled(source: str) -> CodeType:
    """Code of a template, which any sandbox can run: stages of one process read it once."""
    return TemplateSandbox().compile(source)


class JinjaTemplate:
    """A compiled chat template.

    tokens: the template's variables for special tokens, such as `bos_token`.
    """

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        """Compile `source`. Raises DataError if it is invalid or too long."""
        if len(source) > MAX_SOURCE:
            raise DataError(
                f"the chat template has {len(source)} characters, at most {MAX_SOURCE} are read"
            )
        environment = self._environment = TemplateSandbox()
        self._tokens = dict(tokens)
        try:
            code = _compiled(source)
        # Deeply nested source exceeds the limits of Python's compiler, to which jinja hands it.
        except (jinja2.TemplateError, RecursionError, SyntaxError, MemoryError) as error:
            raise DataError(f"the chat template is broken: {error}") from None
        shared = environment.make_globals(None)
        self._template = environment.template_class.from_code(environment, code, shared)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        thinking: bool,
        generation_prompt: bool,
        mark: str = "",
    ) -> str:
        """Render to one string.

        mark: a character; each message's text is then preceded by it and the message's index, see
            `split_messages`.
        Raises DataError with the template's own message.
        """
        found = {id(message): i for i, message in enumerate(messages)} if mark else {}
        with self._environment.running(Rendering(mark, found)):
            try:
                return self._template.render(
                    messages=messages,
                    tools=tools or None,
                    documents=None,
                    add_generation_prompt=generation_prompt,
                    enable_thinking=thinking,
                    **self._tokens,
                )
            # A template is third-party code and can raise anything.
            except Exception as error:
                reason = error if isinstance(error, jinja2.TemplateError) else repr(error)
                raise DataError(
                    f"the chat template cannot render this conversation: {reason}"
                ) from None


def split_messages(text: str, mark: str) -> list[tuple[int | None, str]]:
    """Split a text rendered with `mark` into (index of the message, its text), in order.

    The index is None for text outside of every message.
    """
    parts = re.split(rf"{mark}(\d+):(\d*);", text)
    spans: list[tuple[int | None, str]] = [(None, parts[0])]
    # Loops over messages that are open, outermost first, each with its current message.
    open_loops: list[tuple[str, int]] = []
    for loop, index, part in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        if loop in (known := [name for name, _ in open_loops]):
            del open_loops[known.index(loop) :]
        if index:
            open_loops.append((loop, int(index)))
        spans.append((open_loops[-1][1] if open_loops else None, part))
    merged: list[tuple[int | None, str]] = []
    for owner, part in spans:
        if merged and merged[-1][0] == owner:
            merged[-1] = (owner, merged[-1][1] + part)
        elif part:
            merged.append((owner, part))
    return merged


def openai_form(
    messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return messages and tools in OpenAI's form, which templates expect."""
    return [_message(m) for m in messages], [_tool(t) for t in tools]


def _message(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        # Templates read it under one of two names.
        turn |= {"reasoning_content": message.reasoning, "thinking": message.reasoning}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
            for c in message.tool_calls
        ]
    return turn


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function | {"parameters": dict(tool.parameters)}}


def any_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of any of `texts`; the first in order wins."""
    return re.compile("|".join(map(re.escape, texts)) or "(?!)")


def starts_of(texts: Iterable[str]) -> re.Pattern[str]:
    """Matches the first character of each text, also where texts overlap."""
    return re.compile(f"(?=(?:{any_of(texts).pattern}))(.)", re.DOTALL)


def guarded(value: Any, starts: re.Pattern[str], mark: str) -> Any:
    """Break every special token in the strings of `value`, keys included, by a mark."""
    if isinstance(value, str):
        return starts.sub(rf"\1{mark}", value)
    if isinstance(value, list):
        return [guarded(item, starts, mark) for item in value]
    if isinstance(value, dict):
        return {guarded(k, starts, mark): guarded(v, starts, mark) for k, v in value.items()}
    return value
