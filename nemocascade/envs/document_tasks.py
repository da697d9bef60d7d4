"""Generated questions over documents: facts to find, and to combine across documents."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nemocascade.envs.words import CATEGORIES, COLORS, NAMES

PLACES = CATEGORIES["place"]
_THINGS = CATEGORIES["cloth"] + CATEGORIES["tool"]


@dataclass(frozen=True)
class DocumentTask:
    """documents: the texts to read. reasoning: the facts behind the answer, in order."""

    documents: tuple[str, ...]
    question: str
    answer: str
    reasoning: str


def make_task(rng: random.Random, difficulty: int) -> DocumentTask:
    """Make a question whose facts are in different documents, among distractors.

    Difficulty 0: five one-sentence documents; the question asks for one of five kinds of facts, or
    in a quarter of the tasks for how many documents state the same fact. Difficulty d >= 1:
    `5 (d + 1)` documents of `2^d` sentences; the question needs a chain of `d + 2` facts, or a
    count or maximum over facts in more than `d` documents. Tasks become about six times as long
    with every two levels, without limit.
    """
    if difficulty <= 0:
        # A tiny model learns to find a fact within minutes of SFT, but hardly to count.
        return (_same if rng.random() < 0.25 else _find)(rng)
    facts, question, answer, reasoning, distract = rng.choice(_KINDS)(rng, difficulty)
    count, length = 5 * (difficulty + 1), 2**difficulty
    documents: list[list[str]] = [[] for _ in range(count)]
    for fact, place in zip(facts, rng.sample(range(count), len(facts)), strict=True):
        documents[place].append(fact)
    for document in documents:
        document += [distract() for _ in range(length - len(document))]
        rng.shuffle(document)
    return DocumentTask(tuple(map(" ".join, documents)), question, answer, reasoning)


_FINDS = (
    ("{name} is at the {value}.", "Where is {name}?", "How many are at the {value}?", PLACES[:4]),
    (
        "{name} has a {value}.",
        "What does {name} have?",
        "How many have a {value}?",
        CATEGORIES["cloth"][:4],
    ),
    (
        "{name} eats {value}.",
        "What does {name} eat?",
        "How many eat {value}?",
        CATEGORIES["food"][:4],
    ),
    ("{name} likes {value}.", "What does {name} like?", "How many like {value}?", COLORS[:4]),
    (
        "{name} sees a {value}.",
        "What does {name} see?",
        "How many see a {value}?",
        CATEGORIES["animal"][:4],
    ),
)
"""Per kind: the fact, the question for its value, the question for its count, and values."""


def _find(rng: random.Random) -> DocumentTask:
    """Ask for one of five people's facts, each of another kind."""
    names = rng.sample(NAMES, len(_FINDS))
    values = [rng.choice(kind[3]) for kind in _FINDS]
    facts = [
        kind[0].format(name=name, value=value)
        for kind, name, value in zip(_FINDS, names, values, strict=True)
    ]
    asked = rng.randrange(len(facts))
    question = _FINDS[asked][1].format(name=names[asked])
    documents = tuple(rng.sample(facts, len(facts)))
    return DocumentTask(documents, question, values[asked], facts[asked])


def _same(rng: random.Random) -> DocumentTask:
    """Ask how many of five people share a value; each has one of two."""
    fact, _, question, values = rng.choice(_FINDS)
    wanted, other = rng.sample(values, 2)
    names, count = rng.sample(NAMES, 5), rng.randint(1, 4)
    facts = [fact.format(name=name, value=wanted) for name in names[:count]]
    rest = [fact.format(name=name, value=other) for name in names[count:]]
    documents = tuple(rng.sample([*facts, *rest], 5))
    reasoning = f"{' '.join(facts)} That is {count}."
    return DocumentTask(documents, question.format(value=wanted), str(count), reasoning)


_Made = tuple[list[str], str, str, str, Callable[[], str]]
"""Facts, question, answer, reasoning, and a function that returns a distractor sentence."""


class _Numbers:
    """Unique numbers of boxes, so that no two sentences of a task are about one box."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._seen: set[int] = set()

    def __call__(self) -> int:
        # The range is at least twice the count, so a few draws find a new number.
        limit = 2 * len(self._seen) + 1000
        while (number := self._rng.randrange(limit)) in self._seen:
            pass
        self._seen.add(number)
        return number


_CHAINS = 3


def _chain(rng: random.Random, difficulty: int) -> _Made:
    """Ask at which place a chain of boxes with a person's thing ends.

    Other people's things are in equally long chains that end at other places.
    """
    number = _Numbers(rng)
    names, places = rng.sample(NAMES, _CHAINS), rng.sample(PLACES, _CHAINS)
    things = rng.sample([f"the {c} {t}" for c in COLORS for t in _THINGS], _CHAINS)
    chains = []
    for name, thing, place in zip(names, things, places, strict=True):
        holders = [thing, *(f"box {number()}" for _ in range(difficulty))]
        links = [f"{a} is in {b}." for a, b in itertools.pairwise(holders)]
        chains.append([f"{name} has {thing}.", *links, f"{holders[-1]} is at the {place}."])

    def distract() -> str:
        where = rng.choice((f"at the {rng.choice(PLACES)}", f"in box {number()}"))
        return f"box {number()} is {where}."

    question = f"At which place is what {names[0]} has?"
    return [*itertools.chain(*chains)], question, places[0], " ".join(chains[0]), distract


def _count(rng: random.Random, difficulty: int) -> _Made:
    """Ask how many boxes are at a place; each is in its own document."""
    number = _Numbers(rng)
    place, *others = rng.sample(PLACES, len(PLACES))
    found = difficulty + 1 + rng.randint(0, 3 * difficulty + 2)
    facts = [f"box {number()} is at the {place}." for _ in range(found)]

    def distract() -> str:
        return f"box {number()} is at the {rng.choice(others)}."

    question = f"How many boxes are at the {place}?"
    return facts, question, str(found), f"{' '.join(facts)} That is {found}.", distract


def _most(rng: random.Random, difficulty: int) -> _Made:
    """Ask who has the most of one kind; distractors are about other kinds."""
    kind, *others = rng.sample(CATEGORIES["food"], len(CATEGORIES["food"]))
    people = rng.sample(NAMES, min(len(NAMES), difficulty + 2))
    amounts = rng.sample(range(2, 100), len(people))
    facts = [f"{n} has {k} {kind}s." for n, k in zip(people, amounts, strict=True)]
    most = max(amounts)
    winner = people[amounts.index(most)]

    def distract() -> str:
        return f"{rng.choice(NAMES)} has {rng.randint(2, 999)} {rng.choice(others)}s."

    reasoning = f"{' '.join(facts)} The most is {most}."
    return facts, f"Who has the most {kind}s?", winner, reasoning, distract


_KINDS: Sequence[Callable[[random.Random, int], _Made]] = (_chain, _count, _most)
