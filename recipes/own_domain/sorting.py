"""Digits in ascending order."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from nemocascade.envs.base import Domain, environment, final_text
from nemocascade.envs.row_forms import RowForm
from nemocascade.types import Message, Prompt, Row, Verdict


@environment
class Sorting(Domain):
    """1 if the answer has the prompt's digits in ascending order, else 0."""

    domain = "sorting"
    row_forms = (RowForm("digits to sort", read={"digits": "a text such as `7 3 5`"}),)

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a task of 3 + difficulty digits; careless answers are in descending order."""
        digits = [str(rng.randint(0, 9)) for _ in range(3 + difficulty)]
        right, wrong = " ".join(sorted(digits)), " ".join(sorted(digits, reverse=True))
        return Prompt(
            id="",
            domain=self.domain,
            messages=(Message("user", f"Sort {' '.join(digits)}"),),
            answer={"right": right},
            demonstration=(Message("assistant", right),),
            careless=(Message("assistant", wrong),),
        )

    def claims(self, row: Row) -> bool:
        return "digits" in row

    def parse(self, row: Row) -> Mapping[str, Any]:
        return {"right": " ".join(sorted(row["digits"].split()))}

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        found = final_text(response).split()
        return Verdict(float(found == prompt.answer["right"].split()), details={"found": found})
