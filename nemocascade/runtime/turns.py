"""Parts of chat turns in data rows: role, content, tool calls and tool schemas, in OpenAI's form.

Lists and objects may be given as JSON text, as published sets have them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from nemocascade.runtime.row_errors import RowError
from nemocascade.runtime.strict_json import parse_field
from nemocascade.types import ROLES, Role, Tool, ToolCall


def parse_role(value: object, where: str) -> Role:
    """Return the role; `developer` is OpenAI's newer name of `system`."""
    role = "system" if value == "developer" else value
    if role not in ROLES:
        raise RowError(f"{where}: unknown role {role!r}, known are {', '.join(ROLES)}")
    return cast(Role, role)


def parse_content(value: object, where: str) -> str:
    """Return the text of a string, of null, or of a list of text parts."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise RowError(f"{where}: content must be text or a list of parts, it is {kind_of(value)}")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, Mapping) else part
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        if kind not in ("text", "input_text", "output_text"):
            raise RowError(f"{where}: a part of type {kind!r}; only text can be read")
        if not isinstance(text, str):
            raise RowError(f"{where}: a part of the content holds no text")
        texts.append(text)
    return "".join(texts)


def parse_tool_calls(value: object, where: str) -> tuple[ToolCall, ...]:
    """Parse the calls of a turn: objects with a `function`, or bare functions."""
    if isinstance(value, str):
        value = parse_field(value, f"{where}: tool_calls") if value else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError(f"{where}: tool_calls must be a list, it is {kind_of(value)}")
    calls = []
    for call in value:
        function, name = _function(call)
        if function is None:
            raise RowError(f"{where}: a tool call has no name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parse_field(arguments or "{}", f"{where}: arguments of {name}")
        if not isinstance(arguments, Mapping | None):
            raise RowError(f"{where}: arguments of {name} must be an object")
        calls.append(ToolCall(name, dict(arguments or {})))
    return tuple(calls)


def parse_tools(value: object) -> tuple[Tool, ...]:
    """Parse a row's tools: OpenAI's form, bare functions, or either as JSON text."""
    if isinstance(value, str):
        value = parse_field(value, "tools") if value else None
    if value is None:
        return ()
    if not isinstance(value, list):
        raise RowError(f"tools must be a list, it is {kind_of(value)}")
    tools = []
    for i, item in enumerate(value):
        function, name = _function(item)
        if function is None:
            raise RowError(f"tools[{i}] has no name")
        parameters = function.get("parameters") or {}
        if isinstance(parameters, str):
            parameters = parse_field(parameters, f"tools[{i}].parameters")
        properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
        if not isinstance(parameters, Mapping) or not isinstance(properties, Mapping | None):
            raise RowError(f"tools[{i}].parameters must be a JSON schema of an object")
        tools.append(Tool(name, str(function.get("description") or ""), dict(parameters)))
    return tuple(tools)


def kind_of(value: object) -> str:
    """Name of a value's type, for messages."""
    return "missing or null" if value is None else type(value).__name__


def _function(item: object) -> tuple[Mapping[str, Any], str] | tuple[None, str]:
    """Return the function of a call or a declaration, and its name; None without a name."""
    function = item.get("function") or item if isinstance(item, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(name, str) or not name:
        return None, ""
    return function, name


def encodable(text: str) -> str:
    """Escape what UTF-8 cannot encode, half a surrogate pair: programs may print it, and tokenizers
    do not accept it."""
    return text.encode(errors="backslashreplace").decode()
