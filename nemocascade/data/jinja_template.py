"""Chat templates in jinja: the tokenizers' own, and ours for export.

Templates are downloaded code, so they run in jinja2's sandbox: they cannot reach attributes that
lead out of it and cannot change their arguments.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable
from typing import Any, NoReturn

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nemocascade.data.chat_template import TOOLS_INTRO, TOOLS_USAGE, Conversation, Segment
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Message, Tool

# Private-use characters, unlikely to occur in text; the first that does not occur is the mark.
_MARKS = [chr(code) for code in range(0xE000, 0xE040)]


class JinjaTemplate:
    """A compiled chat template."""

    def __init__(self, source: str) -> None:
        """Compile `source`, such as `tokenizer.chat_template`. Raises DataError if invalid."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda f: datetime.datetime.now().strftime(f)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template is broken: {error}") from None

    def render(
        self,
        conversation: Conversation,
        *,
        thinking: bool,
        generation_prompt: bool = False,
        tokenizer: Tokenizer | None = None,
    ) -> str:
        """Render to one string, in which special tokens cannot be told from a user's text.

        tokenizer: provides the template's `bos_token` and `eos_token`.
        Raises DataError with the template's own message.
        """
        messages, tools = openai_form(conversation)
        return self._render(
            messages,
            tools,
            thinking=thinking,
            generation_prompt=generation_prompt,
            tokenizer=tokenizer,
        )

    def segments(
        self,
        conversation: Conversation,
        tokenizer: Tokenizer,
        *,
        thinking: bool,
        generation_prompt: bool = False,
    ) -> list[Segment]:
        """Render to segments that tell the template's special tokens from a user's text.

        Special tokens in the conversation's own text are split by a mark before rendering, so those
        in the result are the template's. No segment is trained.
        """
        rows = openai_form(conversation)
        everything = json.dumps(rows, ensure_ascii=False)
        mark = next((m for m in _MARKS if m not in everything), None)
        if mark is None:
            raise DataError(f"the text uses all of {_MARKS[0]!r}..{_MARKS[-1]!r}")
        names = sorted(tokenizer.special_tokens, key=len, reverse=True)
        special = "|".join(re.escape(n) for n in names if n)
        overlapping = re.compile(f"(?=(?:{special}))(.)", re.DOTALL)
        messages, tools = (
            _map_strings(row, lambda text: overlapping.sub(rf"\1{mark}", text)) for row in rows
        )
        text = self._render(
            messages,
            tools,
            thinking=thinking,
            generation_prompt=generation_prompt,
            tokenizer=tokenizer,
        )
        parts = re.split(f"({special})", text)
        return [Segment(p.replace(mark, ""), control=i % 2 == 1) for i, p in enumerate(parts) if p]

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        *,
        thinking: bool,
        generation_prompt: bool,
        tokenizer: Tokenizer | None,
    ) -> str:
        specials = tokenizer.special_tokens.items() if tokenizer else ()
        names: dict[int | None, str] = {i: t for t, i in specials}
        try:
            return self._template.render(
                messages=messages,
                tools=tools or None,
                add_generation_prompt=generation_prompt,
                enable_thinking=thinking,
                bos_token=names.get(tokenizer.bos_id, "") if tokenizer else "",
                eos_token=names.get(tokenizer.eos_id, "") if tokenizer else "",
            )
        # A template is third-party code and can raise anything.
        except Exception as error:
            raise DataError(
                f"the chat template cannot render this conversation: {error!r}"
            ) from None


def openai_form(
    conversation: Conversation,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return messages and tools in OpenAI's form, which templates expect."""
    return (
        [_message(m) for m in conversation.messages],
        [_tool(t) for t in conversation.tools],
    )


def _message(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [
            {"type": "function", "function": {"name": c.name, "arguments": dict(c.arguments)}}
            for c in message.tool_calls
        ]
    return turn


def _tool(tool: Tool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": dict(tool.parameters),
    }
    return {"type": "function", "function": function}


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string in `value`, including keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_map_strings(item, change) for item in value]
    if isinstance(value, dict):
        return {change(key): _map_strings(item, change) for key, item in value.items()}
    return value


def _to_json(value: Any, indent: int | None = None, **options: Any) -> str:
    """Replace jinja2's `tojson`, which escapes for HTML and so would change the text."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


_SOURCE = """
{%- macro plain(value) -%}
{{- value if value is string else value | tojson -}}
{%- endmacro -%}
{%- macro lines(fields, skipped=()) -%}
{%- for key, value in fields | items if key not in skipped -%}
{{- '<' ~ key ~ '>' ~ plain(value) ~ '</' ~ key ~ '>\\n' -}}
{%- endfor -%}
{%- endmacro -%}
{%- set thinking = enable_thinking if enable_thinking is defined else true -%}
{%- set ns = namespace(last_user=-1) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.last_user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- set first = messages[0] if messages else {} -%}
{%- set system = first.content if first.role == 'system' else '' -%}
{{- '<|im_start|>system\\n' ~ system -}}
{%- if tools -%}
{{- '\\n\\n' if system else '' -}}
{{- TOOLS_INTRO ~ '<tools>\\n' -}}
{%- for tool in tools -%}
{%- set function = tool.function if tool.function is defined else tool -%}
{%- set schema = function.parameters or {} -%}
{{- '<function>\\n<name>' ~ function.name ~ '</name>\\n' -}}
{{- '<description>' ~ function.description ~ '</description>\\n' if function.description else '' -}}
{{- '<parameters>\\n' -}}
{%- for name, fields in (schema.properties or {}) | items -%}
{{- '<parameter>\\n<name>' ~ name ~ '</name>\\n' -}}
{{- lines(fields if fields is mapping else {}) ~ '</parameter>\\n' -}}
{%- endfor -%}
{{- lines(schema, ('properties', 'type')) ~ '</parameters>\\n</function>\\n' -}}
{%- endfor -%}
{{- '</tools>' ~ TOOLS_USAGE -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- for message in messages -%}
{%- set content = message.content or '' -%}
{%- if message.role == 'user' -%}
{{- '<|im_start|>user\\n' ~ content ~ '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user\\n' if loop.first or loop.previtem.role != 'tool' else '' -}}
{{- '<tool_response>\\n' ~ content ~ '\\n</tool_response>\\n' -}}
{{- '<|im_end|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
{%- elif message.role == 'assistant' -%}
{%- set reasons = thinking and loop.index0 > ns.last_user and message.reasoning_content -%}
{{- '<|im_start|>assistant\\n<think>' -}}
{{- '\\n' ~ message.reasoning_content ~ '\\n</think>\\n' if reasons else '</think>' -}}
{{- content -}}
{%- if message.tool_calls -%}
{{- '' if content.endswith('\\n') or (reasons and not content) else '\\n' -}}
{%- for call in message.tool_calls -%}
{%- set function = call.function if call.function is defined else call -%}
{{- '<tool_call>\\n<function=' ~ function.name ~ '>\\n' -}}
{%- for name, value in function.arguments | items -%}
{{- '<parameter=' ~ name ~ '>\\n' ~ plain(value) ~ '\\n</parameter>\\n' -}}
{%- endfor -%}
{{- '</function>\\n</tool_call>\\n' -}}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n<think>' ~ ('\\n' if thinking else '</think>') -}}
{%- endif -%}
"""

CHAT_TEMPLATE = (
    _SOURCE.replace("TOOLS_INTRO", json.dumps(TOOLS_INTRO))
    .replace("TOOLS_USAGE", json.dumps(TOOLS_USAGE))
    .lstrip("\n")
)
"""The jinja form of `chat_template`, exported as a model's `chat_template.jinja`."""
