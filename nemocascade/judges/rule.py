"""A judge that goes by rules: for tests and the tiny recipes. It knows nothing of language.

It answers in the form of a model's answer, so that what reads answers is exercised.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from nemocascade.judges.prompts import (
    SCORE_MAX,
    SCORE_MIN,
    UNPARSED_RANKING,
    comparison_text,
    grade_text,
)
from nemocascade.types import Answer, Judge, Question

STRANGE_COST = 0.5
"""Points off for each word that is neither wanted nor allowed, or is said again."""

_WORD = re.compile(r"[a-z0-9]+")


class RuleJudge:
    """Compares by the words that a good response has, grades by those of the reference.

    compare: the question's facts name `wanted` words and `allowed` ones, see `quality`. grade: the
    F1 of the response's words beside the reference's, as SQuAD measures answers. A question whose
    facts say less gets an error.
    """

    collective = False
    activity = 0

    def begin(self, questions: Sequence[Question]) -> None:
        """An answer takes no time."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """An answer to each question, in order."""
        return [self._answer(question) for question in questions]

    def close(self) -> None:
        """It holds nothing."""

    def _answer(self, question: Question) -> Answer:
        facts = question.facts
        if question.kind == "grade":
            if not facts.get("reference"):
                return Answer(None, "the rule judge grades beside a reference: there is none")
            return Answer(grade_text(words_f1(facts["response"], facts["reference"])))
        if not facts.get("wanted"):
            return Answer(
                None,
                "the rule judge compares by wanted words, which tasks from files do not name: set "
                "envs.judge.kind",
            )
        first, second = (
            quality(facts[name], facts["wanted"], facts.get("allowed", ()))
            for name in ("first", "second")
        )
        # 1 where the first is better by all points that there are, 6 where the second is.
        lean = (second - first) / (SCORE_MAX - SCORE_MIN)
        return Answer(comparison_text(first, second, UNPARSED_RANKING + 2.5 * lean))


def knows_language(judge: Judge | None) -> bool:
    """Whether there is a judge that can grade the tasks of files. The rule cannot: words in common
    say nothing of a repair or an argument, and a wrong one may have more of them."""
    return judge is not None and not isinstance(judge, RuleJudge)


def quality(text: str, wanted: Sequence[str], allowed: Sequence[str]) -> float:
    """1 for none of the wanted words, 5 for all, by the square of their share: the last words count
    most, and more than the length terms. Less for strange words and repeated ones."""
    words = Counter(_WORD.findall(text.lower()))
    held = sum(word in words for word in wanted)
    strange = sum(count - (word in wanted) for word, count in words.items() if word not in allowed)
    share = held / len(wanted)
    score = SCORE_MIN + (SCORE_MAX - SCORE_MIN) * share**2 - STRANGE_COST * strange
    return max(SCORE_MIN, score)


def words_f1(response: str, reference: str) -> float:
    """Harmonic mean of the shares of words that the two texts have in common."""
    ours, theirs = (Counter(_WORD.findall(text.lower())) for text in (response, reference))
    common = (ours & theirs).total()
    if not common:
        return float(ours == theirs)
    return 2 * common / (ours.total() + theirs.total())
