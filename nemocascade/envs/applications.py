"""Simulated applications: plain data, and methods that are the tools of an episode.

Tools are methods marked with `@tool`. Their signature is their schema.
"""

from __future__ import annotations

import inspect
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from nemocascade.types import Message, Tool, ToolCall

MAX_CALLS = 64
"""Maximum executed calls of one episode; an answer with more scores 0."""
_TYPES = {"str": str, "str | None": str, "int": int}
_SCHEMA_TYPES = {str: "string", int: "integer"}


class CallError(ValueError):
    """A call that cannot be executed. The message is returned to the model."""


@dataclass(frozen=True)
class _Entry:
    tool: Tool
    run: Callable[..., Any]
    types: Mapping[str, type]
    required: tuple[str, ...]


_MARKED: list[Callable[..., Any]] = []


def tool[F: Callable[..., Any]](function: F) -> F:
    """Mark a method of an `Application` as a tool."""
    _MARKED.append(function)
    return function


class Application(ABC):
    """An application. `call` runs a tool; the end states of two episodes are compared."""

    entries: ClassVar[Mapping[str, _Entry]]

    def __init_subclass__(cls) -> None:
        marked = {id(function) for function in _MARKED}
        own = {n: _entry(n, f) for n, f in vars(cls).items() if id(f) in marked}
        inherited = (getattr(base, "entries", {}) for base in cls.__bases__)
        cls.entries = {n: e for entries in (*inherited, own) for n, e in entries.items()}

    @classmethod
    def tools(cls) -> tuple[Tool, ...]:
        """Return all tools, with their schemas."""
        return tuple(entry.tool for entry in cls.entries.values())

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        """Run a tool and return its result as JSON. Raises CallError and then changes nothing."""
        entry = self.entries.get(name)
        if entry is None:
            raise CallError(f"unknown tool {name}")
        unknown = [key for key in arguments if key not in entry.types]
        missing = [key for key in entry.required if key not in arguments]
        if unknown or missing:
            raise CallError(f"{name}: unknown arguments {unknown}, missing {missing}")
        values = {key: self.read(key, value, entry.types[key]) for key, value in arguments.items()}
        try:
            return self.shown(entry.run(self, **values))
        except CallError:
            raise
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise CallError(f"{name} fails with these arguments: {error}") from error

    def read(self, key: str, value: Any, kind: type) -> Any:
        """Convert an argument to the type of its schema; a template's call has text."""
        if kind is int:
            if isinstance(value, bool) or not isinstance(value, int | str):
                raise CallError(f"{key} must be an integer, it is {value!r}")
            try:
                return int(value)
            except ValueError:
                raise CallError(f"{key} must be an integer, it is {value!r}") from None
        if isinstance(value, list | dict | bool) or value is None:
            raise CallError(f"{key} must be text, it is {value!r}")
        return str(value).strip()

    def shown(self, result: Any) -> str:
        """Return a tool's result as the model sees it."""
        return json.dumps(result, ensure_ascii=False)

    @abstractmethod
    def differences(self, other: Any) -> list[str]:
        """Return the names of the tables whose end states differ from those of `other`."""


class ApplicationSession:
    """The application of one episode. It executes only calls of `allowed` tools."""

    def __init__(self, application: Application, allowed: frozenset[str]) -> None:
        self.application = application
        self._allowed = allowed
        self._calls = 0

    @property
    def done(self) -> bool:
        """Return False: no call ends an episode."""
        return False

    def close(self) -> None:
        """Do nothing: the application is in memory only."""

    def step(self, calls: Sequence[ToolCall]) -> list[Message]:
        """Execute `calls` in order; a call that cannot be executed is answered with the reason."""
        return [Message("tool", self._answer(call)) for call in calls]

    def _answer(self, call: ToolCall) -> str:
        self._calls += 1
        try:
            if self._calls > MAX_CALLS:
                raise CallError(f"more than {MAX_CALLS} calls")
            if call.name not in self._allowed:
                raise CallError(f"unknown tool {call.name}")
            return self.application.call(call.name, call.arguments)
        except CallError as error:
            return f"error: {error}"


def _entry(name: str, function: Callable[..., Any]) -> _Entry:
    parameters = list(inspect.signature(function).parameters.values())[1:]
    types = {p.name: _TYPES[str(p.annotation)] for p in parameters}
    required = tuple(p.name for p in parameters if p.default is inspect.Parameter.empty)
    schema = {
        "type": "object",
        "properties": {key: {"type": _SCHEMA_TYPES[kind]} for key, kind in types.items()},
        "required": list(required),
    }
    return _Entry(Tool(name, (function.__doc__ or "").strip(), schema), function, types, required)
