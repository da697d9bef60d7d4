"""Parts of large data files, which several processes read side by side.

A part is a range: of bytes of a JSON Lines file, whose lines that start there belong to it, or of
row groups of a Parquet file. Compressed files and JSON arrays have no parts: they can only be read
from their start.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet

from nemocascade.runtime.row_files import COMPRESSED, kind_of, reading

_CHUNK = 4 << 20


def parts_of(path: str, size: int) -> list[range | None]:
    """Cut a data file into parts of about `size` bytes, in order. None means the whole file.

    Raises DataError if the file cannot be read.
    """
    kind = kind_of(Path(path))
    with reading(path):
        total = Path(path).stat().st_size
        if total <= size:
            return [None]
        if kind == "parquet":
            return list(_row_groups(path, size))
        with open(path, "rb") as stream:
            whole = kind != "jsonl" or stream.read(4).startswith(COMPRESSED)
        if whole:
            return [None]
        return [range(start, min(start + size, total)) for start in range(0, total, size)]


def lines_of_part(path: str, part: range) -> int:
    """Number of lines of a JSON Lines file that start in a part, blank ones included."""
    # A line starts at the file's start and after each line feed.
    first, left = max(part.start - 1, 0), part.stop - 1 - max(part.start - 1, 0)
    count = int(part.start == 0 and part.stop > 0)
    with reading(path), open(path, "rb") as stream:
        stream.seek(first)
        while left > 0 and (data := stream.read(min(left, _CHUNK))):
            count += data.count(b"\n")
            left -= len(data)
    return count


def _row_groups(path: str, size: int) -> list[range]:
    with pyarrow.parquet.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    sizes = [sum(g.column(i).total_compressed_size for i in range(g.num_columns)) for g in groups]
    found, start, filled = [], 0, 0
    for index, more in enumerate(sizes):
        if index > start and filled + more > size:
            found.append(range(start, index))
            start, filled = index, 0
        filled += more
    return [*found, range(start, len(groups))]
