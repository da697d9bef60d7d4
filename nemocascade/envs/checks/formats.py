"""Values of YAML, XML, TOML and CSV texts, for validation against a JSON Schema."""

from __future__ import annotations

import csv
import io
import tomllib
from typing import Any

import xmltodict
import yaml

KINDS = ("yaml", "xml", "toml", "csv")


def value_of(kind: str, text: str, schema: Any) -> Any:
    """Return the value of a text; texts in XML and CSV become values by the schema's types.

    kind: one of `KINDS`. XML is the object of its root element: repeated elements are lists,
    attributes have names with `@`. CSV is the list of its rows, by the names of the first row.
    Raises ValueError for a text that is not of this kind.
    """
    try:
        match kind:
            case "yaml":
                return yaml.safe_load(text)
            case "toml":
                return tomllib.loads(text)
            case "xml":
                return _of_element(xmltodict.parse(text), schema)
            case "csv":
                rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
                items = _part(schema, "items") or schema
                return [_of_row(row, items) for row in rows]
    except (RecursionError, ValueError, LookupError) as error:
        raise ValueError(str(error)) from error
    except (yaml.YAMLError, csv.Error, xmltodict.expat.ExpatError) as error:
        raise ValueError(str(error)) from error
    raise ValueError(f"{kind} is not one of {', '.join(KINDS)}")


def _of_element(value: Any, schema: Any) -> Any:
    """Return an XML element as the value that the schema describes, as far as it can be."""
    kinds = _kinds(schema)
    if "array" in kinds:
        # The elements of a list are in one element that has no other.
        if isinstance(value, dict) and len(value) == 1:
            value = next(iter(value.values()))
        listed = value if isinstance(value, list) else [] if value is None else [value]
        return [_of_element(item, _part(schema, "items")) for item in listed]
    if isinstance(value, dict):
        parts = _part(schema, "properties") or {}
        return {name: _of_element(inner, parts.get(name)) for name, inner in value.items()}
    if value is None and "string" in kinds and "null" not in kinds:
        return ""
    return _of_text(value, kinds)


def _of_row(row: dict[Any, Any], schema: Any) -> dict[Any, Any]:
    parts = _part(schema, "properties") or {}
    return {name: _of_cell(cell, _kinds(parts.get(name))) for name, cell in row.items()}


def _of_cell(cell: Any, kinds: list[str]) -> Any:
    return None if "null" in kinds and not cell else _of_text(cell, kinds)


def _of_text(value: Any, kinds: list[str]) -> Any:
    """Return a text as the first of the types that can read it, else as it is."""
    if not isinstance(value, str):
        return value
    for kind in kinds:
        if kind == "string":
            return value
        if kind == "boolean" and value.lower() in ("true", "1", "false", "0"):
            return value.lower() in ("true", "1")
        try:
            if kind in ("integer", "number"):
                return int(value) if kind == "integer" else float(value)
        except ValueError:
            continue
    return value


def _part(schema: Any, key: str) -> Any:
    found = schema.get(key) if isinstance(schema, dict) else None
    return found if isinstance(found, dict) else None


def _kinds(schema: Any) -> list[str]:
    """Return the schema's types, in their order; none if it does not say."""
    found = schema.get("type") if isinstance(schema, dict) else None
    listed = found if isinstance(found, list) else [found]
    return [kind for kind in listed if isinstance(kind, str)]
