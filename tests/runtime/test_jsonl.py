"""The JSONL reader: line numbers, damaged lines, and blank lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nemocascade.runtime.jsonl import (
    json_text,
    parse_line,
    read_lines,
    read_objects,
    read_undamaged,
)


def test_lines_keep_their_numbers_and_blank_ones_are_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \r\n{"a": 2}')
    assert list(read_lines(path)) == [(1, b'{"a": 1}\n'), (4, b'{"a": 2}')]
    assert list(read_objects(path)) == [("rows.jsonl:1", {"a": 1}), ("rows.jsonl:4", {"a": 2})]


def test_only_line_feeds_end_lines(tmp_path: Path) -> None:
    """Text may hold other separators of Unicode, which `str.splitlines` cuts at."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a\u2028b\x85c"}\n', encoding="utf-8")
    (row,) = read_objects(path)
    assert row == ("rows.jsonl:1", {"text": "a\u2028b\x85c"})
    (kept,) = read_undamaged(path, pytest.fail)
    assert kept == ('{"text": "a\u2028b\x85c"}', {"text": "a\u2028b\x85c"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1', r"rows\.jsonl:2: not JSON \(Expecting"),
        ("[" * 100_000, r"rows\.jsonl:2: JSON nested too deep"),
        ("1" * 5000, r"rows\.jsonl:2: not JSON \(Exceeds the limit"),
        ("[1]", r"rows\.jsonl:2: a row must be an object, it is list"),
        ("null", r"rows\.jsonl:2: a row must be an object, it is NoneType"),
    ],
)
def test_damaged_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"a": 1}}\n{line}\n{{"a": 3}}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        list(read_objects(path))
    damaged: list[str] = []
    assert [row for _, row in read_undamaged(path, damaged.append)] == [{"a": 1}, {"a": 3}]
    assert damaged == [line]


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: not JSON"):
        list(read_objects(path))
    assert [row for _, row in read_undamaged(path, pytest.fail)] == [{"a": "\ufffd"}]


def test_values_beyond_strict_json() -> None:
    assert math.isnan(parse_line(b"NaN"))
    assert parse_line(b'{"a": 1, "a": 2}') == {"a": 2}
    assert parse_line(rb'"\ud800"') == "\ud800"
    assert parse_line(b"1" * 4000) == int("1" * 4000)


def test_half_a_surrogate_pair_is_written_escaped_and_comes_back() -> None:
    value = {"\ud83d": ["\udfff é", "\\ud83d", "\U0001f600"]}
    text = json_text(value)
    assert text.encode() == b'{"\\ud83d": ["\\udfff \xc3\xa9", "\\\\ud83d", "\xf0\x9f\x98\x80"]}'
    assert json.loads(text) == value
