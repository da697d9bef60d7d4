"""The preference environment: the paper's arithmetic by hand, and the effect of judges."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.graded import WrittenJudge

from nemocascade.envs.preference import Preference, against
from nemocascade.envs.preference_rewards import (
    all_pairs,
    break_tie,
    group_rewards,
    length_terms,
)
from nemocascade.judges.prompts import UNPARSED, Comparison, comparison_text
from nemocascade.judges.rule import RuleJudge, quality, words_f1
from nemocascade.runtime.row_errors import BadRows, DataError
from nemocascade.types import Answer, Message, Prompt, Question


class Told:
    """A judge that answers as a function says, and remembers what it was asked."""

    collective = False
    activity = 0

    def __init__(self, say: Callable[[Question], Answer]) -> None:
        self.say = say
        self.asked: list[list[Question]] = []

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked.append(list(questions))
        return [self.say(question) for question in questions]

    def begin(self, questions: Sequence[Question]) -> None:
        """Nothing to begin."""

    def close(self) -> None:
        """Nothing to end."""


def longer_is_better(question: Question) -> Answer:
    first, second = (len(question.facts[name]) for name in ("first", "second"))
    return Answer(comparison_text(2 + 2 * (first > second), 2 + 2 * (second > first), 3.5))


def says(content: str, reasoning: str = "") -> list[Message]:
    return [Message("assistant", content, reasoning)]


@pytest.fixture
def tasks() -> list[Prompt]:
    return list(Preference(RuleJudge()).prompts(seed=1, count=200))


def test_the_worked_example() -> None:
    """Three responses, by hand: a plain pair, a tie that the ranking breaks, a failed parse.

    base: 0: (4 + 4.5) / 2 = 4.25; 1: (2 + 3) / 2 = 2.5; 2: (1.5 + 3) / 2 = 2.25.
    think 10, 30, 20: w 1, 0, 0.5 less 0.5, times 0.5. answer 8, 4, 12: w 0.5, 1, 0 likewise.
    80th percentile of three: the best. Response 0, the shortest reasoning, is at it; response 1,
    the shortest answer, is not.
    """
    comparisons = {(0, 1): Comparison(4, 2, 2), (0, 2): Comparison(3, 3, 2), (1, 2): UNPARSED}
    found = group_rewards(comparisons, [10, 30, 20], [8, 4, 12])
    assert all(r is not None for r in found)
    rewards = [r for r in found if r]
    assert [r.base for r in rewards] == pytest.approx([4.25, 2.5, 2.25])
    assert [r.think for r in rewards] == pytest.approx([0.25, -0.25, 0.0])
    assert [r.answer for r in rewards] == pytest.approx([0.0, 0.25, -0.25])
    assert [r.bonus for r in rewards] == [0.5, 0.0, 0.0]
    assert [r.total for r in rewards] == pytest.approx([5.0, 2.5, 2.0])


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        (Comparison(4, 4, 1), (6.5, 1.5)),
        (Comparison(4, 4, 6), (1.5, 6.5)),
        (Comparison(2, 2, 3), (2.5, 1.5)),
        (Comparison(4, 3, 6), (4, 3)),
        (UNPARSED, (3, 3)),
    ],
)
def test_the_ranking_breaks_ties_alone(
    comparison: Comparison, expected: tuple[float, float]
) -> None:
    assert break_tie(comparison) == expected


def test_lengths() -> None:
    assert length_terms([7, 7, 7]) == [0.0, 0.0, 0.0]
    assert length_terms([1, 2, 5]) == pytest.approx([1 - 1.75 / 3, 0.75 - 1.75 / 3, -1.75 / 3])
    assert sum(length_terms([3, 90, 14, 15])) == pytest.approx(0)


@pytest.mark.parametrize(
    ("count", "rank"),
    [(2, 1), (4, 1), (5, 1), (9, 1), (10, 2), (14, 2), (15, 3), (16, 3), (19, 3), (64, 12)],
)
def test_the_bar_of_the_bonus_is_the_rank_of_nemo_gym(count: int, rank: int) -> None:
    """Rank 1 is the best base. Responses are in the order of their bases, the best first."""
    comparisons = {(i, j): Comparison(5 - i / 64, 5 - j / 64, 3.5) for i, j in all_pairs(count)}
    for shortest, bonus in ((rank - 1, 0.5), (rank, 0.0)):
        lengths = [9] * count
        lengths[shortest] = 1
        found = group_rewards(comparisons, [0] * count, lengths)
        expected = [0.0] * count
        expected[shortest] = bonus
        assert [r.bonus for r in found if r] == expected


def test_a_bonus_goes_to_the_first_of_the_equally_short_and_none_for_silence() -> None:
    same = {pair: Comparison(3, 3, 3.5) for pair in all_pairs(4)}
    found = group_rewards(same, [0, 0, 0, 0], [0, 5, 5, 9])
    assert [r.bonus for r in found if r] == [0.0, 0.5, 0.0, 0.0]
    found = group_rewards(same, [4, 4, 4, 4], [5, 5, 5, 5])
    assert [r.total for r in found if r] == [4.0, 3.0, 3.0, 3.0]


def test_a_bonus_below_the_bar_goes_to_no_other() -> None:
    """The first of two equally short answers is below the bar, the second above it."""
    comparisons = {(0, 1): Comparison(1, 5, 6), (0, 2): Comparison(1, 2, 5)}
    found = group_rewards({**comparisons, (1, 2): Comparison(5, 2, 1)}, [0] * 3, [4, 4, 9])
    assert [r.bonus for r in found if r] == [0.0, 0.0, 0.0]


def test_a_pair_without_an_answer_counts_for_neither() -> None:
    comparisons = {
        (0, 1): Comparison(5, 1, 1),
        (0, 2): None,
        (1, 2): Comparison(2, 4, 5),
        (0, 3): None,
        (1, 3): None,
        (2, 3): None,
    }
    # Response 3 has no reward, and its lengths move nobody else's.
    found = group_rewards(comparisons, [1, 1, 1, 1], [4, 4, 4, 1000])
    assert [None if r is None else (r.base, r.pairs) for r in found] == [
        (5, 1),
        (1.5, 2),
        (4, 1),
        None,
    ]
    assert [r.answer for r in found if r] == [0.0] * 3


def test_a_group_of_16_makes_120_comparisons_in_one_call(tasks: list[Prompt]) -> None:
    judge = Told(longer_is_better)
    responses = [says("x" * (i + 1)) for i in range(16)]
    groups = [(tasks[0], responses), (tasks[1], responses)]
    found = Preference(judge).score_groups(groups)
    assert [len(questions) for questions in judge.asked] == [240]
    pairs = [(len(q.facts["first"]), len(q.facts["second"])) for q in judge.asked[0][:120]]
    assert len({frozenset(pair) for pair in pairs}) == 120
    assert all(first != second for first, second in pairs)
    # Each response comes first in half of its comparisons.
    counts = [sum(first == i + 1 for first, _ in pairs) for i in range(16)]
    assert set(counts) == {7, 8}
    assert judge.asked[0][0].messages != judge.asked[0][120].messages
    for verdicts in found:
        bases = [v.details["base"] for v in verdicts]
        assert bases == pytest.approx([2 + 2 * i / 15 for i in range(16)])
        assert all(v.details["pairs"] == 15 for v in verdicts)


def test_a_judge_that_favours_a_place_favours_nobody(tasks: list[Prompt]) -> None:
    judge = Told(lambda _: Answer(comparison_text(5, 1, 1)))
    (found,) = Preference(judge).score_groups([(tasks[0], [says("x")] * 16)])
    bases = [v.details["base"] for v in found]
    assert max(bases) - min(bases) == pytest.approx(4 / 15)


def test_a_collective_judge_that_fails_stops_every_rank(tasks: list[Prompt]) -> None:
    """Error verdicts on one rank alone would leave the others in the middle of the questions."""

    def fail(question: Question) -> Answer:
        raise RuntimeError("out of memory")

    judge = Told(fail)
    judge.collective = True
    with pytest.raises(RuntimeError, match="out of memory"):
        Preference(judge).score_groups([(tasks[0], [says("a"), says("b")])])


def test_reasoning_and_answer_are_measured_apart(tasks: list[Prompt]) -> None:
    judge = Told(lambda _: Answer("no JSON at all"))
    responses = [says("four", "a long thought"), says("longer", "thought")]
    (found,) = Preference(judge).score_groups([(tasks[0], responses)])
    assert [(v.details["think"], v.details["answer"]) for v in found] == [
        (-0.25, 0.25),
        (0.25, -0.25),
    ]
    assert [v.details["base"] for v in found] == [3.0, 3.0]
    assert [v.details["unparsed"] for v in found] == [1, 1]
    # The reasoning is not shown to the judge.
    assert "thought" not in judge.asked[0][0].messages[1].content


def test_an_error_is_never_a_score(tasks: list[Prompt]) -> None:
    def say(question: Question) -> Answer:
        if "lost" in (question.facts["first"], question.facts["second"]):
            return Answer(None, "timeout: no whole reply in 1 s")
        return longer_is_better(question)

    environment = Preference(Told(say))
    (found,) = environment.score_groups([(tasks[0], [says("ab"), says("lost"), says("abc")])])
    assert [v.reward is None for v in found] == [False, True, False]
    assert "timeout" in str(found[1].error)
    assert [v.details["unanswered"] for v in found] == [1, 2, 1]
    assert environment.score(tasks[0], says("lost")).reward is None

    def fail(question: Question) -> Answer:
        raise RuntimeError("a fault")

    (found,) = Preference(Told(fail)).score_groups([(tasks[0], [says("a"), says("b")])])
    assert [(v.reward, v.error) for v in found] == [(None, "RuntimeError: a fault")] * 2


def test_the_absolute_measure_is_win_tie_loss_in_both_orders(tasks: list[Prompt]) -> None:
    judge = Told(longer_is_better)
    environment = Preference(judge)
    prompt = against(tasks[0], "four")
    assert environment.score(prompt, says("longer")).reward == 1.0
    assert environment.score(prompt, says("abc")).reward == 0.0
    assert environment.score(prompt, says("same")).reward == 0.5
    assert [q.facts["first"] for q in judge.asked[0]] == ["longer", "four"]
    asked = len(judge.asked)
    assert environment.score(prompt, says("four")).reward == 0.5
    assert len(judge.asked) == asked, "the same text needs no judge"
    # A judge that favours the first place: its two games cancel.
    favours = Preference(Told(lambda _: Answer(comparison_text(5, 1, 1))))
    assert favours.score(prompt, says("anything")).reward == 0.5
    assert environment.score(against(prompt, "unparsed"), []).reward == 0.0
    (verdicts,) = environment.score_groups([(prompt, [says("longer")])])
    assert verdicts[0].reward == 1.0, "a group of one is measured absolutely"
    without = replace(prompt, answer={})
    assert "baseline" in str(environment.score(without, says("a")).error)


def test_the_rule_prefers_what_was_asked_for(tasks: list[Prompt]) -> None:
    environment = Preference(RuleJudge())
    for prompt in tasks:
        best, baseline = prompt.answer["best"], prompt.answer["baseline"]
        wanted = prompt.answer["facts"]["wanted"]
        assert environment.score(prompt, says(best)).reward == 1.0
        assert environment.score(prompt, says(baseline)).reward == 0.5
        assert environment.score(prompt, says("")).reward == 0.0
        assert environment.score(prompt, says(" ".join(wanted * 3))).reward == 0.0
        assert quality(best, wanted, prompt.answer["facts"]["allowed"]) == 5.0


def test_demonstrations_are_of_mixed_quality_and_mostly_poor(tasks: list[Prompt]) -> None:
    environment = Preference(RuleJudge())
    scores = [environment.score(p, p.demonstration).reward for p in tasks]
    shares = [scores.count(s) / len(scores) for s in (0.0, 0.5, 1.0)]
    assert shares[0] > 0.4
    assert all(share > 0.03 for share in shares)


def test_grades_by_rule() -> None:
    assert words_f1("The red cat.", "red cat") == pytest.approx(0.8)
    assert words_f1("", "cat") == 0.0
    assert words_f1("cat", "cat") == 1.0


def test_a_question_without_facts_is_an_error_of_the_rule_judge() -> None:
    environment = Preference(RuleJudge())
    prompt = Prompt("1", "preference", (Message("user", "Hello"),), {"baseline": "Hi."})
    verdict = environment.score(prompt, says("Good day."))
    assert verdict.reward is None
    assert "envs.judge.kind" in str(verdict.error)


def test_released_rows(tmp_path: Path) -> None:
    def row(**more: Any) -> dict[str, Any]:
        turns = [{"role": "user", "content": "What is a skill?"}]
        params = {"input": turns, "tools": [], "parallel_tool_calls": False}
        return {
            "responses_create_params": params,
            "agent_ref": {"name": "x"},
            "dataset": "d",
            **more,
        }

    rows = [
        row(),
        row(baseline="Something one can do.", ground_truth=None, instruction_id_list=[]),
        row(expected_answer="4"),
        row(ground_truth=[{"name": "f"}]),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.raises(DataError, match=r"rows.jsonl:1: a rule cannot compare .*envs\.judge\.kind"):
        list(Preference(RuleJudge()).read(path))
    bad = BadRows(2)
    found = list(Preference(WrittenJudge()).read(path, bad.skip))
    assert [f"{path}:{n}: it is not a row of preference" for n in (3, 4)] == [
        text.partition(": fields")[0] for text in bad.examples
    ]
    assert [p.answer["baseline"] for p in found] == [None, "Something one can do."]
    assert found[0].messages[0].content == "What is a skill?"


def test_rewards_are_finite(tasks: list[Prompt]) -> None:
    environment = Preference(RuleJudge())
    texts = ["", "a", *(p.answer["best"] for p in tasks[:4]), "</response_1>", "{}"]
    (found,) = environment.score_groups([(tasks[0], [says(t) for t in texts])])
    assert all(v.reward is not None and math.isfinite(v.reward) for v in found)
