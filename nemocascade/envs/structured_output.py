"""Structured output: the answer, or the call it makes, must satisfy the schema made strict."""

from __future__ import annotations

import json
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nemocascade.envs.base import CheckedDomain, final_text
from nemocascade.envs.checks.formats import KINDS as FORMATS
from nemocascade.envs.prompt_rows import turns_of
from nemocascade.envs.row_forms import RowForm
from nemocascade.envs.words import COLORS, NAMES, NOUNS
from nemocascade.runtime.strict_json import parse_field
from nemocascade.runtime.turns import kind_of
from nemocascade.types import Message, Prompt, Row, ToolCall, Verdict

_KEYS = (
    *("name", "age", "size", "color", "price", "count", "title", "owner", "city", "open"),
    *("ready", "score", "level", "kind", "note", "week", "paid", "rank", "label", "total"),
)
_ASKS = ("Write", "Give", "Make", "Return")
_SHAPE = (
    *("schema_repr", "problem_type", "source_format", "source_schema_type", "num_turns"),
    *("num_tools", "num_distractors", "has_distractors", "distractor_style", "tool_name_style"),
    *("tool_schema_mode", "tool_union_mode", "instruction_layout", "instruction_detail_level"),
    "system_instruction_style",
)


class StructuredOutput(CheckedDomain):
    """1 if the final message is only JSON, or of the row's kind, and satisfies the strict schema.

    In rows with `response_mode: tool_call`, the arguments must satisfy it instead: those of the one
    call that the answer makes, of the tool `tool_name`, or their field `tool_payload_key`.

    Strict: all properties are required and no other is allowed. Remote references are errors. The
    validator runs in a killable child, because a schema may contain regular expressions.
    """

    domain = "structured_output"
    row_forms = (
        RowForm(
            "A text by a schema (NeMo Gym)",
            read={
                "schema_str": "the schema as JSON text; precedes `schema`",
                "schema": "the schema as an object",
                "schema_type": "what the text is: `json` (default), `yaml`, `xml`, `toml` or `csv`",
                "response_mode": "`text`, or `tool_call`: the arguments of a call are graded",
                "tool_name": "the tool that must be called",
                "tool_payload_key": "the argument that must satisfy the schema; by default all",
            },
            ignored={
                **dict.fromkeys(_SHAPE, "how the prompt and its tools were made"),
                **dict.fromkeys(("tool_choice", "parallel_tool_calls"), "one call is right"),
                "schema_fields_count": "a class of rows, for statistics",
                "source_record_id": "origin of the row",
            },
        ),
    )

    def claims(self, row: Row) -> bool:
        return "schema_str" in row or "schema" in row

    def parse(self, row: Row) -> Mapping[str, Any]:
        mode = row.get("response_mode") or "text"
        if mode not in ("text", "tool_call"):
            raise ValueError(f"response_mode {mode!r} must be text or tool_call")
        kind = row.get("schema_type") or "json"
        if mode == "text" and kind not in ("json", *FORMATS):
            raise ValueError(f"schema_type {kind!r} must be one of json, {', '.join(FORMATS)}")
        schema = row.get("schema")
        if isinstance(row.get("schema_str"), str):
            schema = parse_field(row["schema_str"], "schema_str")
        if not isinstance(schema, dict):
            raise ValueError(f"a schema must be an object, this is {kind_of(schema)}")
        if fault := self._children.call("nemocascade.envs.checks.schema:fault", schema):
            raise ValueError(f"no validator accepts the schema: {fault}")
        return {"schema": schema, **(_call_of(row) if mode == "tool_call" else {"kind": kind})}

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        schema = prompt.answer["schema"]
        if "tools" in prompt.answer:
            problem = self._call_problem(prompt.answer, response)
            return Verdict(float(problem is None), details={"problem": problem})
        problem = self.run_check(
            "nemocascade.envs.checks.schema:problem",
            schema,
            final_text(response),
            prompt.answer.get("kind", "json"),
            control=[schema, "null"],
        )
        return Verdict(float(problem is None), details={"problem": problem})

    def forms(self, prompt: Prompt) -> Collection[str]:
        return ("tool call" if "tools" in prompt.answer else prompt.answer.get("kind", "json"),)

    def dummy(self, prompt: Prompt) -> Sequence[Message]:
        if "tools" not in prompt.answer:
            return (Message("assistant", "{}"),)
        key = prompt.answer["key"]
        call = ToolCall(next(iter(prompt.answer["tools"])), {} if key is None else {key: "{}"})
        return (Message("assistant", "", tool_calls=(call,)),)

    def _call_problem(self, answer: Mapping[str, Any], response: Sequence[Message]) -> str | None:
        """Return what is wrong with the calls of a response; None if nothing is."""
        calls = [call for message in response for call in message.tool_calls]
        if len(calls) != 1:
            return f"{len(calls)} calls, there must be one"
        name = calls[0].name
        if name not in answer["tools"]:
            return f"a call of {name}, it must be of {' or '.join(answer['tools'])}"
        given = (answer["schema"], dict(calls[0].arguments), answer["tools"][name], answer["key"])
        found: str | None = self.run_check(
            "nemocascade.envs.checks.schema:call_problem",
            *given,
            control=[given[0], {}, given[2], None],
        )
        return found

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a task. 0: one or two fields. 1: three, with choices. 2: a list. 3: JSON schema."""
        fields = (rng.randint(1, 2), 3, 3, 3)[min(max(difficulty, 0), 3)]
        keys = rng.sample(_KEYS[:8] if difficulty <= 0 else _KEYS, fields)
        kinds = ("integer", "string", "boolean", "choice", "list")[: 3 + min(max(difficulty, 0), 2)]
        chosen = [rng.choice(kinds) for _ in keys]
        if difficulty >= 1:
            chosen[-1] = kinds[-1]
        parts = [_FIELDS[kind](rng) for kind in chosen]
        schema = {
            "type": "object",
            "properties": {k: part[1] for k, part in zip(keys, parts, strict=True)},
        }
        value = {k: part[2] for k, part in zip(keys, parts, strict=True)}
        listed = ", ".join(f"{k} {part[0]}" for k, part in zip(keys, parts, strict=True))
        shown = json.dumps(schema) if difficulty >= 3 else listed
        text, reasoning = json.dumps(value), f"keys: {', '.join(keys)}."
        ask = f"{rng.choice(_ASKS)} JSON: {shown}"
        return self._made(ask, {"schema": schema}, text, reasoning, f"```json\n{text}\n```")


def _call_of(row: Row) -> dict[str, Any]:
    """Return `tools`, the parameters of the callable tools by name, and `key`, perhaps None."""
    _, declared = turns_of(row)
    name, key = row.get("tool_name") or None, row.get("tool_payload_key") or None
    tools = {t.name: dict(t.parameters) for t in declared if name in (None, t.name)}
    if not isinstance(key, str | None):
        raise ValueError(f"tool_payload_key must be a text, it is {kind_of(key)}")
    if not tools:
        raise ValueError(
            f"tool_name({name!r}) is not one of the declared tools {[t.name for t in declared]}"
        )
    return {"tools": tools, "key": key}


def _integer(rng: random.Random) -> tuple[str, dict[str, Any], Any]:
    return "integer", {"type": "integer"}, rng.randint(1, 99)


def _string(rng: random.Random) -> tuple[str, dict[str, Any], Any]:
    return "string", {"type": "string"}, rng.choice(NOUNS + NAMES)


def _boolean(rng: random.Random) -> tuple[str, dict[str, Any], Any]:
    return "boolean", {"type": "boolean"}, rng.random() < 0.5


def _choice(rng: random.Random) -> tuple[str, dict[str, Any], Any]:
    options = rng.sample(COLORS, 2)
    return f"{options[0]} or {options[1]}", {"enum": options}, rng.choice(options)


def _list(rng: random.Random) -> tuple[str, dict[str, Any], Any]:
    n = rng.randint(1, 3)
    schema = {"type": "array", "items": {"type": "integer"}, "minItems": n, "maxItems": n}
    return f"list of {n} integers", schema, [rng.randint(1, 9) for _ in range(n)]


_FIELDS = {
    "integer": _integer,
    "string": _string,
    "boolean": _boolean,
    "choice": _choice,
    "list": _list,
}
