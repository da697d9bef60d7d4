"""Instruction following: rule verifiers of IFEval, verifiable-instructions and IFBench."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import astuple
from functools import cached_property
from typing import Any, Literal, get_args

from nemocascade.envs.base import AnswerFault, CheckedDomain, final_text
from nemocascade.envs.instruction_tasks import make_task
from nemocascade.envs.instructions.ifeval import LanguageCheck
from nemocascade.envs.instructions.registry import (
    Options,
    checked_arguments,
    follows,
    is_quick,
    needed,
    splits,
)
from nemocascade.envs.instructions.texts import Tokenizer
from nemocascade.envs.row_forms import RowForm
from nemocascade.runtime.logging import LOGGER
from nemocascade.sandbox.child import ChildPool
from nemocascade.types import Message, Prompt, Row, Verdict

_TRIED = "1"
"""Answer on which the arguments of an instruction are tried; it has no letter to detect."""
Grading = Literal["binary", "fraction"]

_FOLLOWS = "nemocascade.envs.checks.instructions:follows"
_MISSING = "nemocascade.envs.checks.instructions:missing"
_PLAIN = "This is a plain text. It has two sentences.\n\nIt has a second paragraph, too."
"""Text on which every check of a sound row finishes."""


class InstructionFollowing(CheckedDomain):
    """Checks the final message, without reasoning, against the row's list of instructions.

    grading: "binary", 1 if all instructions hold, or "fraction", the fraction that holds; a row's
    `grading_mode` precedes it. language_check: test for English in the two kinds about case.
    "langdetect" as published; "letters" for messages of a few words, where langdetect is
    unreliable. tokenizer: "punkt" as published, or "rule", also used where nltk is missing.
    """

    domain = "instruction_following"
    row_forms = (
        RowForm(
            "instructions (IFEval, IFBench, NeMo Gym)",
            read={
                "instruction_id_list": "the kinds of the instructions; an unknown kind is rejected",
                "kwargs": "arguments of each kind, or null; null arguments count as missing",
                "grading_mode": "`binary` or `fraction`; precedes `envs.if_grading`",
            },
        ),
    )

    def __init__(
        self,
        children: ChildPool,
        *,
        grading: Grading = "binary",
        language_check: LanguageCheck = "langdetect",
        tokenizer: Tokenizer = "punkt",
    ) -> None:
        super().__init__(children)
        self._grading = grading
        self._language_check: LanguageCheck = language_check
        self._wanted_tokenizer: Tokenizer = tokenizer

    def claims(self, row: Row) -> bool:
        return "instruction_id_list" in row

    def parse(self, row: Row) -> Mapping[str, Any]:
        """Parse kinds and arguments. Raises ValueError for a kind that cannot be checked here."""
        kinds = list(row["instruction_id_list"])
        given = row.get("kwargs") or [{}] * len(kinds)
        if len(kinds) != len(given) or not kinds:
            raise ValueError(f"{len(kinds)} instructions have {len(given)} sets of kwargs")
        # Released rows have every argument of every kind; those of other kinds are null.
        arguments = [
            checked_arguments(kind, {k: v for k, v in (a or {}).items() if v is not None})
            for kind, a in zip(kinds, given, strict=True)
        ]
        for kind, chosen in zip(kinds, arguments, strict=True):
            self._try(kind, chosen)
        mode = row.get("grading_mode")
        if mode not in (None, *get_args(Grading)):
            raise ValueError(f"grading_mode({mode!r}) must be one of {get_args(Grading)}")
        return {"kinds": kinds, "kwargs": arguments, **({"grading": mode} if mode else {})}

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        text = final_text(response)
        kinds, arguments = prompt.answer["kinds"], prompt.answer["kwargs"]
        followed: list[bool] = []
        faults: list[str] = []
        for kind, given in zip(kinds, arguments, strict=True):
            try:
                followed.append(self._follows(kind, given, text))
            except AnswerFault as error:
                followed.append(False)
                faults.append(str(error))
        grading = prompt.answer.get("grading", self._grading)
        reward = sum(followed) / len(followed) if grading == "fraction" else float(all(followed))
        details = {"kinds": kinds, "followed": followed, **({"reasons": faults} if faults else {})}
        return Verdict(reward, details=details, fault="answer" if faults else None)

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make `difficulty` + 1 instructions about one word; from 1 on, some shape the text."""
        return make_task(rng, difficulty, self.domain)

    def forms(self, prompt: Prompt) -> Collection[str]:
        """Return the kinds of the instructions."""
        return tuple(prompt.answer["kinds"])

    def _try(self, kind: str, arguments: dict[str, Any]) -> None:
        """Raise ValueError if a library is missing, or the check cannot use the arguments."""
        options = Options(self._language_check, "rule")
        if missing := [name for name in needed(kind, options) if name in self._missing]:
            raise ValueError(f"{kind} cannot be checked: {self._missing[missing[0]]}")
        try:
            if is_quick(kind, arguments, options):
                follows(kind, arguments, _TRIED, options)
            else:
                self._children.call(_FOLLOWS, kind, arguments, _TRIED, *astuple(options))
        except Exception as error:
            raise ValueError(f"{kind}: {error}") from error

    @cached_property
    def _missing(self) -> dict[str, str]:
        """Libraries and data that are missing on this machine, each with its remedy."""
        return dict(self._children.call(_MISSING))

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        """The splitter of this machine; a missing punkt is reported once."""
        if self._wanted_tokenizer == "punkt" and "punkt" in self._missing:
            LOGGER.warning(
                "instruction following: sentences and words are split by rules, which differ from "
                "punkt in some answers: %s",
                self._missing["punkt"],
            )
            return "rule"
        return self._wanted_tokenizer

    def _follows(self, kind: str, arguments: dict[str, Any], text: str) -> bool:
        options = Options(self._language_check, self._tokenizer if splits(kind) else "rule")
        if is_quick(kind, arguments, options):
            return follows(kind, arguments, text, options)
        control = [kind, arguments, _PLAIN, *astuple(options)]
        given = [kind, arguments, text, *astuple(options)]
        return bool(self.run_check(_FOLLOWS, *given, control=control))
