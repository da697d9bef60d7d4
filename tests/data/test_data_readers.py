"""Readers: row numbers, kinds of files, bad rows, limits."""

from __future__ import annotations

import gzip
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from helpers.data import GSM8K_TRAIN, needs_gsm8k, read_rows, write_jsonl

from nemocascade.data.readers import find_sources, read_chunks
from nemocascade.runtime import row_files
from nemocascade.runtime.row_errors import BadRows, DataError
from nemocascade.runtime.row_files import report_skipped

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
    monkeypatch.setattr(row_files, "CHUNK_ROWS", 50)
    sizes = [len(chunk.numbers) for chunk in read_chunks([str(path)], max_rows=120)]
    assert sizes == [50, 50, 20]
    monkeypatch.setattr(row_files, "CHUNK_BYTES", 500)
    assert max(sum(map(len, p.lines or ())) for p in read_chunks([str(path)])) < 500 + 1300


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


def test_bad_rows_are_named_counted_and_rejected_over_the_limit(tmp_path: Path) -> None:
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
    assert "rows.jsonl:3: not UTF-8 (invalid start byte at byte 14)" in bad.examples[1]


def test_only_the_first_bad_rows_are_shown() -> None:
    bad = BadRows(5)
    for i in range(20):
        bad.add(f"f:{i}", "reason")
    with pytest.raises(DataError, match="and 12 more"):
        bad.check()


def _zstd(data: bytes) -> bytes:
    return bytes(pyarrow.Codec("zstd").compress(data, asbytes=True))


@pytest.mark.parametrize("compress", [None, gzip.compress, _zstd])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, compress: Callable[[bytes], bytes] | None, mark: bytes
) -> None:
    """JSON Lines and arrays, in any case of letters, compressed, with a byte order mark."""
    rows = [{"q": '"[{\\,]', "n": [i, {"a": "]\u00e4"}]} for i in range(1200)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    array = f" {json.dumps(rows, indent=1)}\n".encode()
    end = "" if compress is None else ".zst" if compress is _zstd else ".gz"
    for name, data in (
        ("a.jsonl", lines),
        ("B.JSONL", lines),
        ("c.json", lines),
        ("d.json", array),
    ):
        path = tmp_path / (name + end)
        path.write_bytes((compress or bytes)(mark + data))
        found = _read(path)
        assert [row for _, row in found] == rows
        assert [found[0][0], found[-1][0]] == [f"{path}:1", f"{path}:1200"]


def test_the_first_bytes_say_if_a_file_is_compressed(tmp_path: Path) -> None:
    for name in ("a.jsonl", "a.jsonl.gz", "a.json.zst"):
        for data in (b'{"a": 1}', gzip.compress(b'{"a": 1}'), _zstd(b'{"a": 1}\n') * 2):
            (tmp_path / name).write_bytes(data)
            assert next(row for _, row in _read(tmp_path / name)) == {"a": 1}


@pytest.mark.parametrize("size", [1, 7, 100])
def test_arrays_are_read_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    rows = [{"t": '\\"x\\\\"' * i, "n": [[], {}, [{}]]} for i in range(20)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    monkeypatch.setattr(row_files, "CHUNK_BYTES", size)
    assert [row for _, row in _read(path)] == rows


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b'[{"a": 1}', "the array does not end, after 0 rows"),
        (b'[{"a": 1}, {"a": "', "the array does not end, after 1 rows"),
        (b'[{"a": 1}] {"a": 2}', "something follows the array of 1 rows"),
        (b'[{"a": 1},]', r"rows\.json:2: not JSON"),
        (b'[{"a": 1} {"a": 2}]', r"rows\.json:1: not JSON"),
        (b"[]", "the file is empty"),
        (b" \n", "the file is empty"),
        ("[{}]".encode("utf-16"), "the text is UTF-16: convert it to UTF-8"),
        ("[{}]".encode("utf-32"), "the text is UTF-32"),
        (b'{"a": 1}\n{"a": 1, "a": 2}', r"rows\.json:2: the key 'a' occurs twice"),
    ],
)
def test_damaged_json_is_named(tmp_path: Path, data: bytes, complaint: str) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=complaint) as caught:
        _read(path)
    assert str(path) in str(caught.value)


def test_skipped_files_are_counted_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS[:1])
    write_jsonl(tmp_path / ".b.jsonl", ROWS[:1])
    (tmp_path / "x.csv").write_text("a,b")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    (tmp_path / "more").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "y.jsonl").mkdir()
    write_jsonl(tmp_path / "y.jsonl" / "z.json", ROWS[:1])
    with caplog.at_level(logging.INFO, logger="nemocascade"):
        report_skipped(tmp_path)
    assert "5 files are skipped: .b.jsonl, gone.jsonl, more, pipe.jsonl, x.csv;" in caplog.text
    assert [Path(f).name for f in find_sources([str(tmp_path)])] == ["a.jsonl", "z.json"]
    with pytest.raises(DataError, match=r"pipe\.jsonl: is not a regular file"):
        find_sources([str(tmp_path / "pipe.jsonl")])
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        find_sources([str(tmp_path / "gone.jsonl")])


def test_columns_of_other_types_are_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nanoseconds cannot become a Python value without pandas, and a map is not a JSON object."""
    turn = pyarrow.struct([("role", pyarrow.string()), ("at", pyarrow.timestamp("ns"))])
    table = pyarrow.table(
        {
            "messages": pyarrow.array([[{"role": "user", "at": 1}]], pyarrow.list_(turn)),
            "when": pyarrow.array([1], pyarrow.timestamp("ns")),
            "map": pyarrow.array([[("a", 1)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
            "bytes": pyarrow.array([b"\xff"]),
            "n": pyarrow.array([3], pyarrow.int8()),
        }
    )
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    messages = [{"role": "user"}]
    assert _read(path) == [(f"{path}:1", {"messages": messages, "n": 3})]
    assert _read(path, columns={"messages"}) == [(f"{path}:1", {"messages": messages})]
    with caplog.at_level(logging.INFO, logger="nemocascade"):
        report_skipped(path)
    assert "not read: messages.list.element.at, when, map.key_value.key, " in caplog.text
    with pytest.raises(DataError, match=r"none of its columns messages, .* read as question"):
        _read(path, columns={"question"})


def test_values_of_columns_are_as_strict_as_json(tmp_path: Path) -> None:
    buffers = [pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffb")]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, [None, *buffers])
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"x": pyarrow.array([float("nan"), 1.0, 2.0]), "t": text})
    pyarrow.parquet.write_table(table, path)
    bad = BadRows(2)
    assert list(read_rows([str(path)], bad)) == [(f"{path}:3", {"x": 2.0, "t": "b"})]
    assert "1: the value nan is not JSON" in bad.examples[0]
    assert "2: a text that is not UTF-8" in bad.examples[1]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("absent.jsonl", "no such file"), ("rows.csv", "unknown kind"), ("", "holds no file")],
)
def test_paths_that_cannot_be_read_are_rejected(tmp_path: Path, name: str, complaint: str) -> None:
    (tmp_path / "rows.csv").write_text("a,b")
    with pytest.raises(DataError, match=complaint):
        find_sources([str(tmp_path / name)])


@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.jsonl.zst", "cut.parquet", "empty.parquet"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    data = json.dumps(ROWS).encode()
    if name.startswith("empty"):
        path.touch()
    elif not name.endswith(".parquet"):
        path.write_bytes((gzip.compress if name.endswith(".gz") else _zstd)(data)[:-40])
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=f"{path}: cannot be read"):
        list(read_chunks([str(path)]))


def test_a_parquet_file_with_damaged_names_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"]}), path)
    path.write_bytes(path.read_bytes().replace(b"question", b"\xffuestion"))
    with pytest.raises(DataError, match=f"{path}: cannot be read"):
        list(read_chunks([str(path)]))


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
