"""Instruction following: rule verifiers of IFEval, and of IFBench if it is installed."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

from nemocascade.envs import ifeval
from nemocascade.envs.base import AnswerFault, CheckedDomain, final_text
from nemocascade.envs.instruction_tasks import make_task
from nemocascade.sandbox.child import ChildPool
from nemocascade.types import Message, Prompt, Row, Verdict

_TRIED = "1"
"""Answer on which the arguments of an instruction are tried; it has no letter to detect."""
Grading = Literal["binary", "fraction"]

_PLAIN = "This is a plain text. It has two sentences.\n\nIt has a second paragraph, too."
"""Text on which every check of a sound row finishes."""


class InstructionFollowing(CheckedDomain):
    """Checks the final message, without reasoning, against the row's list of instructions.

    grading: "binary", 1 if all instructions hold, or "fraction", the fraction that holds.
    language_check: test for English in the two kinds about case. "langdetect" as published;
        "letters" for messages of a few words, where langdetect is unreliable.
    """

    domain = "instruction_following"

    def __init__(
        self,
        children: ChildPool,
        *,
        grading: Grading = "binary",
        language_check: ifeval.LanguageCheck = "langdetect",
    ) -> None:
        super().__init__(children)
        self._grading = grading
        self._language_check: ifeval.LanguageCheck = language_check

    def claims(self, row: Row) -> bool:
        return "instruction_id_list" in row

    def parse(self, row: Row) -> Mapping[str, Any]:
        kinds = list(row["instruction_id_list"])
        # Released rows have every argument of every kind; those of other kinds are null.
        arguments = [
            {key: value for key, value in (given or {}).items() if value is not None}
            for given in row.get("kwargs") or [{}] * len(kinds)
        ]
        if len(kinds) != len(arguments) or not kinds:
            raise ValueError(f"{len(kinds)} instructions have {len(arguments)} sets of kwargs")
        for kind, given in zip(kinds, arguments, strict=True):
            self._try(kind, given)
        return {"kinds": kinds, "kwargs": arguments}

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        text = final_text(response)
        kinds, arguments = prompt.answer["kinds"], prompt.answer["kwargs"]
        held: list[bool] = []
        faults: list[str] = []
        for kind, given in zip(kinds, arguments, strict=True):
            try:
                held.append(self._follows(kind, given, text))
            except AnswerFault as error:
                held.append(False)
                faults.append(str(error))
        reward = sum(held) / len(held) if self._grading == "fraction" else float(all(held))
        details = {"kinds": kinds, "held": held, **({"reasons": faults} if faults else {})}
        return Verdict(reward, details=details, fault="answer" if faults else None)

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make `difficulty` + 1 instructions about one word; from 1 on, some shape the text."""
        return make_task(rng, difficulty, self.domain)

    def forms(self, prompt: Prompt) -> Collection[str]:
        """Return the kinds of the instructions."""
        return tuple(prompt.answer["kinds"])

    def _try(self, kind: str, arguments: dict[str, Any]) -> None:
        """Raise ValueError if no checker knows the kind, or the checker rejects the arguments."""
        if kind in ifeval.KINDS:
            try:
                ifeval.follows(kind, arguments, _TRIED, self._language_check)
            except Exception as error:
                raise ValueError(f"{kind}: {error}") from error
        elif kind not in self._further_kinds:
            further = "IFBench has none either" if self._further_kinds else "IFBench is missing"
            raise ValueError(
                f"unknown instruction {kind!r}: IFEval has no checker for it, and {further}"
            )

    @cached_property
    def _further_kinds(self) -> frozenset[str]:
        """Kinds of IFBench; empty if it is not installed."""
        return frozenset(self._children.call("nemocascade.envs.checks.ifbench:kinds"))

    def _follows(self, kind: str, arguments: dict[str, Any], text: str) -> bool:
        if kind not in ifeval.KINDS:
            function, options = "nemocascade.envs.checks.ifbench:follows", []
        elif ifeval.needs_langdetect(kind, self._language_check):
            function, options = "nemocascade.envs.ifeval:follows", [self._language_check]
        else:
            return ifeval.follows(kind, arguments, text, self._language_check)
        control = [kind, arguments, _PLAIN, *options]
        return bool(self.run_check(function, kind, arguments, text, *options, control=control))
