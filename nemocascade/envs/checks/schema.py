"""Validation of JSON text against a JSON Schema made strict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NoReturn

import jsonschema
from jsonschema.validators import validator_for
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "prefixItems")
_SINGLE = ("items", "contains", "additionalProperties", "additionalItems", "then", "else")


def strict(schema: Any) -> Any:
    """Copy `schema`, with all properties of every object required and no others allowed.

    Subschemas of `allOf` and `not` are unchanged: made strict, they would contradict each other.
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
    """Return why `text` is not JSON or violates the strict schema; None if it is valid.

    Raises for a schema that is itself broken or refers to another document. Nothing is fetched.
    """
    wanted = strict(schema)
    validator = validator_for(wanted, default=jsonschema.Draft202012Validator)
    validator.check_schema(wanted)
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        return f"not JSON: {error}"
    # An empty registry cannot fetch: a remote reference is an error.
    found = next(validator(wanted, registry=Registry()).iter_errors(value), None)
    return None if found is None else f"{found.json_path}: {found.message}"[:300]


def fault(schema: dict[str, Any]) -> str | None:
    """Return why a validator cannot use the schema made strict; None if it can.

    References must lead into the schema. Those of a schema with inner ids are not followed.
    """
    wanted = strict(schema)
    validator = validator_for(wanted, default=jsonschema.Draft202012Validator)
    try:
        validator.check_schema(wanted)
    except jsonschema.SchemaError as error:
        return f"{error.json_path}: {error.message}"[:300]
    if any(name in part for part in _parts(wanted) for name in ("$id", "id", "$anchor")):
        return None
    resource = Resource.from_contents(wanted, default_specification=DRAFT202012)
    resolver = Registry().with_resource("", resource).resolver()
    for part in _parts(wanted):
        reference = part.get("$ref")
        if isinstance(reference, str):
            try:
                resolver.lookup(reference)
            except Unresolvable:
                return f"$ref {reference[:80]!r} leads nowhere in the schema"
    return None


def _parts(value: Any) -> Iterator[dict[str, Any]]:
    """Yield every object inside of a JSON value."""
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value:
        if isinstance(inner, dict | list):
            yield from _parts(inner)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
