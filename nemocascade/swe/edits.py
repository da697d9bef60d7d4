"""Search/replace edits: the format of a repair, its parser, and its application to files.

An answer holds one or more blocks; text outside of them is ignored:

    ### src/cart.py
    <<<<<<< SEARCH
    lines that occur in the file, once
    =======
    lines that replace them
    >>>>>>> REPLACE

Each marker is on its own line. More blocks for the same file may follow without its name. The
searched lines are whole lines of the file, with their indentation, and must occur exactly once.
A block without searched lines makes a new file. A line that looks like a marker is one. (The format
is that of Agentless, Xia et al., arXiv 2407.01489; whole lines and one occurrence are rules here.)
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

FORM = """\
### path/of/the/file
<<<<<<< SEARCH
lines of the file, exactly as they are
=======
lines that take their place
>>>>>>> REPLACE"""
SEARCH, DIVIDER, REPLACE = "<<<<<<< SEARCH", "=======", ">>>>>>> REPLACE"
MOST_EDITS = 64
LONGEST_PATH = 512

_HEADING = re.compile(r"###[ \t]+(?=\S)")


class EditError(ValueError):
    """Edits cannot be parsed or applied. The message says which and why."""


@dataclass(frozen=True)
class Edit:
    """Lines of a file and their replacement, both without line ends."""

    path: str
    search: tuple[str, ...]
    replace: tuple[str, ...]


def parse_edits(text: str) -> list[Edit]:
    """Parse the edits of an answer, in order. Raises EditError for any fault and for no edits."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise EditError(f"the answer holds half a surrogate pair: {error}") from error
    edits: list[Edit] = []
    named: str | None = None
    lines = iter(text.replace("\r\n", "\n").split("\n"))
    for line in lines:
        if heading := _HEADING.match(line):
            named = line[heading.end() :].rstrip(" \t").strip("`")
        elif line.rstrip() == SEARCH:
            if named is None:
                raise EditError(f"edit {len(edits) + 1} names no file: begin with '### path'")
            path = checked_path(named)
            search = _until(lines, DIVIDER, path)
            edits.append(Edit(path, search, _until(lines, REPLACE, path)))
        elif line.rstrip() == REPLACE:
            raise EditError(f"{REPLACE!r} without a {SEARCH!r} before it")
    if not edits:
        raise EditError("no edit: none of the lines is " + SEARCH)
    if len(edits) > MOST_EDITS:
        raise EditError(f"{len(edits)} edits are more than {MOST_EDITS}")
    return edits


def apply_edits(files: Mapping[str, str], edits: Sequence[Edit]) -> dict[str, str]:
    """Apply the edits in order, each to the result of the ones before, and return the files.

    files: texts by path. Raises EditError if an edit's lines do not occur, occur more than once or
    are unchanged, and for a new file whose path exists.
    """
    changed = dict(files)
    for edit in edits:
        path = checked_path(edit.path)
        if not edit.search:
            changed[path] = _new_file(changed, edit)
        elif path not in changed:
            raise EditError(f"{path}: no such file")
        else:
            changed[path] = _replaced(changed[path], edit)
    return changed


def edit_text(edit: Edit) -> str:
    """Format an edit for `parse_edits`."""
    return "\n".join((f"### {edit.path}", SEARCH, *edit.search, DIVIDER, *edit.replace, REPLACE))


def checked_path(path: str) -> str:
    """Return `path` if it is inside the repository. Raises EditError otherwise.

    It must be relative, with forward slashes, normalised, and not in a `.git` folder.
    """
    parts = path.split("/")
    if (
        len(path) > LONGEST_PATH
        or path != str(PurePosixPath(path))
        or path.startswith(("/", "~"))
        or any(part in ("", ".", "..") or part.lower() == ".git" for part in parts)
        or any(ord(c) < 32 or c in '\\:*?"<>|' for c in path)
    ):
        raise EditError(
            f"{path[:80]!r} is not a path inside of the repository, such as src/cart.py"
        )
    return path


def _until(lines: Iterator[str], marker: str, path: str) -> tuple[str, ...]:
    found: list[str] = []
    for line in lines:
        bare = line.rstrip()
        if bare == marker:
            return tuple(found)
        if bare in (SEARCH, DIVIDER, REPLACE):
            raise EditError(f"{path}: {bare!r} where {marker!r} must come first")
        found.append(line)
    raise EditError(f"{path}: an edit is not finished, {marker!r} is missing")


def _new_file(files: Mapping[str, str], edit: Edit) -> str:
    if edit.path in files:
        raise EditError(f"{edit.path}: it exists, so an edit must say which of its lines change")
    above = [str(p) for p in PurePosixPath(edit.path).parents]
    below = f"{edit.path}/"
    if any(p in files for p in above) or any(p.startswith(below) for p in files):
        raise EditError(f"{edit.path}: a file and a folder would have one name")
    if not edit.replace:
        raise EditError(f"{edit.path}: an edit without any line")
    return "\n".join(edit.replace) + "\n"


def _replaced(text: str, edit: Edit) -> str:
    lines = text.split("\n")
    bare = [line.removesuffix("\r") for line in lines]
    size = len(edit.search)
    # Python searches long texts in linear time, and lists of lines not.
    within, searched = (f"\n{'\n'.join(part)}\n" for part in (bare, edit.search))
    found = within.find(searched)
    times = "0 times" if found < 0 else "2 times or more"
    if found < 0 or within.find(searched, found + 1) >= 0:
        shown = edit.search[0].strip()[:80]
        where = f"the {size} searched lines, from {shown!r} on, occur {times}"
        raise EditError(f"{edit.path}: {where}, not once")
    if edit.search == edit.replace:
        raise EditError(f"{edit.path}: an edit that changes nothing")
    at = within.count("\n", 0, found)
    # A file keeps its line ends.
    end = "\r" if lines[at].endswith("\r") else ""
    lines[at : at + size] = [line + end for line in edit.replace]
    return "\n".join(lines)
