"""A rule-based judge, for tests and the tiny recipes. It has no knowledge of language.

Its answers have the form of a model's answers, so that their parsing is exercised too.
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
"""Points deducted for each word that is neither wanted nor allowed, or is repeated."""

_WORD = re.compile(r"[a-z0-9]+")


class RuleJudge:
    """Compares responses by their wanted words, and grades them by words of the reference.

    compare: the question's facts name `wanted` and `allowed` words, see `quality`. grade: F1 of the
    words of response and reference, as SQuAD measures answers. A question without these facts gets
    an error.
    """

    collective = False
    activity = 0

    def begin(self, questions: Sequence[Question]) -> None:
        """Do nothing: an answer takes no time."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Return an answer to each question, in order."""
        return [self._answer(question) for question in questions]

    def close(self) -> None:
        """Do nothing: the judge holds no resources."""

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
        # lean: -1 if the first is better by the full range, 1 if the second is.
        lean = (second - first) / (SCORE_MAX - SCORE_MIN)
        return Answer(comparison_text(first, second, UNPARSED_RANKING + 2.5 * lean))


def knows_language(judge: Judge | None) -> bool:
    """Return True if the judge can grade tasks from files.

    A rule judge cannot: shared words say nothing about a repair or an argument, and a wrong one may
    share more of them.
    """
    return judge is not None and not isinstance(judge, RuleJudge)


def quality(text: str, wanted: Sequence[str], allowed: Sequence[str]) -> float:
    """Score a text: 1 for none of the wanted words, 5 for all.

    The score is quadratic in their share, so the last words outweigh the length terms. Strange and
    repeated words reduce it.
    """
    words = Counter(_WORD.findall(text.lower()))
    present = sum(word in words for word in wanted)
    strange = sum(count - (word in wanted) for word, count in words.items() if word not in allowed)
    share = present / len(wanted)
    score = SCORE_MIN + (SCORE_MAX - SCORE_MIN) * share**2 - STRANGE_COST * strange
    return max(SCORE_MIN, score)


def words_f1(response: str, reference: str) -> float:
    """Harmonic mean of the shares of words that the two texts have in common."""
    ours, theirs = (Counter(_WORD.findall(text.lower())) for text in (response, reference))
    common = (ours & theirs).total()
    if not common:
        return float(ours == theirs)
    return 2 * common / (ours.total() + theirs.total())
