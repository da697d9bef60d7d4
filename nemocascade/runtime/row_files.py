"""The common reader of data files: JSON Lines, JSON arrays and Parquet, plain or compressed.

Rows are read in chunks of a few hundred rows of one file. A chunk is small and carries its
row numbers, so another process can parse it; no file is ever entirely in memory.
"""

from __future__ import annotations

import codecs
import gzip
import io
import os
import re
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow

from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.parquet_rows import batch_row, read_batches, unread_columns
from nemocascade.runtime.row_errors import DataError, RowError
from nemocascade.runtime.strict_json import parse_json

KINDS = ".jsonl, .json (both also .gz or .zst) and .parquet"
CHUNK_ROWS = 512
CHUNK_BYTES = 4 << 20

_NAME = re.compile(r".*\.(?:(jsonl|json)(?:\.(?:gz|zst))?|(parquet))")
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
COMPRESSED = (_GZIP, _ZSTD)
"""First bytes of compressed files."""
_OTHER_ENCODINGS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_TOKEN = re.compile(rb'["\[\]{},]')
_STRING_END = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_SHOWN = 5


@dataclass(frozen=True)
class RowChunk:
    """A chunk of raw rows of one file.

    source: index into the caller's list of files.
    numbers: number of each row, from 1: its line, or its position in the array or Parquet file.
    lines: raw JSON, or None for Parquet.
    batch: the Parquet rows, or None for JSON.
    """

    source: int
    numbers: Sequence[int]
    lines: list[bytes] | None = None
    batch: pyarrow.RecordBatch | None = None

    def rows(self) -> Iterator[tuple[int, Any]]:
        """Yield (row number, row); an unreadable row is yielded as a RowError."""
        for index, number in enumerate(self.numbers):
            try:
                if self.batch is None:
                    assert self.lines is not None
                    yield number, parse_json(self.lines[index])
                else:
                    yield number, batch_row(self.batch, index)
            except RowError as error:
                yield number, error

    def first(self, rows: int) -> RowChunk:
        """Return the chunk truncated to `rows` rows."""
        return RowChunk(
            self.source,
            self.numbers[:rows],
            lines=None if self.lines is None else self.lines[:rows],
            batch=None if self.batch is None else self.batch.slice(0, rows),
        )


def is_built(path: str | Path) -> bool:
    """Return True for a folder that `nemocascade data build` has written: tokens, no rows."""
    return all(Path(path, name).is_file() for name in ("manifest.json", "offsets.bin"))


def find_files(name: str | Path) -> list[str]:
    """Return the data files at a path: the file, or those of a folder in the order of their names.

    Hidden files and folders (`.cache`) and files of other kinds are skipped, see `skipped_files`.
    Raises DataError for a path that does not exist, a folder without data or of tokens, or an
    unknown kind.
    """
    path = Path(name).expanduser()
    if is_built(path):
        raise DataError(
            f"{path} was written by `nemocascade data build` and holds tokens, no rows: where "
            "rows are read, name their files"
        )
    if path.is_dir():
        found = [str(file) for file in _below(path) if _is_data(file, path)]
        if not found:
            raise DataError(f"{path}: the folder holds no file of {KINDS}")
        return found
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "no such file or folder"
        raise DataError(f"{path}: {what}; name data files, or folders of them")
    if not kind_of(path):
        raise DataError(f"{path}: unknown kind of file, known are {KINDS}")
    return [str(path)]


def is_data_file(file: Path) -> bool:
    """Return True for a regular file whose name has a known kind."""
    return kind_of(file) is not None and file.is_file()


def report_skipped(name: str | Path, columns: Collection[str] | None = None) -> None:
    """Log what `read_chunks` will not read at a path: other files of a folder, and Parquet columns
    whose type JSON does not have. columns: those that are needed; None = all.
    """
    path = Path(name).expanduser()
    skipped: list[str] = []
    if path.is_dir():
        skipped = [str(f.relative_to(path)) for f in _below(path) if not _is_data(f, path)]
    if skipped:
        LOGGER.info(
            "%s: %d files are skipped: %s; data are %s, and not hidden",
            path,
            len(skipped),
            _some(skipped),
            KINDS,
        )
    for file in find_files(path):
        if kind_of(Path(file)) == "parquet":
            with reading(file):
                unread = unread_columns(file, columns)
            if unread:
                LOGGER.info(
                    "%s: JSON has no type for these columns, they are not read: %s",
                    file,
                    _some(unread),
                )


def read_chunks(
    path: str,
    source: int = 0,
    *,
    columns: Collection[str] | None = None,
    part: range | None = None,
) -> Iterator[RowChunk]:
    """Yield the rows of a file in order, in chunks. Blank lines are skipped.

    source: stored in the chunks. columns: Parquet columns to read; None = all. Fields whose type
    JSON does not have are not read, see `report_skipped`. part: one of `row_parts.parts_of`; lines
    are then numbered from the part's first. A part may hold no row.

    Raises DataError if the file as a whole is damaged, is empty, or has none of the columns.
    """
    rows = 0
    kind = kind_of(Path(path))
    with reading(path):
        if kind == "parquet":
            chunks: Iterator[RowChunk] = (
                RowChunk(source, range(start, start + batch.num_rows), batch=batch)
                for start, batch in read_batches(path, columns, CHUNK_ROWS, part)
            )
        elif part is not None and part.start:
            chunks = gather(_lines_within(path, part), source)
        else:
            rows_of = _json_rows(path, array=kind == "json", stop=part.stop if part else None)
            chunks = gather(rows_of, source)
        for chunk in chunks:
            rows += len(chunk.numbers)
            yield chunk
    if not rows and part is None:
        raise DataError(f"{path}: no row can be read (the file is empty); take it out")


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield (`file:row`, row) of a file; an unreadable row is a RowError. Raises as read_chunks."""
    for chunk in read_chunks(str(path)):
        for number, row in chunk.rows():
            yield f"{path}:{number}", row


def gather(rows: Iterable[tuple[int, bytes]], source: int) -> Iterator[RowChunk]:
    """Group rows of raw JSON, with their numbers, into chunks."""
    numbers: list[int] = []
    lines: list[bytes] = []
    size = 0
    for number, line in rows:
        numbers.append(number)
        lines.append(line)
        size += len(line)
        if len(lines) == CHUNK_ROWS or size >= CHUNK_BYTES:
            yield RowChunk(source, numbers, lines=lines)
            numbers, lines, size = [], [], 0
    if lines:
        yield RowChunk(source, numbers, lines=lines)


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn errors of a damaged file into a DataError that names it."""
    try:
        yield
    # Parquet's metadata holds texts of its own.
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def kind_of(path: Path) -> str | None:
    """Return jsonl, json or parquet by a file's name; None for an unknown kind."""
    match = _NAME.fullmatch(path.name.lower())
    return None if match is None else match[1] or match[2]


def _is_data(file: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
    return is_data_file(file) and not hidden


def _below(folder: Path) -> list[Path]:
    """Files below a folder, and links to folders, which are not followed; sorted."""

    def fail(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read: {error}") from error

    found = []
    for root, folders, files in os.walk(folder, onerror=fail):
        found += [Path(root, name) for name in files]
        found += [link for name in folders if (link := Path(root, name)).is_symlink()]
    return sorted(found)


def _json_rows(path: str, *, array: bool, stop: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, raw JSON) of each line that is not blank, or of each array element.

    array: the file may be one array. stop: read only lines that start before this byte.
    """
    with _open(path) as stream:
        head = stream.peek(4)[:4]
        for mark, text in _OTHER_ENCODINGS:
            if head.startswith(mark):
                raise DataError(
                    f"{path}: the text is {text}: convert it to UTF-8 (iconv -f {text} -t UTF-8)"
                )
        if head.startswith(codecs.BOM_UTF8):
            stream.read(len(codecs.BOM_UTF8))
        if array and stream.peek(1 << 12).lstrip().startswith(b"["):
            yield from enumerate(_elements(stream), start=1)
            return
        lines = stream if stop is None else _lines_before(stream, stop)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, line


def _lines_within(path: str, part: range) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line) of the lines that start in these bytes and are not blank."""
    with _open(path) as stream:
        stream.seek(part.start - 1)
        stream.readline()
        for number, line in enumerate(_lines_before(stream, part.stop), start=1):
            if line.strip():
                yield number, line


def _lines_before(stream: BinaryIO, stop: int) -> Iterator[bytes]:
    """Yield the lines that start before byte `stop`."""
    at = stream.tell()
    while at < stop and (line := stream.readline()):
        at += len(line)
        yield line


def _open(path: str) -> io.BufferedReader[Any]:
    """Open a file for reading; its first bytes say if it is compressed."""
    plain: io.BufferedReader[Any] = io.BufferedReader(io.FileIO(path))
    head = plain.peek(4)
    if head.startswith(_GZIP):
        return io.BufferedReader(cast(io.RawIOBase, gzip.GzipFile(fileobj=plain)))
    if head.startswith(_ZSTD):
        return io.BufferedReader(pyarrow.CompressedInputStream(plain, "zstd"))
    return plain


def _elements(stream: BinaryIO) -> Iterator[bytes]:
    """Yield the raw JSON of each element of an array, without its separators.

    Only strings and brackets are told apart: what is wrong in an element is found by its parser.
    Raises EOFError if the array does not end, or something follows it.
    """
    data, start, at, depth, count = b"", 0, 0, 0, 0
    size = CHUNK_BYTES
    while more := stream.read(size):
        data, at, start = data[start:] + more, at - start, 0
        while token := _TOKEN.search(data, at):
            at, found = token.end(), token[0]
            if found == b'"':
                end = _STRING_END.match(data, at)
                if end is None:
                    # The string ends in a later chunk: go back to its start.
                    at -= 1
                    break
                at = end.end()
            elif found in b"[{":
                depth += 1
                start = at if depth == 1 else start
            elif depth == 1:
                element = data[start : at - 1]
                if element.strip() or count or found == b",":
                    count += 1
                    yield element
                start = at
                if found != b",":
                    if (data[at:] + stream.read(size)).strip():
                        raise EOFError(f"something follows the array of {count} rows")
                    return
            elif found != b",":
                depth -= 1
        else:
            at = len(data)
        # An element larger than the buffer is not scanned many times.
        size = max(CHUNK_BYTES, len(data) - start)
    raise EOFError(f"the array does not end, after {count} rows")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
