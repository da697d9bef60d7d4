"""The 25 instruction kinds, each with texts that follow it and texts that don't."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemocascade.envs import ifeval
from nemocascade.envs.instruction_following import Grading, InstructionFollowing
from nemocascade.sandbox.child import ChildPool
from nemocascade.types import Message, Prompt

AT_LEAST, LESS = "at least", "less than"
ENGLISH = "this is a plain sentence about the weather in the morning"
CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "keywords:existence",
        {"keywords": ["Cat", "dog"]},
        ["a CAT and dogs"],
        ["a cat", "", "c a t dog"],
    ),
    (
        "keywords:frequency",
        {"keyword": "ai", "frequency": 2, "relation": AT_LEAST},
        ["ai AI", "maize rain"],
        ["ai once"],
    ),
    (
        "keywords:frequency",
        {"keyword": "ai", "frequency": 2, "relation": LESS},
        ["ai once", "none"],
        ["ai ai"],
    ),
    (
        "keywords:forbidden_words",
        {"forbidden_words": ["foo", "c++"]},
        ["food", "xfoo", "c+"],
        ["a FOO.", "I write c++ code"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "A", "let_frequency": 3, "let_relation": AT_LEAST},
        ["bAnana"],
        ["bana"],
    ),
    (
        "keywords:letter_frequency",
        {"letter": "#", "let_frequency": 1, "let_relation": LESS},
        ["a"],
        ["#a"],
    ),
    (
        "language:response_language",
        {"language": "de"},
        ["Das Wetter ist heute sehr schön und warm."],
        ["The weather is very nice and warm today."],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": AT_LEAST},
        ["One. Two.", 'He said "go!" Then left.', "What? No"],
        ["One only.", "Dr. Smith met Mr. Jones at 3.5 km", "e.g. this"],
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": LESS},
        ["One only."],
        ["One. Two."],
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        ["a\n***\nb", "***\na *** b\n***"],
        ["a\n\nb", "a *** *** b", "a *** b *** c"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": AT_LEAST},
        ["a b c", "it's ok"],
        ["a b", "- - -"],
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": LESS},
        ["a b"],
        ["a b c"],
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "Hello"},
        ["a\n\nhello, b", "a\n\n'HELLO' b"],
        ["hello\n\nb", "a\n\nb\n\nhello", "a\nhello", "a\n\nhellos"],
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        ["[a] and [b]", "[][]"],
        ["[a] and b", "[a\nb] [c]"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        ["a\nP.S. b", "p. s. b"],
        ["a", "PS b"],
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.P.S"},
        ["a\nP.P.S b", "p. p. s."],
        ["a\nP.S. b"],
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        ["* a\n* b", "- a\n  * b"],
        ["* a", "** a\n** b", "* a\n* b\n- c"],
    ),
    (
        "detectable_format:constrained_response",
        {},
        ["My answer is yes.", "Well: My answer is maybe."],
        ["yes", "my answer is yes."],
    ),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        ["*a* and *b*", "*a* **b**"],
        ["*a*", "* * *a*", "*a\nb* *c*"],
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        ["Section 1 a\nSection 2 b"],
        ["Section 1 a", "Section one Section two", "section 1 section 2"],
    ),
    (
        "detectable_format:json_format",
        {},
        ['{"a": 1}', "```json\n[1]\n```", "3"],
        ["{a: 1}", "text", "[" * 100_000],
    ),
    ("detectable_format:title", {}, ["<<a>> b"], ["<< >>", "<a>", "<<a\n>>"]),
    (
        "combination:two_responses",
        {},
        ["a\n******\nb", "******a******b"],
        ["a", "a ****** a", "a ****** b ****** c", "a ****** ****** b"],
    ),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Say it. "},
        ["say it. Yes."],
        ["Yes. Say it."],
    ),
    ("startend:end_checker", {"end_phrase": "The End"}, ['a the end"', "the END "], ["the end."]),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": AT_LEAST},
        ["AB and CD", "I am A"],
        ["AB and cd"],
    ),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, "Abc"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.upper(), ENGLISH.title()]),
    ("punctuation:no_comma", {}, ["a b"], ["a, b"]),
    ("startend:quotation", {}, ['"a"', ' "a b" '], ['"a', '"', "a"]),
]


@pytest.mark.parametrize(("kind", "arguments", "good", "bad"), CASES)
def test_a_kind(kind: str, arguments: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for text in good:
        assert ifeval.follows(kind, arguments, text, "langdetect"), text
    for text in [*bad, "", " \n"]:
        assert not ifeval.follows(kind, arguments, text, "langdetect"), text


def test_all_25_kinds_are_there_and_tried() -> None:
    assert len(ifeval.KINDS) == 25
    assert {case[0] for case in CASES} == set(ifeval.KINDS)


def test_english_by_letters() -> None:
    kind = "change_case:english_lowercase"
    assert ifeval.follows(kind, {}, "a cat", "letters")
    assert not ifeval.follows(kind, {}, "кот", "letters")
    assert not ifeval.follows("change_case:english_capital", {}, "ÄB", "letters")
    with pytest.raises(ValueError, match="needs langdetect"):
        ifeval.follows("language:response_language", {"language": "en"}, "a", "letters")


def test_language_detection_is_reproducible() -> None:
    found = {ifeval.follows("change_case:english_lowercase", {}, "no", "langdetect") for _ in "123"}
    assert len(found) == 1


@pytest.fixture(scope="module")
def children() -> Iterator[ChildPool]:
    pool = ChildPool()
    yield pool
    pool.close()


def prompt(kinds: list[str], kwargs: list[dict[str, Any]]) -> Prompt:
    answer = {"kinds": kinds, "kwargs": kwargs}
    return Prompt("x", "instruction_following", (Message("user", "go"),), answer)


TWO = prompt(["punctuation:no_comma", "startend:quotation"], [{}, {}])


@pytest.mark.parametrize(
    ("grading", "text", "reward"),
    [
        ("binary", '"a"', 1.0),
        ("binary", "a", 0.0),
        ("fraction", "a", 0.5),
        ("fraction", '"a"', 1.0),
        ("fraction", ",", 0.0),
    ],
)
def test_binary_and_fraction(
    children: ChildPool, grading: Grading, text: str, reward: float
) -> None:
    domain = InstructionFollowing(children, grading=grading)
    verdict = domain.score(TWO, [Message("assistant", text, reasoning="a, b")])
    assert verdict.reward == reward
    assert sum(verdict.details["held"]) == round(2 * reward) or grading == "binary"


def test_reasoning_does_not_count(children: ChildPool) -> None:
    domain = InstructionFollowing(children)
    assert domain.score(TWO, [Message("assistant", '<think>a, b</think>"c"')]).reward == 1.0
    assert domain.score(TWO, [Message("assistant", '"c"</think>a, b')]).reward == 0.0


@pytest.mark.parametrize(
    ("kind", "kwargs", "error"),
    [
        ("keywords:frequency", {"keyword": "a"}, "TypeError"),
        ("keywords:frequency", {"keyword": "a", "frequency": 1, "relation": "most"}, "'most'"),
        ("punctuation:no_comma", {"extra": 1}, "TypeError"),
        ("count:unheard_of", {}, "unknown instruction 'count:unheard_of'"),
    ],
)
def test_instructions_that_cannot_be_checked_are_errors(
    children: ChildPool, kind: str, kwargs: dict[str, Any], error: str
) -> None:
    verdict = InstructionFollowing(children).score(
        prompt([kind], [kwargs]), [Message("assistant", "a")]
    )
    assert verdict.reward is None
    assert verdict.error is not None
    assert error in verdict.error


def test_ifbench_kinds_where_its_package_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package of the published form stands in for it: classes in a registry, found by import."""
    package = tmp_path / "ifbench"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "instructions_registry.py").write_text(
        "class Even:\n"
        "    def __init__(self, kind): self.kind = kind\n"
        "    def build_description(self, *, n): self.n = n\n"
        "    def check_following(self, value): return len(value.split()) % self.n == 0\n"
        "class Hangs(Even):\n"
        "    def check_following(self, value):\n"
        "        while True: pass\n"
        "INSTRUCTION_DICT = {'count:even': Even, 'count:hangs': Hangs}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = ChildPool(timeout_s=0.5)
    domain = InstructionFollowing(pool)
    for text, reward in (("a b", 1.0), ("a b c", 0.0), ("", 0.0)):
        task = prompt(["count:even", "punctuation:no_comma"], [{"n": 2}, {}])
        assert domain.score(task, [Message("assistant", text)]).reward == reward
    hung = domain.score(prompt(["count:hangs"], [{"n": 2}]), [Message("assistant", "a")])
    assert hung.reward is None
    assert "killed after 0.5 s" in str(hung.error)
    pool.close()
