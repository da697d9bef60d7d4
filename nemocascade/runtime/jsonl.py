"""Readers of the JSON Lines files that a run writes, the writer of their lines, and the settings
that a folder of them belongs to; data files have `row_files`.

`read_objects` raises at the first damaged line. `read_undamaged` skips damaged lines and reports
them. It is for files that a run appends to, whose last line a crash may have truncated.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nemocascade.runtime.files import naming, replace_text
from nemocascade.runtime.row_errors import DataError

_SURROGATE = re.compile("[\ud800-\udfff]")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """The value as readable JSON that UTF-8 can encode: half a surrogate pair is escaped, and
    comes back when the text is read."""
    text = json.dumps(value, ensure_ascii=False, indent=indent)
    return _SURROGATE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def write_objects(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write objects as lines to a draft, which is on the disk before it is renamed to `path`.

    Returns their number. An OSError names the draft.
    """
    draft = path.with_name(f".{path.name}.part")
    count = 0
    with naming(draft), draft.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json_text(row) + "\n")
            count += 1
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)
    return count


def keep_settings(folder: Path, settings: Mapping[str, Any], contents: str) -> None:
    """Record the settings that affect a folder's contents, in FOLDER/settings.json.

    settings: JSON values. contents: what the folder has, such as "answers". Raises DataError if an
    earlier start of the job recorded others.
    """
    path = folder / "settings.json"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(path, json_text(settings, indent=1) + "\n")
        return
    had = json.loads(path.read_text(encoding="utf-8"))
    new = json.loads(json_text(settings))
    if different := sorted(n for n in new.keys() | had.keys() if new.get(n) != had.get(n)):
        raise DataError(
            f"{folder} has {contents} made with another {', '.join(different)}: set them as they "
            "were, or delete the folder, or name another --output"
        )


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
