"""Validation of texts against a JSON Schema made strict."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any, NoReturn

import jsonschema
from jsonschema.validators import validator_for
from referencing import Registry, Resource
from referencing.exceptions import Unresolvable
from referencing.jsonschema import DRAFT202012

from nemocascade.envs.checks import formats

_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("anyOf", "oneOf", "prefixItems")
_KINDS = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
    type(None): "null",
}
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


def problem(schema: dict[str, Any], text: str, kind: str = "json") -> str | None:
    """Return why `text` is not of its kind or violates the strict schema; None if it is valid.

    kind: `json`, or one of `formats.KINDS`. Raises for a schema that is itself broken or refers to
    another document. Nothing is fetched.
    """
    validator = _validator(schema)
    try:
        if kind == "json":
            value = json.loads(text, parse_constant=_reject)
        else:
            value = formats.value_of(kind, text, schema)
        # YAML has keys of other types, and CSV puts surplus cells under None.
        odd = any(not isinstance(key, str) for part in _parts(value) for key in part)
    except (ValueError, RecursionError) as error:
        return f"not {kind.upper()}: {error}"[:300]
    return "a key is not text" if odd else _violation(validator, value)


def call_problem(
    schema: dict[str, Any], arguments: dict[str, Any], declared: dict[str, Any], key: str | None
) -> str | None:
    """Return why a call's arguments, or the one named `key`, violate the strict schema.

    declared: schema of the tool's parameters, by which texts become values. Raises as `problem`.
    """
    validator = _validator(schema)
    types = declared.get("properties") or {}
    values = {name: typed(value, types.get(name)) for name, value in arguments.items()}
    if key is not None and key not in values:
        return f"the call has no argument {key!r}"
    return _violation(validator, values if key is None else values[key])


def typed(value: Any, schema: Any) -> Any:
    """Return a call's argument as a value of its schema; other values than texts are unchanged.

    A text that the schema does not clearly want as text is read as JSON, else as a Python literal.
    The value is kept if its type is allowed, or if it is a list or an object and no text is.
    """
    if not isinstance(value, str):
        return value
    allowed = _types(schema)
    if allowed == {"string"} or value in _list(schema, "enum"):
        return value
    for read in (json.loads, ast.literal_eval):
        try:
            found = json.loads(json.dumps(read(value.strip())), parse_constant=_reject)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
        kinds = {_KINDS[type(found)]}
        if "integer" in kinds or (isinstance(found, float) and found.is_integer()):
            kinds |= {"integer", "number"}
        nested = isinstance(found, list | dict) and "string" not in allowed
        if not allowed or kinds & allowed or nested:
            return found
    return value


def _types(schema: Any) -> set[str]:
    """Return the types that a schema allows; empty if it does not say."""
    kinds = schema.get("type") if isinstance(schema, dict) else None
    if isinstance(kinds, str):
        return {kinds}
    if kinds is not None:
        return {kind for kind in _list(schema, "type") if isinstance(kind, str)}
    parts = [_types(part) for key in ("anyOf", "oneOf") for part in _list(schema, key)]
    return set().union(*parts) if all(parts) else set()


def _list(schema: Any, key: str) -> list[Any]:
    found = schema.get(key) if isinstance(schema, dict) else None
    return found if isinstance(found, list) else []


def _validator(schema: dict[str, Any]) -> Any:
    wanted = strict(schema)
    kind = validator_for(wanted, default=jsonschema.Draft202012Validator)
    kind.check_schema(wanted)
    # An empty registry cannot fetch: a remote reference is an error.
    return kind(wanted, registry=Registry())


def _violation(validator: Any, value: Any) -> str | None:
    found = next(validator.iter_errors(value), None)
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
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _parts(inner)


def _reject(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
