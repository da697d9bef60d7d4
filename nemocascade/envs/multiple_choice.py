r"""Multiple choice: the answer is in the last box, or where the row says."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from nemocascade.envs.base import CheckedDomain, final_text
from nemocascade.envs.benchmark_rows import LETTERS, is_of, mmlu_pro_row
from nemocascade.envs.choices import GRADING_MODES, chosen_by, chosen_in
from nemocascade.envs.row_forms import RowForm
from nemocascade.envs.words import CATEGORIES
from nemocascade.types import Message, Prompt, Row, Verdict

_KINDS = ("animal", "cloth", "color", "tool")
_LAST_MATCH = "nemocascade.envs.checks.pattern:last_match"


class MultipleChoice(CheckedDomain):
    r"""1 if the chosen option is right, else 0.

    A row may have its own patterns (`answer_regex`, or `template_metadata.output_regex`: one or a
    list). The first pattern that finds an option decides, by its rightmost match. Patterns
    ignore case and run in a child process that can be killed. Without patterns, the row's
    `grading_mode` says where the answer is. Its values and its default, the letter in the last
    `\boxed{}`, are NeMo-Gym's.
    """

    domain = "multiple_choice"
    answered_tools = ()
    row_forms = (
        RowForm(
            "multiple choice (NeMo Gym)",
            read={
                "options": "list of objects, letter to text; null texts are ignored",
                "expected_answer": "the right letter",
                "answer_regex": "pattern whose last match holds the answer, or a list of them",
                "template_metadata.output_regex": "such patterns, if there is no `answer_regex`",
                "grading_mode": "where the answer is, without a pattern: one of NeMo Gym's modes",
            },
            ignored={
                "template_metadata.*": "how the prompt was made",
                "reward_profiles": "rewards of other models",
            },
        ),
        RowForm(
            "MMLU-Pro, as published; its `options` are a list of texts",
            read={
                "question": "the prompt, with the options",
                "answer": "the right letter",
                "answer_index": "must be that of the letter, if it is there",
            },
            ignored={"cot_content": "a worked example", "src": "origin of the row"},
        ),
    )

    def claims(self, row: Row) -> bool:
        return "options" in row and ("expected_answer" in row or is_of("mmlu_pro", row))

    def prepare(self, row: Row, folder: Path) -> Row:
        return row if "expected_answer" in row else {**row, **mmlu_pro_row(row)}

    def parse(self, row: Row) -> Mapping[str, Any]:
        options = {
            letter.upper(): str(text)
            for option in row["options"]
            for letter, text in option.items()
            if text is not None
        }
        letter = row["expected_answer"].strip().upper()
        if letter not in options:
            raise ValueError(
                f"expected_answer {letter!r} is not one of the options {sorted(options)}"
            )
        template = row.get("template_metadata") or {}
        patterns = row.get("answer_regex") or template.get("output_regex") or []
        patterns = [patterns] if isinstance(patterns, str) else list(patterns)
        for pattern in patterns:
            self._children.call(_LAST_MATCH, pattern, "")
        mode = row.get("grading_mode") or GRADING_MODES[0]
        if mode not in GRADING_MODES:
            raise ValueError(f"grading_mode {mode!r} is not one of {', '.join(GRADING_MODES)}")
        return {"letter": letter, "options": options, "patterns": patterns, "mode": mode}

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        text, answer = final_text(response), prompt.answer
        found = chosen = None
        for pattern in answer["patterns"]:
            found = self.run_check(_LAST_MATCH, pattern, text, control=[pattern, ""])
            if chosen := chosen_in(found or "", answer["options"]):
                break
        if chosen is None:
            found, chosen = chosen_by(answer["mode"], text, answer["options"])
        return Verdict(
            float(chosen == answer["letter"]),
            details={"found": found, "chosen": chosen, "expected": answer["letter"]},
        )

    def forms(self, prompt: Prompt) -> Collection[str]:
        return ("pattern" if prompt.answer["patterns"] else prompt.answer["mode"],)

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a task. 0: a word of a category. 1: a sum. 2 and up: two operations.

        The question comes last and the solution states an option's text: a tiny model learns within
        minutes to find a word of the kind just asked for, but not the letter before it.
        """
        question, reasoning, right, wrong = (
            _kinds(rng) if difficulty <= 0 else _sums(rng, 1 if difficulty == 1 else 2)
        )
        texts = [right, *wrong]
        rng.shuffle(texts)
        options = dict(zip(LETTERS, texts, strict=False))
        letter = LETTERS[texts.index(right)]
        shown = "\n".join(f"{k} {v}" for k, v in options.items())
        answer = {"letter": letter, "options": options, "patterns": [], "mode": "lenient_boxed"}
        reply = f"\\boxed{{{right}}}"
        return self._made(f"{shown}\n{question}", answer, reply, reasoning, f"it is {right}")


def _kinds(rng: random.Random) -> tuple[str, str, str, list[str]]:
    kind, *others = rng.sample(_KINDS, 4)
    right = rng.choice(CATEGORIES[kind][:2])
    wrong = [rng.choice(CATEGORIES[other][:2]) for other in others]
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
