"""A few cases of every target, and the harness itself. `make fuzz` runs 100,000."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.harness import LIMIT_S, Failure, Target, fuzz, shown
from fuzz.mutations import ENTROPY, RAW, Choices, json_bytes, mutated, spoiled
from fuzz.targets import TARGETS

from nemocascade.runtime.logging import LOGGER

SEED = 20_261_129
QUICK = {"answers with programs": 3, "answers in mathematics": 5, "command line": 5}
"""Cases of slow targets; the others have 40."""


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    LOGGER.setLevel(logging.CRITICAL)
    yield
    LOGGER.setLevel(logging.INFO)


@pytest.mark.parametrize("name", TARGETS)
def test_no_case_fails_from_inside(name: str) -> None:
    count, failures = fuzz(TARGETS[name], QUICK.get(name, 40), SEED)
    assert count > 1
    assert not failures, "\n\n".join(f"{f.what}\ncase: {f.case}\n{f.trace}" for f in failures)


def digit(choices: Choices) -> int:
    return choices.below(10)


def fails(case: int, folder: Path) -> None:
    if case == 7:
        raise ValueError("rejected")
    if case > 7:
        raise KeyError(case)


def hangs(case: int, folder: Path) -> None:
    end = time.monotonic() + 60
    while case > 4 and time.monotonic() < end:
        pass


def run(target: Target, limit_s: float = LIMIT_S) -> list[Failure]:
    count, failures = fuzz(target, 100, 1, limit_s=limit_s)
    assert count >= 100
    return failures


def test_an_error_that_is_not_promised_is_found() -> None:
    (failure,) = run(Target("x", digit, fails, (ValueError,)))
    assert failure.what.startswith("KeyError at test_fuzz.py:")
    assert failure.case in ("8", "9")
    again = fuzz(Target("x", digit, fails, (ValueError,)), 1, 0, only=bytes.fromhex(failure.data))
    assert [f.what for f in again[1]] == [failure.what]
    assert not run(Target("x", digit, fails, (ValueError, KeyError)))


def test_a_case_without_an_end_is_ended_and_named() -> None:
    started = time.monotonic()
    (failure,) = run(Target("x", digit, hangs, ()), limit_s=0.3)
    assert failure.what == "HangError"
    assert int(failure.case) > 4
    assert time.monotonic() - started < 30


def test_the_same_seed_makes_the_same_cases() -> None:
    def cases(seed: int) -> list[bytes]:
        found: list[bytes] = []
        fuzz(Target("x", digit, lambda case, folder: None, ()), 50, seed, tell=found.append)
        return found

    assert cases(3) == cases(3) != cases(4)


def test_seeds_come_first_and_changes_are_many() -> None:
    seeds = [{"a": [1, "b"]}]
    assert mutated(Choices(bytes(ENTROPY)), seeds) == seeds[0]
    assert spoiled(Choices(bytes(ENTROPY)), b"abc") == b"abc"
    made = {repr(mutated(Choices(bytes([1, i]) * 48), seeds)) for i in range(200)}
    assert len(made) > 50
    assert seeds == [{"a": [1, "b"]}]
    assert json_bytes(["@nan@", "\ud83d"]) == b'[NaN, "\\ud83d"]'
    assert all(json_bytes(name) == raw for name, raw in RAW.items())


@pytest.mark.parametrize("value", [b"[" * 5000 + b"]", ("ab" * 90, {"a": [b"", 1.5]}), "", [()]])
def test_a_case_is_printed_as_an_expression(value: object) -> None:
    text = shown(value)
    assert eval(text) == value
    assert len(text) < 60
