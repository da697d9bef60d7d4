"""Records read back from JSON: every field has its type, or is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import pytest

from nemocascade.runtime.stored_records import record_of


@dataclass(frozen=True)
class Inner:
    name: str
    score: float | None = None


@dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    count: int
    done: bool
    inner: Inner
    by_name: dict[str, Inner] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    free: Any = None
    rates: Mapping[str, float] = field(default_factory=dict)


WHOLE = Outer("b", 3, True, Inner("x", 1), {"y": Inner("y")}, ["t"], {"z": [1, None]}, {"a": 1.5})


def test_a_record_comes_back() -> None:
    assert record_of(Outer, asdict(WHOLE)) == WHOLE
    assert record_of(Inner, {"name": "x"}) == Inner("x")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kind": "c"}, "Outer.kind"),
        ({"kind": ["a"]}, "Outer.kind"),
        ({"count": True}, "Outer.count"),
        ({"count": 1.0}, "Outer.count"),
        ({"done": 1}, "Outer.done"),
        ({"inner": None}, "Outer.inner"),
        ({"inner": {"name": 5}}, "Outer.inner.name"),
        ({"inner": {"name": "x", "score": "1"}}, "Outer.inner.score"),
        ({"inner": {"score": 1.0}}, "Outer.inner has no field 'name'"),
        ({"by_name": [1]}, "Outer.by_name"),
        ({"by_name": {"y": 5}}, "Outer.by_name.y"),
        ({"texts": "t"}, "Outer.texts"),
        ({"texts": ["t", None]}, "Outer.texts.1"),
        ({"rates": {"a": "1"}}, "Outer.rates.a"),
        ({"rates": {"a": 10**400}}, "Outer.rates.a"),
        ({"more": 1}, "Outer has an unknown field 'more'"),
    ],
    ids=str,
)
def test_a_field_of_another_type_is_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        record_of(Outer, {**asdict(WHOLE), **change})


@pytest.mark.parametrize("value", [None, 5, "x", [], [{}]])
def test_what_is_no_object_is_no_record(value: object) -> None:
    with pytest.raises(ValueError, match="Outer cannot be"):
        record_of(Outer, value)
