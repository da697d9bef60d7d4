"""Readers: row numbers, kinds of files, bad rows, limits."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers.data import GSM8K_TRAIN, needs_gsm8k, read_rows, write_jsonl

from nemocascade.data import readers
from nemocascade.data.errors import BadRows, DataError
from nemocascade.data.readers import find_sources, read_pieces

ROWS = [{"question": f"q{i}", "answer": "a" * i} for i in range(1200)]


def _read(path: Path, **limits: Any) -> list[tuple[str, object]]:
    return list(read_rows(find_sources([str(path)]), BadRows(0), **limits))


def test_jsonl_gzip_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    plain = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    zipped = tmp_path / "zipped.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    columns = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), columns, row_group_size=100)
    for path in (plain, zipped, columns):
        rows = _read(path)
        assert [row for _, row in rows] == ROWS
        assert [place for place, _ in rows] == [f"{path}:{i}" for i in range(1, 1201)]


def test_pieces_are_small_and_only_those_asked_for_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.setattr(readers, "PIECE_ROWS", 50)
    sizes = [len(piece.numbers) for piece in read_pieces([str(path)], max_rows=120)]
    assert sizes == [50, 50, 20]
    monkeypatch.setattr(readers, "PIECE_BYTES", 500)
    assert max(sum(map(len, p.lines or ())) for p in read_pieces([str(path)])) < 500 + 1300


def test_lines_are_counted_with_blank_ones(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], "", "   ", ROWS[1]])
    assert _read(path) == [(f"{path}:1", ROWS[0]), (f"{path}:4", ROWS[1])]


def test_max_rows_counts_over_all_files(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_jsonl(tmp_path / f"{name}.jsonl", ROWS[:10])
    places = [Path(place).name for place, _ in _read(tmp_path, max_rows=12)]
    assert places == [f"a.jsonl:{i}" for i in range(1, 11)] + ["b.jsonl:1", "b.jsonl:2"]


def test_folders_are_walked_by_name_and_other_files_left(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    write_jsonl(tmp_path / "part" / "x.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    (tmp_path / "README.md").write_text("notes")
    (tmp_path / ".cache").mkdir()
    write_jsonl(tmp_path / ".cache" / "y.jsonl", ROWS[:1])
    write_jsonl(tmp_path / ".z.jsonl", ROWS[:1])
    found = find_sources([str(tmp_path), "synthetic:arithmetic"])
    assert found == [
        str(tmp_path / "a.jsonl"),
        str(tmp_path / "part" / "x.jsonl"),
        "synthetic:arithmetic",
    ]


def test_bad_rows_are_named_counted_and_refused_over_the_limit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [ROWS[0], "{broken", ROWS[1], "[" * 100_000])
    bad = BadRows(2)
    assert len(list(read_rows([str(path)], bad))) == 2
    assert bad.count == 2
    assert bad.examples[0].startswith(f"{path}:2: not JSON")
    assert bad.examples[1].startswith(f"{path}:4: ")
    with pytest.raises(DataError, match=rf"2 bad rows.*max_bad_rows is 1(.|\n)*{path}:2: not JSON"):
        list(read_rows([str(path)], BadRows(1)))


def test_text_that_is_no_unicode_is_a_bad_row(tmp_path: Path) -> None:
    whole = '{"question": "\\ud83d\\ude00", "answer": "b"}'
    path = write_jsonl(tmp_path / "rows.jsonl", [whole, whole.replace("\\ude00", "")])
    with path.open("ab") as stream:
        stream.write(b'{"question": "\xff", "answer": "b"}')
    bad = BadRows(2)
    assert [row["question"] for _, row in read_rows([str(path)], bad)] == ["\U0001f600"]
    assert "rows.jsonl:2: half a surrogate pair" in bad.examples[0]
    assert "rows.jsonl:3: not JSON" in bad.examples[1]


def test_only_the_first_bad_rows_are_shown() -> None:
    bad = BadRows(5)
    for i in range(20):
        bad.add(f"f:{i}", "reason")
    with pytest.raises(DataError, match="and 12 more"):
        bad.check()


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("absent.jsonl", "no such file"), ("rows.csv", "unknown kind"), ("", "holds no file")],
)
def test_paths_that_cannot_be_read_are_refused(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(DataError, match=complaint):
        find_sources([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.parquet"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith(".gz"):
        path.write_bytes(gzip.compress(json.dumps(ROWS).encode())[:-40])
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=f"{path}: cannot be read"):
        list(read_pieces([str(path)]))


def test_what_a_parquet_row_lacks_is_absent(tmp_path: Path) -> None:
    """One column type holds the fields of all rows."""
    rows = [
        {"call": {"name": "f", "arguments": {"x": 1}}, "list": [{"a": "b"}]},
        {"call": {"name": "g", "arguments": {"y": "z"}}, "list": [{"c": 2.0}, {"a": "d"}]},
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [row for _, row in _read(path)] == rows


@needs_gsm8k
def test_gsm8k_is_read_whole() -> None:
    rows = list(read_rows([str(GSM8K_TRAIN)], BadRows(0)))
    assert len(rows) == 7473
    assert all(set(row) == {"question", "answer"} for _, row in rows)
    assert rows[-1][0] == f"{GSM8K_TRAIN}:7473"
