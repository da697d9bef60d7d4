"""Rows of Parquet files: the columns whose values are JSON values, and no others."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from nemocascade.runtime.row_errors import DataError, RowError
from nemocascade.runtime.strict_json import check_json


def read_batches(
    path: str, columns: Collection[str] | None, rows: int, groups: range | None = None
) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """Yield (number of its first row, from 1, batch) of at most `rows` rows.

    columns: those to read; None = all. groups: row groups to read; None = all.
    Raises DataError if there are no columns to read.
    """
    with pyarrow.parquet.ParquetFile(path) as file:
        names, _ = _columns(path, file, columns)
        start = 1
        if groups is not None:
            start += sum(file.metadata.row_group(i).num_rows for i in range(groups.start))
        for batch in file.iter_batches(batch_size=rows, row_groups=groups, columns=names):
            yield start, batch
            start += batch.num_rows


def unread_columns(path: str, columns: Collection[str] | None) -> list[str]:
    """Return the paths of the columns that are not read because of their type."""
    with pyarrow.parquet.ParquetFile(path) as file:
        return _columns(path, file, columns)[1]


def batch_row(batch: pyarrow.RecordBatch, index: int) -> Any:
    """Return a row of a batch. Raises RowError if it is not a JSON value."""
    try:
        (row,) = batch.slice(index, 1).to_pylist()
    except UnicodeDecodeError as error:
        raise RowError(f"a text that is not UTF-8 ({error.reason})") from None
    # A Parquet column has one type for all rows, so fields absent from a row are null.
    row = _without_nulls(row)
    check_json(row)
    return row


def _columns(path: str, file: Any, columns: Collection[str] | None) -> tuple[list[str], list[str]]:
    """Return the paths of the leaf columns to read, and of those whose type JSON does not have.

    Raises DataError if no needed column can be read, or two have one name.
    """
    schema = file.schema_arrow
    if len(set(schema.names)) < len(schema.names):
        raise DataError(f"{path}: two columns have one name: {', '.join(schema.names)}")
    leaves = [
        (field.name, readable, file.schema.column(i).path)
        for i, (field, readable) in enumerate(
            (field, readable) for field in schema for readable in _leaves(field.type)
        )
    ]
    wanted = [leaf for leaf in leaves if columns is None or leaf[0] in columns]
    names = [name for _, readable, name in wanted if readable]
    if not names:
        raise DataError(
            f"{path}: none of its columns {', '.join(schema.names)} can be read as "
            f"{', '.join(sorted(columns or ('JSON',)))}: name its fields in the settings"
        )
    return names, [name for _, readable, name in wanted if not readable]


def _leaves(kind: Any) -> Iterator[bool]:
    """Yield, for each leaf column of an Arrow type, True if its values are JSON values."""
    types = pyarrow.types
    if types.is_map(kind):
        yield from (False for part in (kind.key_type, kind.item_type) for _ in _leaves(part))
    elif types.is_struct(kind):
        yield from (readable for field in kind for readable in _leaves(field.type))
    elif types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        yield from _leaves(kind.value_type)
    else:
        kind = kind.value_type if types.is_dictionary(kind) else kind
        yield (
            types.is_string(kind)
            or types.is_large_string(kind)
            or types.is_boolean(kind)
            or types.is_integer(kind)
            or types.is_float32(kind)
            or types.is_float64(kind)
            or types.is_null(kind)
        )


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(v) for key, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value
