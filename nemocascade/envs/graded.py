"""Domains that ask a judge for a grade where no rule decides."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from nemocascade.envs.base import Domain, failed
from nemocascade.judges.prompts import parse_grade
from nemocascade.types import Answer, Judge, Message, Prompt, Question, Verdict

THREADS = 8
"""Responses examined by rules in parallel when groups are scored."""
_SHOWN = 200


class GradedDomain(Domain):
    """Base class of domains with rules first, then a judge for the undecided responses.

    Each call puts its questions to the judge at once. A grade is a reward in 0..1; a judge that
    fails or gives no grade causes an error verdict.
    """

    def __init__(self, judge: Judge | None = None) -> None:
        self.judge = judge

    @property
    def collective(self) -> bool:
        """Return True if the judge is collective."""
        return self.judge is not None and self.judge.collective

    @property
    def activity(self) -> int:
        """Progress counter of the judge."""
        return 0 if self.judge is None else self.judge.activity

    @abstractmethod
    def examine(self, prompt: Prompt, response: Sequence[Message]) -> Verdict | Question:
        """Return the verdict if rules decide, else the question to the judge."""

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        found = self.examine(prompt, response)
        return found if isinstance(found, Verdict) else self._ask([found])[0]

    def score_groups(
        self, groups: Sequence[tuple[Prompt, Sequence[Sequence[Message]]]]
    ) -> list[list[Verdict]]:
        """Score with one call of the judge. A collective one is called even without questions."""
        pairs = [(prompt, r) for prompt, responses in groups for r in responses]
        with ThreadPoolExecutor(THREADS, thread_name_prefix="examine") as pool:
            found = list(pool.map(lambda pair: self._examined(*pair), pairs))
        questions = [f for f in found if isinstance(f, Question)]
        graded = iter(self._ask(questions) if questions or self.collective else [])
        verdicts = iter([f if isinstance(f, Verdict) else next(graded) for f in found])
        return [[next(verdicts) for _ in responses] for _, responses in groups]

    def _examined(self, prompt: Prompt, response: Sequence[Message]) -> Verdict | Question:
        if prompt.domain != self.domain:
            raise ValueError(f"{self.domain} cannot score a task of {prompt.domain}")
        try:
            return self.examine(prompt, response)
        except Exception as error:  # any failure of a verifier becomes a verdict
            return failed(error)

    def _ask(self, questions: Sequence[Question]) -> list[Verdict]:
        if self.judge is None:
            reason = f"no rule decides a task of {self.domain}, and it has no judge: set envs.judge"
            return [Verdict(None, reason) for _ in questions]
        return [_graded(answer) for answer in self.judge.ask(questions)]


def _graded(answer: Answer) -> Verdict:
    if answer.text is None:
        return Verdict(None, f"the judge failed: {answer.error}")
    grade = parse_grade(answer.text)
    if grade is None:
        return Verdict(None, f"the judge's answer holds no grade: ...{answer.text[-_SHOWN:]!r}")
    return Verdict(grade, details={"grade": grade})
