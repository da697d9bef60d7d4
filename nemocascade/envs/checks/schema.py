"""JSON text against a JSON Schema made strict."""

from __future__ import annotations

import json
from typing import Any, NoReturn

import jsonschema
from jsonschema.validators import validator_for
from referencing import Registry

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "contains", "additionalProperties", "additionalItems", "then", "else")


def strict(schema: Any) -> Any:
    """A copy of `schema` in which every object requires all its properties and allows no other.

    Parts of `allOf` and `not` stay as they are: made strict they would contradict each other.
    """
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    for key in _MAPS:
        if isinstance(made.get(key), dict):
            made[key] = {name: strict(part) for name, part in made[key].items()}
    for key in (*_LISTS, "items"):
        if isinstance(made.get(key), list):
            made[key] = [strict(part) for part in made[key]]
    for key in _SINGLE:
        if isinstance(made.get(key), dict):
            made[key] = strict(made[key])
    if isinstance(made.get("properties"), dict):
        made["required"] = list(made["properties"])
        made["additionalProperties"] = False
    return made


def problem(schema: dict[str, Any], text: str) -> str | None:
    """What is wrong with `text`: no JSON, or against the strict schema; None if nothing.

    Raises for a schema that is itself broken, or that refers to another document: nothing is
    fetched.
    """
    wanted = strict(schema)
    validator = validator_for(wanted, default=jsonschema.Draft202012Validator)
    validator.check_schema(wanted)
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    # An empty registry has no way to fetch: a remote reference is an error.
    found = next(validator(wanted, registry=Registry()).iter_errors(value), None)
    return None if found is None else f"{found.json_path}: {found.message}"[:300]


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
