r"""Mathematics: the last `\boxed{...}` against the expected answer, by `math-verify`."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemocascade.envs.base import CheckedDomain, final_text, last_boxed
from nemocascade.envs.benchmark_rows import gsm8k_row, is_of, math_row
from nemocascade.envs.row_forms import RowForm
from nemocascade.envs.words import NAMES, NOUNS
from nemocascade.runtime.turns import kind_of
from nemocascade.types import Message, Prompt, Row, Verdict

LONGEST_ANSWER = 2000
"""Maximum characters of an answer; a longer box is not an answer and is not parsed."""
_LIST_OF_TEXTS = re.compile(r'\s*\[\s*"')


class Mathematics(CheckedDomain):
    """1 if the last box equals the expected answer, else 0. Algebra runs in a killable child."""

    domain = "math"
    answered_tools = ()
    row_forms = (
        RowForm(
            "an expected answer (NeMo Gym)",
            read={"expected_answer": "a text or a number, compared with the last box"},
        ),
        RowForm(
            "GSM8K, as published",
            read={
                "question": "the prompt, where `answer` ends with `#### number`",
                "answer": "the steps, and the expected number; in MATH-500 the expected answer",
            },
        ),
        RowForm(
            "MATH and MATH-500, as published",
            read={
                "problem": "the prompt",
                "solution": "its last box, if there is no `answer`; with `problem` alone",
            },
            ignored=dict.fromkeys(("level", "type", "unique_id"), "a class of rows"),
        ),
    )

    def claims(self, row: Row) -> bool:
        if "expected_answer" in row:
            return "options" not in row
        return is_of("math", row) or (is_of("gsm8k", row) and "####" in str(row["answer"]))

    def prepare(self, row: Row, folder: Path) -> Row:
        if "expected_answer" in row:
            return {**row, "worked": ""}
        made = math_row(row) if is_of("math", row) else gsm8k_row(row)
        return {**row, **made}

    def solution(self, row: Row) -> Sequence[Message]:
        return (Message("assistant", row["worked"]),) if row["worked"] else ()

    def parse(self, row: Row) -> Mapping[str, Any]:
        expected = row["expected_answer"]
        if isinstance(expected, bool) or not isinstance(expected, str | int | float):
            raise ValueError(
                f"expected_answer must be a text or a number, it is {kind_of(expected)}"
            )
        if not str(expected).strip():
            raise ValueError("expected_answer is empty")
        if _LIST_OF_TEXTS.match(str(expected)):
            raise ValueError(
                "expected_answer is a list of texts, as in rows about walks on graphs: it is not a "
                "formula, and math cannot compare it"
            )
        return {"expected": str(expected)}

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        found, expected = last_boxed(final_text(response)), prompt.answer["expected"]
        details = {"found": found, "expected": expected}
        if not found or len(found) > LONGEST_ANSWER:
            return Verdict(0.0, details=details)
        # Identical text needs no algebra.
        right = found == expected or self.run_check(
            "nemocascade.envs.checks.mathematics:equal",
            expected,
            found,
            control=[expected, "0"],
        )
        return Verdict(float(right), details=details)

    def dummy(self, prompt: Prompt) -> Sequence[Message]:
        return (Message("assistant", r"\boxed{dummy}"),)

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a task. 0: sums of up to 12. 1: below 100. 2: in words. 3: products, fractions.

        4: products for the Python tool. 5: differences of a product of large numbers, in two calls
        of which the second needs the first one's variable. A careless answer has no box.
        """
        if difficulty >= len(_LEVELS):
            question, answer, cells = _for_tool(rng, difficulty)
            known = {"expected": answer, "cells": cells}
            steps = f"it is {answer}."
            return self._made(question, known, f"\\boxed{{{answer}}}", steps, steps)
        question, steps, answer = _LEVELS[min(max(difficulty, 0), len(_LEVELS) - 1)](rng)
        return self._made(question, {"expected": answer}, f"\\boxed{{{answer}}}", steps, steps)


_ASKS = (
    *("What is", "Compute", "Give", "Find", "Say", "Tell"),
    *("Solve", "Work out", "Calculate", "Do", "Evaluate", "Answer"),
    *("Determine", "State", "Write", "Show", "Get", "Name"),
    *("Figure out", "Derive", "Return", "Output", "Print", "Tell me"),
)


def _digits(rng: random.Random, low: int, high: int) -> tuple[str, str, str]:
    a, b = rng.randint(low, high), rng.randint(low, high)
    verb = rng.choice(_ASKS)
    if rng.random() < 0.5:
        text, value = f"{a} + {b}", a + b
    else:
        a, b = max(a, b), min(a, b)
        text, value = f"{a} - {b}", a - b
    return f"{verb} {text}.", f"{text} = {value}.", str(value)


def _small(rng: random.Random) -> tuple[str, str, str]:
    # Few enough for a tiny model to learn each of them within minutes of SFT.
    return _digits(rng, 0, 6)


def _large(rng: random.Random) -> tuple[str, str, str]:
    return _digits(rng, 10, 99)


def _words(rng: random.Random) -> tuple[str, str, str]:
    name, thing = rng.choice(NAMES), rng.choice(NOUNS)
    a, b = rng.randint(2, 12), rng.randint(1, 9)
    c = rng.randint(1, a + b - 1)
    question = f"{name} has {a} {thing}s, gets {b} and gives {c}. How many are left?"
    return question, f"{a} + {b} = {a + b}. {a + b} - {c} = {a + b - c}.", str(a + b - c)


def _products(rng: random.Random) -> tuple[str, str, str]:
    a, b, c = rng.randint(2, 12), rng.randint(2, 12), rng.randint(2, 30)
    if rng.random() < 0.5:
        return f"What is {a} * {b} + {c}?", f"{a} * {b} = {a * b}.", str(a * b + c)
    return f"Write {a}/{b} + {c}/{b} as a fraction.", "Add.", f"\\frac{{{a + c}}}{{{b}}}"


def _for_tool(rng: random.Random, difficulty: int) -> tuple[str, str, tuple[str, ...]]:
    """Return a question, its answer, and programs of which the last prints the answer."""
    if difficulty == len(_LEVELS):
        # All products have four digits, which a tiny model learns to copy within minutes.
        a, b = rng.randint(32, 99), rng.randint(32, 99)
        return f"What is {a} * {b}?", str(a * b), (f"print({a} * {b})",)
    a, b, c = rng.randint(1000, 9999), rng.randint(1000, 9999), rng.randint(1000, 9999)
    question = f"Let x be {a} * {b}. What is x - {c}?"
    return question, str(a * b - c), (f"x = {a} * {b}", f"print(x - {c})")


_LEVELS = (_small, _large, _words, _products)
