"""Questions over documents: exact answers, judge's grades, rows, and the growth of tasks."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.graded import WrittenJudge

from nemocascade.envs.document_tasks import make_task
from nemocascade.envs.long_context import LongContext, answer_of, normalised
from nemocascade.envs.words import NAMES
from nemocascade.types import Answer, Message, Prompt

DOCUMENTS = [f"Fact {i}." for i in range(5)]
LONG = "It was moved to the lake because the farm had been sold the year before."


def read(folder: Path, *rows: dict[str, Any], domain: LongContext | None = None) -> list[Prompt]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return list((domain or LongContext()).read(path))


def said(text: str) -> list[Message]:
    return [Message("assistant", text)]


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Lake.", "lake"),
        ("  the\tred  hat! ", "red hat"),
        ('"Lake"', "lake"),
        ("1,234", "1234"),
        ("3.5", "3.5"),
        ("-5", "-5"),
        ("- five", "five"),
        ("50%.", "50%"),
        ("The", "the"),
        ("a-b", "a-b"),
        ("...", ""),
    ],
)
def test_answers_are_compared_without_what_does_not_matter(text: str, plain: str) -> None:
    assert normalised(text) == plain


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("lake", "lake"),
        (r"So it is \boxed{lake}. Answer: farm", "lake"),
        ("Answer: farm\nNo.\n**Answer:** lake", "lake"),
        ("The final answer is near.\nFinal answer: the lake", "the lake"),
        ("Because.\nAnswer:\nParis", "paris"),
        ("**Final Answer**\n\n**Paris**", "paris"),
        ("### Answer\n\nParis\n", "paris"),
        ("**Final Answer**\n\nAnswer: Paris", "paris"),
        ("Answer:\nAnswer: Paris", "paris"),
        (r"\boxed{\text{Paris}}", "paris"),
        ("Answer: \u201cParis\u201d.", "paris"),
        ("Answers differ.\nlake", "answers differ. lake"),
        ("", ""),
    ],
)
def test_the_answer_of_a_message(text: str, found: str) -> None:
    assert normalised(answer_of(text)) == normalised(found)


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("lake", 1.0),
        ("The Lake!", 1.0),
        ("Answer: the pond", 1.0),
        ("<think>lake", 0.0),
        ("lake or farm", 0.0),
        ("laken", 0.0),
        ("", 0.0),
    ],
)
def test_exact_answers(tmp_path: Path, text: str, reward: float) -> None:
    row = {"documents": DOCUMENTS, "question": "Where?", "answer": ["lake", "pond"]}
    (prompt,) = read(tmp_path, row)
    assert LongContext().score(prompt, said(text)).reward == reward


def test_plain_rows_show_their_documents_and_the_question(tmp_path: Path) -> None:
    titled = [*DOCUMENTS, {"title": "Six", "text": "More."}]
    rows = (
        {"documents": titled, "question": "Where?", "answer": 7},
        {"context": "All of it.", "question": "Where?", "answer": "x"},
    )
    documents, context = read(tmp_path, *rows)
    text = documents.messages[0].content
    assert "Document 1:\nFact 0.\n\nDocument 2:" in text
    assert "Document 6 (Six):\nMore." in text
    assert text.endswith("Question: Where?")
    assert LongContext().score(documents, said("7.")).reward == 1.0
    assert "All of it." in context.messages[0].content


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"documents": DOCUMENTS[:4]}, "4 documents: a row needs at least 5"),
        ({"answer": ""}, "is empty"),
        ({"answer": []}, "is empty"),
        ({"answer": ["lake", "..."]}, "is empty"),
        ({"answer": LONG}, r"needs a judge, and there is none: set\s+envs.judge"),
        ({"metadata": {"grading": "strict"}}, r"metadata.grading\('strict'\) must be"),
        ({"documents": [*DOCUMENTS, {"title": "x"}]}, "KeyError: 'text'"),
        ({"documents": "A text of many characters."}, "'documents' is str: give a list"),
    ],
)
def test_broken_rows_are_named(tmp_path: Path, change: dict[str, Any], fault: str) -> None:
    row = {"documents": DOCUMENTS, "question": "Where?", "answer": "lake"}
    with pytest.raises(ValueError, match=rf"rows\.jsonl:2: .*{fault}"):
        read(tmp_path, row, {**row, **change})


def test_a_context_is_a_text(tmp_path: Path) -> None:
    row = {"context": {"title": ["One"]}, "question": "Where?", "answer": "lake"}
    with pytest.raises(ValueError, match="'context' is dict, not text"):
        read(tmp_path, row)


def test_long_references_are_graded_and_metadata_decides(tmp_path: Path) -> None:
    judge = WrittenJudge(Answer('{"score": 0.75}'))
    domain = LongContext(judge)
    row = {"documents": DOCUMENTS, "question": "Why?", "answer": LONG}
    short = {**row, "answer": "lake", "metadata": {"grading": "judge"}}
    exact = {**row, "metadata": {"grading": "exact"}}
    prompts = read(tmp_path, row, short, exact, domain=domain)
    rewards = [domain.score(prompt, said("The farm was sold.")).reward for prompt in prompts]
    assert rewards == [0.75, 0.75, 0.0]
    assert len(judge.calls) == 2
    (question,) = judge.calls[0]
    assert question.kind == "grade"
    asked = question.messages[-1].content
    assert LONG in asked
    assert "The farm was sold." in asked
    assert "Why?" in asked
    assert "Fact 0." not in asked
    assert domain.score(prompts[0], said("")).reward == 0.0
    assert len(judge.calls) == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Answer(None, "no connection"), "the judge failed: no connection"),
        (Answer("It is fine."), "holds no grade: ...'It is fine.'"),
        (Answer('{"score": 7}'), "holds no grade"),
    ],
)
def test_a_judge_that_fails_is_an_error_and_no_zero(
    tmp_path: Path, answer: Answer, error: str
) -> None:
    domain = LongContext(WrittenJudge(answer))
    row = {"documents": DOCUMENTS, "question": "Why?", "answer": LONG}
    (prompt,) = read(tmp_path, row, domain=domain)
    verdict = domain.score(prompt, said("x"))
    assert verdict.reward is None
    assert error in str(verdict.error)


def test_groups_are_graded_in_one_call_and_keep_their_order(tmp_path: Path) -> None:
    judge = WrittenJudge(Answer('{"score": 0.1}'), Answer('{"score": 0.2}'), Answer(None, "down"))
    domain = LongContext(judge)
    row = {"documents": DOCUMENTS, "question": "Why?", "answer": LONG}
    graded, exact = read(tmp_path, row, {**row, "answer": "lake"}, domain=domain)
    found = domain.score_groups(
        [(graded, [said("a"), said(""), said("b")]), (exact, [said("lake")]), (graded, [said("c")])]
    )
    assert [[v.reward for v in group] for group in found] == [[0.1, 0.0, 0.2], [1.0], [None]]
    assert [len(call) for call in judge.calls] == [3]
    assert [q.facts["response"] for q in judge.calls[0]] == ["a", "b", "c"]


def test_a_collective_judge_is_asked_by_every_rank_also_with_nothing(tmp_path: Path) -> None:
    judge = WrittenJudge(Answer('{"score": 1}'), collective=True)
    domain = LongContext(judge)
    assert domain.collective
    assert not LongContext().collective
    assert not LongContext(WrittenJudge()).collective
    row = {"documents": DOCUMENTS, "question": "Where?", "answer": "lake"}
    (prompt,) = read(tmp_path, row, domain=domain)
    assert domain.score_groups([(prompt, [said("lake")])])[0][0].reward == 1.0
    assert domain.score_groups([]) == []
    assert judge.calls == [[], []]


def solve(text: str, question: str) -> str:
    """The answer to a made task, by another way than its maker's."""
    if found := re.fullmatch(r"Where is (\w+)\?", question):
        return re.search(rf"\b{found[1]} is at the (\w+)\.", text)[1]  # type: ignore[index]
    if found := re.fullmatch(r"What does (\w+) (have|eat|like|see)\?", question):
        verb = "has" if found[2] == "have" else f"{found[2]}s"
        return re.search(rf"\b{found[1]} {verb} (?:a )?(\w+)\.", text)[1]  # type: ignore[index]
    if found := re.fullmatch(r"How many (?:(?:have|see) a|eat|like|are at the) (\w+)\?", question):
        return str(len(re.findall(rf" {found[1]}\.", text)))
    if found := re.fullmatch(r"At which place is what (\w+) has\?", question):
        at = re.search(rf"\b{found[1]} has (the [\w ]+)\.", text)[1]  # type: ignore[index]
        while inner := re.search(rf"\b{at} is in (box \d+)\.", text):
            at = inner[1]
        return re.search(rf"\b{at} is at the (\w+)\.", text)[1]  # type: ignore[index]
    if found := re.fullmatch(r"How many boxes are at the (\w+)\?", question):
        return str(len(re.findall(rf"is at the {found[1]}\.", text)))
    found = re.fullmatch(r"Who has the most (\w+)s\?", question)
    assert found
    amounts: list[tuple[str, str]] = re.findall(rf"(\w+) has (\d+) {found[1]}s\.", text)
    return max(amounts, key=lambda pair: int(pair[1]))[0]


@pytest.mark.parametrize("difficulty", range(7))
def test_made_tasks_have_one_answer_across_documents(difficulty: int) -> None:
    rng = random.Random(f"tasks/{difficulty}")
    for _ in range(30 if difficulty < 5 else 3):
        task = make_task(rng, difficulty)
        assert solve(" ".join(task.documents), task.question) == task.answer
        assert len(task.documents) == 5 * (max(difficulty, 0) + 1)
        facts = re.findall(r"[^.]+\.", task.reasoning.partition(" That is")[0])
        facts = [f.strip() for f in facts if "The most" not in f]
        homes = [i for f in facts for i, d in enumerate(task.documents) if f in d]
        assert len(homes) == len(set(homes)) == len(facts) > difficulty
        alone = {solve_or_none(d, task.question) for d in task.documents}
        assert difficulty == 0 or "How many" in task.question or len(alone - {None}) != 1


def test_the_easiest_facts_are_told_apart_by_their_kind_and_some_are_counted() -> None:
    """Whoever reads no document is wrong three times in four: each kind has four values."""
    rng = random.Random("decoys/0")
    counted, answers = 0, dict[str, set[str]]()
    for _ in range(400):
        task = make_task(rng, 0)
        verbs = re.findall(r"\w+ ((?:is at|has|eats|likes|sees) )", " ".join(task.documents))
        assert len(set(verbs)) == (1 if "How many" in task.question else 5)
        counted += "How many" in task.question
        kind = " ".join(word for word in re.findall(r"\w+", task.question) if word not in NAMES)
        if "How many" not in kind:
            answers.setdefault(kind, set()).add(task.answer)
    assert 60 < counted < 140, "facts are found, and in a quarter of the tasks combined"
    assert [len(found) for found in answers.values()] == [4] * 5


@pytest.mark.parametrize("difficulty", [1, 2, 5])
def test_whoever_reads_no_names_is_often_wrong(difficulty: int) -> None:
    """Facts of the asked kinds are there of others too."""
    rng = random.Random(f"decoys/{difficulty}")
    for _ in range(200):
        task = make_task(rng, difficulty)
        text = " ".join(task.documents)
        if "At which place" in task.question:
            owners = re.findall(r"(\w+) has the [\w ]+\.", text)
            others = {solve(text, f"At which place is what {o} has?") for o in owners}
            assert len(owners) == len(others) == 3


def solve_or_none(text: str, question: str) -> str | None:
    try:
        return solve(text, question)
    except (TypeError, ValueError):
        return None


def test_documents_grow_to_32k_tokens_and_beyond() -> None:
    sizes = [
        len(next(LongContext().prompts(seed=1, count=1, difficulty=d)).messages[0].content)
        for d in (0, 5, 7, 8)
    ]
    assert sizes[0] < 200
    # About three characters a token.
    assert sizes[1] > 3 * 5_000
    assert sizes[2] > 3 * 30_000
    assert sizes[3] > 3 * 60_000


def test_easy_tasks_are_many_and_their_answer_is_not_always_in_one_place() -> None:
    prompts = list(LongContext().prompts(seed=1, count=2000))
    places = {p.messages[0].content.find(p.demonstration[0].reasoning) > 60 for p in prompts}
    assert places == {True, False}
    # Of everybody's five facts, and how many share each of five times four.
    assert len({p.answer["question"] for p in prompts}) == 5 * len(NAMES) + 5 * 4
