"""Readers of the JSON Lines files that a run writes, and the writer of their lines; data files have
`row_files`.

`read_objects` raises at the first damaged line. `read_undamaged` skips damaged lines and reports
them. It is for files that a run appends to, whose last line a crash may have truncated.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_SURROGATE = re.compile("[\ud800-\udfff]")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """The value as readable JSON that UTF-8 can encode: half a surrogate pair is escaped, and
    comes back when the text is read."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def read_lines(path: str | Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, raw line with its end) for every non-blank line."""
    with Path(path).open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield number, line


def parse_line(line: bytes | str) -> Any:
    """Parse one line as JSON. Raises ValueError with the reason, without the line number."""
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    except RecursionError:
        raise ValueError("JSON nested too deep") from None


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, object) for every non-blank line; `file` is the name without its folder.

    Raises ValueError naming `file:line` if a line is not a JSON object.
    """
    for number, line in read_lines(path):
        where = f"{Path(path).name}:{number}"
        try:
            row = parse_line(line)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: a row must be an object, it is {type(row).__name__}")
        yield where, row


def read_undamaged(
    path: str | Path, damaged: Callable[[str], object]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (line, object) for every line that holds an object. Invalid UTF-8 is replaced.

    damaged: called with each other non-blank line.
    """
    for _, raw in read_lines(path):
        line = raw.decode("utf-8", errors="replace").rstrip("\r\n")
        try:
            row = parse_line(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            yield line, row
        else:
            damaged(line)
