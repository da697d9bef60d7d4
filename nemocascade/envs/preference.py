"""Preference (RLHF): a judge compares all responses to a prompt with each other."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from nemocascade.envs.base import Domain, failed, final_text
from nemocascade.envs.preference_rewards import Pair, all_pairs, break_tie, group_rewards
from nemocascade.envs.row_forms import RowForm
from nemocascade.envs.words import COLORS, NAMES, NOUNS, SOME_NOUNS
from nemocascade.judges.prompts import Comparison, compare_question, parse_comparison
from nemocascade.judges.rule import knows_language
from nemocascade.runtime.turns import kind_of
from nemocascade.types import Answer, Judge, Message, Prompt, Question, Row, Verdict

TRUTHS = (
    *("ground_truth", "expected_answer", "instruction_id_list", "options"),
    *("schema_str", "schema", "verifier_metadata"),
    *("question", "problem_statement", "issue"),
)
"""Fields of other domains' rows; a preference row has none of them."""

ALLOWED = ("a", "and", "is", "the")
QUALITIES = ("plain", "greeting", "thanks", "full")
SHARES = (0.5, 0.15, 0.15, 0.2)
"""Frequencies of the demonstrations. Most of them show what the judge does not prefer."""


@dataclass(frozen=True)
class _Duel:
    """A response and the baseline it is compared with; both final messages."""

    prompt: Prompt
    response: str
    baseline: str

    def questions(self) -> list[Question]:
        """Ask in both orders, so that position gives no advantage; equal texts need no judge."""
        if self.response == self.baseline:
            return []
        facts = self.prompt.answer.get("facts")
        texts = (self.response, self.baseline)
        return [
            compare_question(self.prompt.messages, *order, facts=facts)
            for order in (texts, texts[::-1])
        ]


class Preference(Domain):
    """By group: the reward of `preference_rewards`, from a comparison of every pair.

    Absolute, for held-out tasks: the response is compared with `answer["baseline"]`. A win counts
    1, a tie 0.5 and a loss 0, averaged over both orders, as in ArenaHard.

    In both measures, an unparsable comparison is a tie, and one that got no answer is excluded. A
    response without any comparison gets an error verdict. Lengths are in characters.
    """

    domain = "preference"
    by_group = True
    row_forms = (
        RowForm(
            "a prompt alone",
            read={"baseline": "text with which held-out answers are compared"},
        ),
    )

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    @property
    def collective(self) -> bool:
        """Return True if the judge is collective."""
        return self.judge.collective

    @property
    def activity(self) -> int:
        """Progress counter of the judge."""
        return self.judge.activity

    def claims(self, row: Row) -> bool:
        return not any(row.get(name) for name in TRUTHS)

    def parse(self, row: Row) -> Mapping[str, Any]:
        """Parse `baseline`, the optional text that held-out answers are compared with."""
        baseline = row.get("baseline")
        if not isinstance(baseline, str | None):
            raise ValueError(f"baseline must be a text, it is {kind_of(baseline)}")
        if not knows_language(self.judge):
            raise ValueError(
                "a rule cannot compare answers to rows from files: set envs.judge.kind to server "
                "or artifact"
            )
        return {"baseline": baseline}

    def check(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        ((verdict,),) = self.score_groups([(prompt, [response])])
        return verdict

    def score_groups(
        self, groups: Sequence[tuple[Prompt, Sequence[Sequence[Message]]]]
    ) -> list[list[Verdict]]:
        """Return the verdicts on all responses to each prompt; groups of one get the absolute one.

        All questions are put to the judge at once. A collective one is called even without any.
        """
        plans: list[_Plan] = []
        try:
            plans = [_plan(prompt, responses) for prompt, responses in groups]
            asked = [question for questions, _ in plans for question in questions]
            answers = iter(self._ask(asked))
            return [decide([next(answers) for _ in questions]) for questions, decide in plans]
        except Exception as error:  # any failure of a verifier is reported, never scored as zero
            if self.collective:  # the other ranks are answering questions too
                raise
            return [[failed(error)] * len(responses) for _, responses in groups]

    def dummy(self, prompt: Prompt) -> None:
        """Return None: the judge decides."""

    def begin_group(
        self, prompt: Prompt, written: Mapping[int, Sequence[Message]], new: int
    ) -> None:
        """Ask the judge to compare response `new` with the responses before it."""
        texts = {i: final_text(response) for i, response in written.items()}
        pairs = [(min(i, new), max(i, new)) for i in texts if i != new]
        self.judge.begin([_question(prompt, texts, pair) for pair in pairs])

    def close(self) -> None:
        """Close the judge."""
        self.judge.close()

    def _ask(self, questions: Sequence[Question]) -> list[Answer]:
        return self.judge.ask(questions) if questions or self.collective else []

    def make(self, rng: random.Random, difficulty: int) -> Prompt:
        """Make a request about `difficulty` + 1 things.

        The judge prefers an answer that mentions all of them, addresses the user, and thanks.
        """
        name = rng.choice(NAMES)
        count = min(max(difficulty, 0), 3) + 1
        nouns = rng.sample(SOME_NOUNS if count == 1 else NOUNS, count)
        things = list(zip(nouns, rng.sample(COLORS, count), strict=True))
        said = " and ".join(f"the {noun} is {color}" for noun, color in things)
        texts = {
            "plain": f"{said}.",
            "greeting": f"dear {name}, {said}.",
            "thanks": f"{said}. thank you.",
            "full": f"dear {name}, {said}. thank you.",
        }
        wanted = ("dear", name, *(w for thing in things for w in thing), "thank", "you")
        (quality,) = rng.choices(QUALITIES, SHARES)
        asked = " and ".join(f"a {color} {noun}" for noun, color in things)
        answer = {
            "baseline": texts["greeting"],
            "facts": {"wanted": wanted, "allowed": ALLOWED},
            "best": texts["full"],
        }
        ask, reasoning = f"{name} asks about {asked}.", f"{name}. {asked}. {quality}."
        return self._made(ask, answer, texts[quality], reasoning)


def against(prompt: Prompt, baseline: str) -> Prompt:
    """Return the task with another baseline for its absolute measure."""
    return replace(prompt, answer={**prompt.answer, "baseline": baseline})


def _is_turned(pair: Pair) -> bool:
    """Return True if the pair's second response is shown first.

    It is in every other pair of each response, so a judge with a position bias favours nobody.
    """
    return sum(pair) % 2 == 1


def _question(prompt: Prompt, texts: Mapping[int, str], pair: Pair) -> Question:
    first, second = pair[::-1] if _is_turned(pair) else pair
    facts = prompt.answer.get("facts")
    return compare_question(prompt.messages, texts[first], texts[second], facts=facts)


_Plan = tuple[list[Question], Callable[[list[Answer]], list[Verdict]]]
"""Questions about the responses to a prompt, and the verdicts that follow from their answers."""


def _plan(prompt: Prompt, responses: Sequence[Sequence[Message]]) -> _Plan:
    if len(responses) == 1:
        baseline = prompt.answer.get("baseline")
        duel = _Duel(prompt, final_text(responses[0]), baseline) if baseline is not None else None
        return duel.questions() if duel else [], lambda answers: [_won(duel, answers)]
    texts, pairs = dict(enumerate(map(final_text, responses))), all_pairs(len(responses))
    return [_question(prompt, texts, pair) for pair in pairs], lambda answers: _group_verdicts(
        responses, dict(zip(pairs, answers, strict=True))
    )


def _group_verdicts(
    responses: Sequence[Sequence[Message]], answers: Mapping[Pair, Answer]
) -> list[Verdict]:
    """Return the verdicts on one group, with counts of its comparisons."""
    read: dict[Pair, Comparison | None] = {}
    for pair, answer in answers.items():
        found = None if answer.text is None else parse_comparison(answer.text)
        read[pair] = found.turned() if found is not None and _is_turned(pair) else found
    rewards = group_rewards(
        read,
        [sum(len(m.reasoning.strip()) for m in response) for response in responses],
        [len(final_text(response)) for response in responses],
    )
    verdicts = []
    for i, reward in enumerate(rewards):
        mine = [pair for pair in read if i in pair]
        unanswered = [answers[pair].error or "no reason given" for pair in mine if not read[pair]]
        counts = {
            "unanswered": len(unanswered),
            "unparsed": sum(1 for pair in mine if (c := read[pair]) and not c.parsed),
        }
        if reward is None:
            verdicts.append(Verdict(None, f"no comparison: {unanswered[0]}", details=counts))
        else:
            verdicts.append(Verdict(reward.total, details={**asdict(reward), **counts}))
    return verdicts


def _won(duel: _Duel | None, answers: Sequence[Answer]) -> Verdict:
    """Return the verdict against the baseline. answers: both orders, or empty for equal texts."""
    if duel is None:
        return Verdict(None, "the task has no baseline to hold a response against")
    if not answers:
        return Verdict(0.5, details={"games": 0, "unanswered": 0, "unparsed": 0})
    read = [None if a.text is None else parse_comparison(a.text) for a in answers]
    points = []
    for turned, comparison in enumerate(read):
        if comparison is not None:
            mine, other = break_tie(comparison)[:: -1 if turned else 1]
            points.append(1.0 if mine > other else 0.5 if mine == other else 0.0)
    counts = {
        "games": len(points),
        "unanswered": read.count(None),
        "unparsed": sum(1 for c in read if c and not c.parsed),
    }
    if not points:
        return Verdict(None, f"no comparison: {answers[0].error}", details=counts)
    return Verdict(sum(points) / len(points), details=counts)
