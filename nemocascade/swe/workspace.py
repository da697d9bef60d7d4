"""A private copy of a repository, and the agent's tools that work on it.

The copy is in memory, and unchanged files are shared between copies. No path can lead out of it, no
link can be followed, and nothing needs cleaning up. Tests run on it in the sandbox.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nemocascade.recipe.envs import AgentConfig
from nemocascade.swe.snapshots import Files, check_path
from nemocascade.types import Tool


class ToolError(ValueError):
    """A call cannot be executed; the message is for the caller."""


def _tool(name: str, description: str, /, *optional: str, **parameters: str) -> Tool:
    """Declare a tool with text parameters; those named in `optional` may be omitted."""
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    required = [key for key in parameters if key not in optional]
    schema = {"type": "object", "properties": properties, "required": required}
    return Tool(name, description, schema)


_ALL = (
    _tool(
        "list",
        "List the files of the repository.",
        "path",
        path="folder to list; the whole repository without it",
    ),
    _tool(
        "read",
        "Show a file.",
        "start",
        "end",
        path="of the file",
        start="first line to show, from 1",
        end="last line to show",
    ),
    _tool(
        "search",
        "Show the lines that hold a text.",
        "path",
        text="what to search for, as it stands",
        path="file or folder to search in; the whole repository without it",
    ),
    _tool(
        "edit",
        "Replace a text in a file, where it must stand exactly once; or make a new file.",
        path="of the file",
        old="the text as it stands; empty for a new file",
        new="what takes its place",
    ),
    _tool(
        "run_tests",
        "Run the repository's tests and show what failed.",
        "tests",
        tests="test files or ids, one a line; all tests without it",
    ),
    _tool("submit", "End the work: the repository is repaired."),
)
TOOLS = {tool.name: tool for tool in _ALL}


class Workspace:
    """One agent's repository. A method that raises ToolError changes nothing."""

    def __init__(self, snapshot: Files, limits: AgentConfig) -> None:
        self._snapshot, self._limits = snapshot, limits
        self._changed: dict[str, bytes] = {}

    @property
    def files(self) -> dict[str, bytes]:
        """The repository in its current state."""
        return {**self._snapshot, **self._changed}

    @property
    def changes(self) -> Mapping[str, bytes]:
        """Files that differ from the original."""
        return {p: data for p, data in self._changed.items() if self._snapshot.get(p) != data}

    def call(self, name: str, arguments: Mapping[str, str]) -> str:
        """Run one of the tools that need no tests and return its answer."""
        return _METHODS[name](self, **arguments)

    def list_files(self, path: str = "") -> str:
        """List the files below a folder, one per line."""
        return "\n".join(sorted(self._below(path)))

    def read(self, path: str, start: str = "", end: str = "") -> str:
        """Return a file, or some of its lines."""
        text = self._text(path)
        if not start and not end:
            return text.rstrip("\n")
        # Keep line ends: an edit must match the file exactly.
        lines = text.splitlines(keepends=True)
        first, last = _number(start, 1), _number(end, len(lines))
        if not 1 <= first <= last:
            raise ToolError(f"lines {first} to {last} of {len(lines)}: start must be before end")
        return "".join(lines[first - 1 : last]).removesuffix("\n").removesuffix("\r")

    def search(self, text: str, path: str = "") -> str:
        """Return the lines that contain `text`, as `path:line: text`."""
        if not text:
            raise ToolError("an empty text occurs everywhere: search for some text")
        found: list[str] = []
        for name in sorted(self._below(path)):
            try:
                lines = self._text(name).splitlines()
            except ToolError:
                continue  # not a text
            found += [f"{name}:{i}: {line}" for i, line in enumerate(lines, 1) if text in line]
        if not found:
            return f"no line holds {text!r}"
        more = len(found) - self._limits.search_matches
        if more > 0:
            found = [*found[: self._limits.search_matches], f"[{more} more lines hold it]"]
        return "\n".join(found)

    def edit(self, path: str, old: str, new: str) -> str:
        """Replace `old` by `new`, or create a file."""
        path = _checked(path)
        there = path in self._changed or path in self._snapshot
        if not old and there:
            raise ToolError(f"{path} exists: give the text in it to replace")
        if not old and any(p.startswith(f"{path}/") for p in self.files):
            raise ToolError(f"{path} is a folder")
        if not old:
            return self._write(path, f"{new}\n" if new else "", f"made {path}")
        text = self._text(path)
        if (count := text.count(old)) != 1:
            raise ToolError(f"{path} holds the old text {count} times, it must be once")
        return self._write(path, text.replace(old, new), f"edited {path}")

    def _write(self, path: str, text: str, answer: str) -> str:
        data, limits = text.encode(errors="replace"), self._limits
        if len(data) > limits.file_kib << 10:
            raise ToolError(f"{path} would be larger than {limits.file_kib} KiB")
        if path not in self._changed and len(self._changed) >= limits.changed_files:
            raise ToolError(f"{limits.changed_files} files were changed: no more can be")
        for parent in _parents(path):
            if parent in self._changed or parent in self._snapshot:
                raise ToolError(f"{parent} is a file, not a folder")
        self._changed[path] = data
        return answer

    def _text(self, path: str) -> str:
        path = _checked(path)
        data = self._changed.get(path, self._snapshot.get(path))
        if data is None:
            raise ToolError(f"there is no file {path}")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise ToolError(f"{path} is not text") from None

    def _below(self, path: str) -> list[str]:
        files = self.files
        if path.strip("/") in ("", "."):
            return sorted(files)
        path = _checked(path.rstrip("/"))
        found = [name for name in files if name == path or name.startswith(f"{path}/")]
        if not found:
            raise ToolError(f"there is no file or folder {path}")
        return found


_METHODS: dict[str, Callable[..., str]] = {
    "list": Workspace.list_files,
    "read": Workspace.read,
    "search": Workspace.search,
    "edit": Workspace.edit,
}


def arguments_of(name: str, arguments: Mapping[str, Any]) -> dict[str, str]:
    """Return a call's arguments as text. Raises ToolError for unknown tools or wrong arguments."""
    tool = TOOLS.get(name)
    if tool is None:
        raise ToolError(f"there is no tool {name!r}, the tools are {', '.join(TOOLS)}")
    known, required = tool.parameters["properties"], tool.parameters["required"]
    unknown = [key for key in arguments if key not in known]
    missing = [key for key in required if key not in arguments]
    if unknown or missing:
        raise ToolError(f"{name}: unknown arguments {unknown}, missing ones {missing}")
    return {
        key: value if isinstance(value, str) else str(value) for key, value in arguments.items()
    }


def cut(text: str, limit: int, *, end: bool = False) -> str:
    """Truncate a text to its start (or end) within `limit`, with a note of how much was cut."""
    if len(text) <= limit:
        return text
    note = f"[{len(text) - limit} of {len(text)} characters omitted]"
    return f"{note}\n{text[-limit:]}" if end else f"{text[:limit]}\n{note}"


def _checked(path: str) -> str:
    try:
        return check_path(path)
    except ValueError as error:
        raise ToolError(str(error)) from None


def _parents(path: str) -> list[str]:
    parts = path.split("/")[:-1]
    return ["/".join(parts[: i + 1]) for i in range(len(parts))]


def _number(text: str, default: int) -> int:
    if not text:
        return default
    try:
        return int(text)
    except ValueError:
        raise ToolError(f"{text!r} is not a line number") from None
