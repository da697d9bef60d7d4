r"""Multiple choice: the last `\boxed{X}`, or the row's own pattern."""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from nemocascade.envs.base import CheckedDomain, final_text, last_boxed
from nemocascade.envs.words import CATEGORIES
from nemocascade.types import Message, Prompt, Row, Verdict

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_KINDS = ("animal", "cloth", "color", "tool")
_DECORATION = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{\s*")


class MultipleChoice(CheckedDomain):
    r"""1 if the letter in the last box is right, else 0.

    A row may have its own pattern (`answer_regex`, or `template_metadata.output_regex`), whose
    rightmost match holds the answer. It runs in a killable child.
    """

    domain = "multiple_choice"

    def claims(self, row: Row) -> bool:
        return "options" in row and "expected_answer" in row

    def parse(self, row: Row) -> Mapping[str, Any]:
        options = {
            letter.upper(): text for option in row["options"] for letter, text in option.items()
        }
        letter = row["expected_answer"].strip().upper()
        if letter not in options:
            raise ValueError(f"expected_answer {letter!r} is none of the options {sorted(options)}")
        template = row.get("template_metadata") or {}
        pattern = row.get("answer_regex") or template.get("output_regex")
        if pattern:
            self._children.call("nemocascade.envs.checks.pattern:last_match", pattern, "")
        return {"letter": letter, "options": options, "pattern": pattern}

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        text, pattern = final_text(response), prompt.answer.get("pattern")
        if pattern:
            found = self._children.call("nemocascade.envs.checks.pattern:last_match", pattern, text)
        else:
            found = last_boxed(text)
        options = prompt.answer["options"]
        chosen = _letter(found, options)
        return Verdict(
            float(chosen == prompt.answer["letter"]),
            details={"found": found, "chosen": chosen, "expected": prompt.answer["letter"]},
        )

    def forms(self, prompt: Prompt) -> Collection[str]:
        return ("pattern" if prompt.answer.get("pattern") else "box",)

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a task. 0: a word of a category. 1: a sum. 2 and up: two operations."""
        question, reasoning, right, wrong = (
            _kinds(rng) if difficulty <= 0 else _sums(rng, 1 if difficulty == 1 else 2)
        )
        texts = [right, *wrong]
        rng.shuffle(texts)
        options = dict(zip(LETTERS, texts, strict=False))
        letter = LETTERS[texts.index(right)]
        shown = "\n".join(f"{k} {v}" for k, v in options.items())
        answer = {"letter": letter, "options": options, "pattern": None}
        right = f"\\boxed{{{letter}}}"
        return self._made(f"{question}\n{shown}", answer, right, reasoning, f"it is {letter}")


def _letter(found: str | None, options: Mapping[str, str]) -> str | None:
    """Return the chosen option, given by its letter, perhaps decorated, or by its text."""
    if found is None:
        return None
    found = _undecorated(found.strip())
    bare = re.sub(r"[^A-Za-z0-9]", "", found)
    if len(bare) == 1 and bare.upper() in options:
        return bare.upper()
    same = [k for k, v in options.items() if " ".join(v.split()) == " ".join(found.split())]
    return same[0] if len(same) == 1 else None


def _undecorated(text: str) -> str:
    r"""Remove all of `\text{...}` and its like around a text."""
    start, end = 0, len(text)
    while text[end - 1 : end] == "}" and (opening := _DECORATION.match(text, start, end)):
        start, end = opening.end(), end - 1
        while end > start and text[end - 1].isspace():
            end -= 1
    return text[start:end]


def _kinds(rng: random.Random) -> tuple[str, str, str, list[str]]:
    kind, *others = rng.sample(_KINDS, 4)
    right = rng.choice(CATEGORIES[kind][:4])
    wrong = [rng.choice(CATEGORIES[other][:4]) for other in others]
    return f"Which is a {kind}?", f"{right} is a {kind}.", right, wrong


def _sums(rng: random.Random, operations: int) -> tuple[str, str, str, list[str]]:
    value = rng.randint(1, 9)
    question, steps = str(value), []
    for _ in range(operations):
        sign, k = rng.choice("+-"), rng.randint(1, 9)
        sign = "+" if value < k else sign
        result = value + k if sign == "+" else value - k
        question += f" {sign} {k}"
        steps.append(f"{value} {sign} {k} = {result}.")
        value = result
    near = [n for n in range(max(0, value - 4), value + 5) if n != value]
    wrong = [str(n) for n in rng.sample(near, 3)]
    return f"{question} = ?", " ".join(steps), str(value), wrong
