"""Unified diffs as git writes them: strict parser, and application to the original files.

A hunk is read by the counts in its header, so no line of a file can be mistaken for a header. Names
may be quoted; files may be created, deleted and renamed. Text between files is ignored. Changes of
binary files are recognised but cannot be applied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from nemocascade.swe.snapshots import check_path

_GIT = "diff --git "
_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_EXTENDED = re.compile(
    r"(old mode|new mode|deleted file mode|new file mode|copy from|copy to|rename from|rename to"
    r"|similarity index|dissimilarity index|index|Binary files|GIT binary patch)(?: (.*))?"
)
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(rb"\\([0-7]{3}|.)")
_CONTROLS = dict(zip(b"abtnvfr", b"\a\b\t\n\v\f\r", strict=True))
_NOWHERE = "/dev/null"
_SIGNATURE = "-- "
"""Last line of a patch formatted as a mail."""


class PatchError(ValueError):
    """A patch cannot be parsed or applied. The message says where and why."""


@dataclass(frozen=True)
class Hunk:
    """Changed lines of a file.

    start: number of the first old line; without old lines, number of the line before.
    lines: in order, each with its sign (space, `-` or `+`) and its line end.
    """

    start: int
    lines: tuple[tuple[str, str], ...]

    @property
    def old(self) -> list[str]:
        """Lines before the patch."""
        return [text for sign, text in self.lines if sign != "+"]

    @property
    def new(self) -> list[str]:
        """Lines after the patch."""
        return [text for sign, text in self.lines if sign != "-"]

    @property
    def changed(self) -> set[int]:
        """Numbers of old lines that are removed, or after which lines are added."""
        at, found = self.start if self.old else self.start + 1, set()
        for sign, _ in self.lines:
            if sign == "+":
                found.add(max(at - 1, 1))
            else:
                found |= {at} if sign == "-" else set()
                at += 1
        return found


@dataclass(frozen=True)
class FilePatch:
    """Changes of one file. old is None for a new file, new for a deleted one."""

    old: str | None
    new: str | None
    hunks: tuple[Hunk, ...] = ()
    is_binary: bool = False

    @property
    def path(self) -> str:
        """Name before the patch, or after it for a new file."""
        name = self.old if self.old is not None else self.new
        assert name is not None
        return name


def parse_patch(text: str) -> tuple[FilePatch, ...]:
    """Parse the files of a patch, in order. Raises PatchError for any fault and for no files."""
    try:
        text.encode()
        return _files(_Lines(text))
    except PatchError:
        raise
    # Half a surrogate pair, a path that leads outside, or a number of thousands of digits.
    except ValueError as error:
        raise PatchError(f"the patch cannot be read: {error}") from error


def _files(lines: _Lines) -> tuple[FilePatch, ...]:
    found = []
    while not lines.at_end:
        if lines.peek().startswith(_GIT) or lines.at_names:
            found.append(_file(lines))
        elif _HUNK.match(lines.peek()):
            raise PatchError(f"line {lines.number} of the patch: a hunk of no file")
        else:
            lines.take()
    if not found:
        raise PatchError("'patch' is not a unified diff: it has no pairs of --- and +++ lines")
    return tuple(found)


def apply_patch(files: Mapping[str, bytes], patch: str) -> dict[str, bytes]:
    """Return the files after the patch. Raises PatchError if a line differs from the patch."""
    changed = dict(files)
    for file in parse_patch(patch):
        before = _before(changed, file)
        after = _patched(before, file).encode()
        if file.old is not None:
            del changed[file.old]
        if file.new is not None:
            if file.new in changed:
                raise PatchError(f"{file.new}: the patch makes it, and it is there already")
            changed[file.new] = after
        elif after:
            raise PatchError(f"{file.path}: the patch deletes it, but lines of it are left")
    return changed


def _before(files: Mapping[str, bytes], file: FilePatch) -> str:
    if file.is_binary:
        raise PatchError(f"{file.path}: a change of a binary file cannot be applied")
    if file.old is None:
        return ""
    if file.old not in files:
        raise PatchError(f"{file.old}: the patch changes it, but there is no such file")
    try:
        return files[file.old].decode()
    except UnicodeDecodeError:
        raise PatchError(f"{file.old}: the patch changes lines, but the file is not text") from None


def _patched(text: str, file: FilePatch) -> str:
    lines, found, at = _with_ends(text), list[str](), 0
    for number, hunk in enumerate(file.hunks, start=1):
        old = hunk.old
        start = hunk.start - 1 if old else hunk.start
        if start < at or start > len(lines) or lines[start : start + len(old)] != old:
            raise PatchError(
                f"{file.path}: hunk {number} does not apply, the lines from {hunk.start} on are "
                "not those of the patch"
            )
        found += lines[at:start] + hunk.new
        at = start + len(old)
    return "".join(found + lines[at:])


def _with_ends(text: str) -> list[str]:
    """Split into lines with their ends; the last may have none."""
    *whole, last = text.split("\n")
    return [f"{line}\n" for line in whole] + ([last] if last else [])


class _Lines:
    """Lines of a patch with a read position."""

    def __init__(self, text: str) -> None:
        self._lines = text.removesuffix("\n").split("\n")
        self._at = 0

    @property
    def number(self) -> int:
        return self._at + 1

    @property
    def at_end(self) -> bool:
        return self._at >= len(self._lines)

    @property
    def at_names(self) -> bool:
        """Return True if the next two lines are the names of a file before and after."""
        return self.peek().startswith("--- ") and self.peek(1).startswith("+++ ")

    def peek(self, ahead: int = 0) -> str:
        """Return an upcoming line; empty after the end."""
        at = self._at + ahead
        return self._lines[at] if at < len(self._lines) else ""

    def take(self) -> str:
        self._at += 1
        return self._lines[self._at - 1]


def _file(lines: _Lines) -> FilePatch:
    where = f"line {lines.number} of the patch"
    old: str | None = None
    new: str | None = None
    seen: dict[str, str] = {}
    if lines.peek().startswith(_GIT):
        old = new = _same_name(lines.take().removeprefix(_GIT).rstrip("\r"))
        while match := _EXTENDED.fullmatch(lines.peek().rstrip("\r")):
            seen[match[1]] = match[2] or ""
            lines.take()
    if "copy from" in seen:
        raise PatchError(f"{where}: a copy of a file: make the patch without git's -C")
    if "rename from" in seen and "rename to" in seen:
        old, new = _unquoted(seen["rename from"]), _unquoted(seen["rename to"])
    if lines.at_names:
        old, new = _names(lines.take()[4:], lines.take()[4:])
    old = None if "new file mode" in seen else old
    new = None if "deleted file mode" in seen else new
    paths = [check_path(name) for name in (old, new) if name is not None]
    if not paths:
        raise PatchError(f"{where}: the patch names no file")
    if len({*paths}) == 2 and "rename from" not in seen:
        raise PatchError(f"{where}: {old!r} becomes {new!r}, without a line that says 'rename'")
    hunks = _hunks(lines, paths[0])
    return FilePatch(old, new, hunks, "Binary files" in seen or "GIT binary patch" in seen)


def _names(before: str, after: str) -> tuple[str | None, str | None]:
    """Parse the names of the `---` and `+++` lines."""
    old, new = (_unquoted(name.rstrip("\r").partition("\t")[0]) for name in (before, after))
    if old.startswith(("a/", _NOWHERE)) and new.startswith(("b/", _NOWHERE)):
        old, new = old.removeprefix("a/"), new.removeprefix("b/")
    return (None if old == _NOWHERE else old), (None if new == _NOWHERE else new)


def _same_name(names: str) -> str | None:
    """Return the name that a `diff --git` line has twice; None if it has two names."""
    if quoted := _QUOTED.match(names):
        first, second = quoted[0], names[quoted.end() + 1 :]
    else:
        half = len(names) // 2
        first, second = names[:half], names[half + 1 :]
    old, new = _names(first, second)
    return old if old == new else None


def _unquoted(name: str) -> str:
    """Decode a name that git quoted (C escapes of UTF-8 bytes); others are unchanged."""
    quoted = _QUOTED.fullmatch(name)
    if quoted is None:
        return name

    def plain(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([int(code, 8) & 0xFF if len(code) == 3 else _CONTROLS.get(code[0], code[0])])

    try:
        return _ESCAPE.sub(plain, quoted[1].encode()).decode()
    except UnicodeDecodeError:
        raise PatchError(f"{name}: the name of a file is not in UTF-8") from None


def _hunks(lines: _Lines, path: str) -> tuple[Hunk, ...]:
    found: list[Hunk] = []
    while match := _HUNK.match(lines.peek()):
        lines.take()
        found.append(_hunk(lines, match, f"{path}: hunk {len(found) + 1}"))
    line = lines.peek()
    if found and line[:1] in ("+", "-", " ") and line != _SIGNATURE and not lines.at_names:
        raise PatchError(f"{path}: hunk {len(found)} has more lines than its header says")
    return tuple(found)


def _hunk(lines: _Lines, header: re.Match[str], where: str) -> Hunk:
    start, *counts = (int(number or 1) for number in header.group(1, 2, 4))
    old, new = counts
    body: list[tuple[str, str]] = []
    while old or new or lines.peek().startswith("\\"):
        if lines.at_end:
            raise PatchError(f"{where} has fewer lines than its header says")
        # Mail programs and editors strip the space of an empty line.
        line = lines.take() or " "
        sign, text = line[0], line[1:]
        if sign == "\\" and body:
            body[-1] = (body[-1][0], body[-1][1].removesuffix("\n"))
            continue
        old, new = old - (sign in " -"), new - (sign in " +")
        if sign not in " +-" or old < 0 or new < 0:
            raise PatchError(f"{where}: {line[:80]!r} does not fit the counts of its header")
        body.append((sign, f"{text}\n"))
    return Hunk(start, tuple(body))
