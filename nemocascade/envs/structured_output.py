"""Structured output: the answer must be JSON that satisfies the schema made strict."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from nemocascade.envs.base import CheckedDomain, final_text
from nemocascade.envs.words import COLORS, NAMES, NOUNS
from nemocascade.runtime.strict_json import parse_field
from nemocascade.runtime.turns import kind_of
from nemocascade.types import Message, Prompt, Row, Verdict

_KEYS = (
    *("name", "age", "size", "color", "price", "count", "title", "owner", "city", "open"),
    *("ready", "score", "level", "kind", "note", "week", "paid", "rank", "label", "total"),
)
_ASKS = ("Write", "Give", "Make", "Return")


class StructuredOutput(CheckedDomain):
    """1 if the final message is only JSON and satisfies the strict schema, else 0.

    Strict: all properties are required and no other is allowed. Remote references are errors. The
    validator runs in a killable child, because a schema may contain regular expressions.
    """

    domain = "structured_output"

    def claims(self, row: Row) -> bool:
        return "schema_str" in row or "schema" in row

    def parse(self, row: Row) -> Mapping[str, Any]:
        kind = row.get("schema_type", "json")
        if kind != "json":
            raise ValueError(f"schema_type {kind!r}: only json can be verified")
        schema = row.get("schema")
        if isinstance(row.get("schema_str"), str):
            schema = parse_field(row["schema_str"], "schema_str")
        if not isinstance(schema, dict):
            raise ValueError(f"a schema must be an object, this is {kind_of(schema)}")
        if fault := self._children.call("nemocascade.envs.checks.schema:fault", schema):
            raise ValueError(f"no validator accepts the schema: {fault}")
        return {"schema": schema}

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        schema = prompt.answer["schema"]
        problem = self.run_check(
            "nemocascade.envs.checks.schema:problem",
            schema,
            final_text(response),
            control=[schema, "null"],
        )
        return Verdict(float(problem is None), details={"problem": problem})

    def dummy(self, prompt: Prompt) -> Sequence[Message]:
        return (Message("assistant", "{}"),)

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
