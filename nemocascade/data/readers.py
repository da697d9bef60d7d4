"""Streaming readers of JSONL, gzipped JSONL, Parquet and synthetic rows.

A source is a file's path or a `synthetic:NAME`. Rows are read in pieces: chunks of a few hundred
rows of one source. A piece is small and carries its row numbers, so another process can parse it;
no file is ever entirely in memory.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from nemocascade.data import synthetic
from nemocascade.data.errors import DataError, RowError
from nemocascade.runtime import jsonl

SUFFIXES = (*jsonl.SUFFIXES, ".parquet")
PIECE_ROWS = 512
PIECE_BYTES = 4 << 20


@dataclass(frozen=True)
class RowPiece:
    """A chunk of raw rows of one source.

    source: index into the list of sources.
    numbers: number of each row, from 1: its line, or its position in the Parquet file.
    lines: raw JSON, or None for Parquet.
    batch: the Parquet rows, or None for JSONL.
    """

    source: int
    numbers: Sequence[int]
    lines: list[bytes] | None = None
    batch: pyarrow.RecordBatch | None = None

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield (row number, row); an unreadable row is yielded as a RowError."""
        if self.batch is not None:
            # A Parquet column has one type for all rows, so fields absent from a row are null.
            rows = map(_without_nulls, self.batch.to_pylist())
            yield from zip(self.numbers, rows, strict=True)
            return
        for number, line in zip(self.numbers, self.lines or (), strict=True):
            yield number, _parse_line(line)

    def first(self, rows: int) -> RowPiece:
        """Return the piece truncated to `rows` rows."""
        return RowPiece(
            self.source,
            self.numbers[:rows],
            lines=None if self.lines is None else self.lines[:rows],
            batch=None if self.batch is None else self.batch.slice(0, rows),
        )


def find_sources(paths: Sequence[str]) -> list[str]:
    """Return the sources behind `paths`; folders are walked in the order of their names.

    Hidden files and folders (`.cache`) are skipped.

    Raises DataError for a path that does not exist, a folder without data, or an unknown suffix.
    """
    sources: list[str] = []
    for name in paths:
        path = Path(name).expanduser()
        if name.startswith(synthetic.PREFIX):
            sources.append(name)
        elif path.is_dir():
            inside = sorted(
                p for p in path.rglob("*") if _known(p.relative_to(path)) and p.is_file()
            )
            if not inside:
                raise DataError(f"{path}: the folder holds no file of {', '.join(SUFFIXES)}")
            sources += map(str, inside)
        elif not path.is_file():
            raise DataError(f"{path}: no such file or folder; set data.path")
        elif not path.name.endswith(SUFFIXES):
            raise DataError(f"{path}: unknown kind of file, known are {', '.join(SUFFIXES)}")
        else:
            sources.append(str(path))
    return sources


def read_pieces(
    sources: Sequence[str], *, max_rows: int = 0, seed: int = 0, heldout: bool = False
) -> Iterator[RowPiece]:
    """Yield the rows of `sources` in order, in pieces; at most `max_rows` rows (0 = all).

    seed, heldout: parameters of synthetic rows; files ignore them. Blank lines are skipped.
    Raises DataError if a file as a whole is damaged.
    """
    left = max_rows or None
    for index, name in enumerate(sources):
        if name.startswith(synthetic.PREFIX):
            pieces = _make(name, index, seed=seed, heldout=heldout, rows=left or 0)
        elif name.endswith(".parquet"):
            pieces = _read_parquet(name, index)
        else:
            pieces = _gather(jsonl.read_lines(name), index)
        try:
            for piece in pieces:
                kept = piece if left is None else piece.first(left)
                yield kept
                if left is not None:
                    left -= len(kept.numbers)
                    if left == 0:
                        return
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            raise DataError(f"{name}: cannot be read: {error}") from error


def _known(path: Path) -> bool:
    """Return True if a path within a folder is a data file."""
    hidden = any(part.startswith(".") for part in path.parts)
    return path.name.endswith(SUFFIXES) and not hidden


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _parse_line(line: bytes) -> Any:
    try:
        row = jsonl.parse_line(line)
        if b"\\ud" in line.lower():
            # JSON can encode half of a surrogate pair, which is not a character.
            json.dumps(row, ensure_ascii=False).encode()
        return row
    except UnicodeEncodeError as error:
        return RowError(f"half a surrogate pair in the text ({error.reason})")
    except ValueError as error:
        return RowError(str(error))


def _make(name: str, index: int, *, seed: int, heldout: bool, rows: int) -> Iterator[RowPiece]:
    made = synthetic.synthetic_rows(name, seed=seed, rows=rows, heldout=heldout)
    return _gather(((n, json.dumps(row).encode()) for n, row in enumerate(made, start=1)), index)


def _gather(rows: Iterable[tuple[int, bytes]], index: int) -> Iterator[RowPiece]:
    numbers: list[int] = []
    lines: list[bytes] = []
    size = 0
    for number, line in rows:
        numbers.append(number)
        lines.append(line)
        size += len(line)
        if len(lines) == PIECE_ROWS or size >= PIECE_BYTES:
            yield RowPiece(index, numbers, lines=lines)
            numbers, lines, size = [], [], 0
    if lines:
        yield RowPiece(index, numbers, lines=lines)


def _read_parquet(name: str, index: int) -> Iterator[RowPiece]:
    with pyarrow.parquet.ParquetFile(name) as file:
        start = 1
        for batch in file.iter_batches(batch_size=PIECE_ROWS):
            yield RowPiece(index, range(start, start + batch.num_rows), batch=batch)
            start += batch.num_rows
