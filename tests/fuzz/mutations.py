"""Cases made from valid values: a few changes each, so that deep code is reached.

All choices come from one string of bytes, which hypothesis draws: zeros choose the
first seed and change nothing.
"""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable, Sequence
from typing import Any

ENTROPY = 96
"""Bytes behind one case."""
MOST_CHANGES = 4

_DEEP = 400
RAW: dict[str, bytes] = {
    "@deep list@": b"[" * 20_000 + b"]" * 20_000,
    "@deep object@": b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
    "@levels@": b"[" * 140 + b"]" * 140,
    "@open@": b"[" * 3000,
    "@twice@": b'{"a": 1, "a": 2}',
    "@digits@": b"1" * 5000,
    "@beyond@": b"1e999",
    "@nan@": b"NaN",
    "@infinity@": b"-Infinity",
    "@half@": b'"\\ud83d"',
    "@bytes@": b'"\xff\xfe"',
    "@comment@": b"1 // one",
    "@single@": b"'a'",
}
"""JSON text, valid or not, in place of such a string."""

TEXTS: tuple[str, ...] = (
    *("", " ", "a", "\n", "\0", "\x1b[2J\x07", "\ud83d", "\udcff", "e\u0301", "\U0001f600"),
    *("NaN", "Infinity", "null", "true", "-0", "1e999", "0x10", "1_000", "²", "٣", "１２"),
    *("[]", "{}", '{"a":', "[" * 5000, '{"a":' * 500, "\\", "%s", "{0.__class__}", "{{ 7*7 }}"),
    *("../secret", "/etc/passwd", "~", "a/../../b", ".", "..", "a\\b", "C:\\a", "a" * 300, "/"),
    *("<think>", "</think>", "<|im_end|>", "<|im_start|>user\n", "<tool_call>", "</tool_call>"),
    *("<function=f>\n", "\\boxed{", "}", "Answer:", "```python\n", "```", "=======", "x" * 5000),
    *("(a+)+$", "[", "(?P<a", "(?i)", "\u202e", "\ufeff", "\u2028", "\r\n", "'", '"', "--"),
)
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 255, 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63, -(2**63), 2**64),
    *(10**30, 10**400, -(10**400), 0.0, -0.0, 0.5, 1.5, -2.5, 1e-320, 1e308, -1e308),
    *(float("nan"), float("inf"), float("-inf")),
)
ODD: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], [{}], {"": None}, {"a": {"a": {"a": 1}}}, [None], [1, "a"]),
    *NUMBERS,
    *TEXTS,
    *RAW,
)


class Choices:
    """A sequence of choices. After its end, every choice is the first option."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def below(self, count: int) -> int:
        """A number in 0..count-1, from two bytes."""
        pair = self._data[self._at : self._at + 2]
        self._at += 2
        return int.from_bytes(pair) % max(1, count)

    def of[T](self, options: Sequence[T]) -> T:
        """One of the options."""
        return options[self.below(len(options))]

    def chance(self, one_in: int) -> bool:
        """True in one of `one_in` cases; False at the end of the choices."""
        return self.below(one_in) == one_in - 1


def mutated(choices: Choices, seeds: Sequence[Any], most: int = MOST_CHANGES) -> Any:
    """A copy of a seed, a JSON value, after up to `most` changes."""
    holder = [copy.deepcopy(choices.of(seeds))]
    for _ in range(choices.below(most + 1)):
        _change(choices, holder, seeds)
    return holder[0]


def _slots(value: Any, found: list[tuple[Any, Any]], depth: int = 0) -> list[tuple[Any, Any]]:
    """Every (container, key) inside of a value."""
    if depth > _DEEP:
        return found
    keys: Any = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], dict | list):
            _slots(value[key], found, depth + 1)
    return found


def _change(choices: Choices, holder: list[Any], seeds: Sequence[Any]) -> None:
    slots = _slots(holder, [])
    where, key = choices.of(slots)
    value = where[key]
    kind = choices.below(12)
    if kind <= 2:
        where[key] = copy.deepcopy(choices.of(ODD))
    elif kind == 3 and where is not holder:
        del where[key]
    elif kind == 4:
        _double(choices, where, key)
    elif kind == 5:
        where[key] = choices.of(([value], {"a": value}, [value, value], [[[value]]]))
    elif kind == 6:
        where[key] = _dumped(value)
    elif kind == 7:
        other, at = choices.of(_slots([copy.deepcopy(choices.of(seeds))], []))
        where[key] = other[at]
    elif kind == 8:
        where[key] = type(value)() if isinstance(value, dict | list | str) else None
    elif kind == 9 and isinstance(where, dict):
        where[choices.of((key.upper(), f" {key}", *TEXTS))] = where.pop(key)
    elif isinstance(value, str):
        where[key] = edited(choices, value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        where[key] = choices.of((value + 1, value - 1, -value, value * 1000, *NUMBERS))
    else:
        where[key] = copy.deepcopy(choices.of(ODD))


def _double(choices: Choices, where: Any, key: Any) -> None:
    times = choices.of((1, 2, 40))
    for number in range(times):
        if isinstance(where, list):
            where.insert(key, copy.deepcopy(where[key]))
        else:
            where[f"{key}{number}"] = copy.deepcopy(where[key])


def edited(choices: Choices, text: str, extra: Sequence[str] = TEXTS) -> str:
    """The text after one change: parts are inserted, removed, repeated or cut off."""
    start = choices.below(len(text) + 1)
    end = min(len(text), start + 1 + choices.below(1 + len(text) // 2))
    kind = choices.below(7)
    if kind <= 1:
        return text[:start] + choices.of(extra) + text[start:]
    if kind == 2:
        return text[:start] + text[end:]
    if kind == 3:
        return text[:start]
    if kind == 4:
        return text[:end] + text[start:end] * choices.of((1, 2, 200)) + text[end:]
    if kind == 5:
        return text[:start] + choices.of(extra) + text[end:]
    return text.swapcase() if choices.chance(2) else text[::-1]


def spoiled(choices: Choices, data: bytes) -> bytes:
    """The bytes, in most cases unchanged; else cut, doubled, flipped, compressed or prefixed."""
    kind = choices.below(24)
    at = choices.below(len(data) + 1)
    size = 1 + choices.below(40)
    changes: dict[int, Callable[[], bytes]] = {
        23: lambda: data[:at],
        22: lambda: data[:at] + data[at + size :],
        21: lambda: data[:at] + data[at : at + size] * 2 + data[at + size :],
        20: lambda: data[:at] + bytes([choices.below(256)]) + data[at + 1 :],
        19: lambda: b"\xef\xbb\xbf" + data,
        18: lambda: gzip.compress(data, mtime=0)[: -choices.below(3) or None],
        17: lambda: data[:at] + choices.of((b"\0", b"\xff", b"\n", b",", b"]", b'"')) + data[at:],
        16: lambda: data.decode(errors="replace").encode(choices.of(("utf-16", "utf-32"))),
    }
    return changes.get(kind, lambda: data)()


def json_bytes(value: Any, *, indent: int | None = None) -> bytes:
    """The value as JSON text, with NaN and half surrogate pairs as Python writes them, and the
    strings of `RAW` replaced."""
    data = _dumped(value, indent).encode()
    for name, raw in RAW.items():
        data = data.replace(json.dumps(name).encode(), raw)
    return data


def _dumped(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent)
