"""Synthetic rows from a seed: word problems in arithmetic with reasoning and a boxed answer.

They serve for trials without a download. In a problem, two or three steps add to a quantity,
subtract from it, multiply or share it. Small numbers and few phrasings make it learnable by a
model of two million parameters. Sharing leaves no remainder and no quantity is negative.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

from nemocascade.runtime.row_errors import DataError

PREFIX = "synthetic:"
VERSION = 1
"""Part of the cache key: increment it with every change of the rows."""

DEFAULT_ROWS = 4096
DEFAULT_HELDOUT_ROWS = 256
HELDOUT_SHARE = 16
"""One problem in this many is held out, decided by the hash of its text."""

_NAMES = ("Ana", "Ben", "Chen", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivan", "Jo", "Kim", "Leo")
_THINGS = ("apples", "books", "coins", "marbles", "stamps", "shells", "pens", "cards")
_OPENINGS = (
    "{name} has {n} {thing}.",
    "At first {name} owns {n} {thing}.",
    "{name} starts with {n} {thing}.",
)
_STEPS = {
    "+": (
        "{name} buys {k} more.",
        "A friend gives {name} {k} more.",
        "Then {name} finds {k} more.",
    ),
    "-": ("{name} gives away {k}.", "Then {name} loses {k}.", "{name} sells {k} of them."),
    "*": (
        "The number then grows to {k} times as many.",
        "A wish makes it {k} times as many.",
    ),
    "/": (
        "{name} shares them equally among {k} boxes and keeps one box.",
        "Split into {k} equal parts, only one part is kept.",
    ),
}
_QUESTIONS = (
    "How many {thing} does {name} have now?",
    "How many {thing} are left with {name}?",
    "What number of {thing} does {name} end with?",
)
_LARGEST = 99


def synthetic_rows(
    name: str, *, seed: int, rows: int = 0, heldout: bool = False
) -> Iterator[dict[str, Any]]:
    """Yield `rows` distinct rows in the `messages` format.

    name: `synthetic:arithmetic`.
    rows: 0 = 4096, or 256 if held out.
    heldout: yield held-out problems. The split is by the hash of the problem's text, so no problem
        is in both splits, whatever the seeds.

    Raises DataError for an unknown name.
    """
    make = _MAKERS.get(name.removeprefix(PREFIX))
    if make is None:
        known = ", ".join(PREFIX + key for key in _MAKERS)
        raise DataError(f"{name}: no such synthetic data, known are {known}")
    rng = random.Random(f"{name}/{seed}/{heldout}")
    seen: set[bytes] = set()
    for _ in range(rows or (DEFAULT_HELDOUT_ROWS if heldout else DEFAULT_ROWS)):
        while True:
            problem, reasoning, answer = make(rng)
            digest = hashlib.sha256(problem.encode()).digest()[:16]
            if (digest[0] % HELDOUT_SHARE == 0) == heldout and digest not in seen:
                break
        seen.add(digest)
        messages = [
            {"role": "user", "content": problem},
            {"role": "assistant", "reasoning_content": reasoning, "content": answer},
        ]
        yield {"messages": messages}


def _arithmetic(rng: random.Random) -> tuple[str, str, str]:
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    value = rng.randint(2, 20)
    problem = [rng.choice(_OPENINGS).format(name=name, n=value, thing=thing)]
    worked = []
    for _ in range(rng.choice((2, 2, 3))):
        sign, k, result = _step(rng, value)
        problem.append(rng.choice(_STEPS[sign]).format(name=name, k=k))
        worked.append(f"{value} {sign} {k} = {result}.")
        value = result
    problem.append(rng.choice(_QUESTIONS).format(name=name, thing=thing))
    # The answer repeats the steps, so that it can be learnt with thinking off.
    answer = f"{' '.join(worked)} {name} has {value} {thing}. \\boxed{{{value}}}"
    return " ".join(problem), "\n".join(worked), answer


def _step(rng: random.Random, value: int) -> tuple[str, int, int]:
    """Choose one operation that keeps the quantity within 1.._LARGEST."""
    choices: list[tuple[str, int, int]] = []
    if value < _LARGEST:
        k = rng.randint(1, min(20, _LARGEST - value))
        choices.append(("+", k, value + k))
    if value > 1:
        k = rng.randint(1, value - 1)
        choices.append(("-", k, value - k))
    choices += [("*", k, value * k) for k in (2, 3) if value * k <= _LARGEST]
    choices += [("/", k, value // k) for k in (2, 3, 4) if value % k == 0]
    return rng.choice(choices)


_MAKERS: dict[str, Callable[[random.Random], tuple[str, str, str]]] = {"arithmetic": _arithmetic}
