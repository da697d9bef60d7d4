"""The 25 kinds of IFEval, each with texts that follow it and that don't; rows of all kinds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemocascade.envs.instruction_following import Grading, InstructionFollowing
from nemocascade.envs.instructions import libraries, registry
from nemocascade.envs.instructions.registry import Options
from nemocascade.runtime.row_errors import DataError
from nemocascade.sandbox.child import ChildError, ChildPool
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
        ["food", "xfoo", "xc+"],
        ["a FOO.", "a c"],
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
        ["hello\n\nb", "a\n\nb\n\nhello", "a\nhello", "a\n\nhellos", "a\n\n\"'hello"],
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
    ("detectable_content:postscript", {"postscript_marker": "p.s."}, ["pass"], ["PS b", "p s"]),
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
        ['{"a": 1}', "```json\n[1]\n```", "3", "```JSON```[1]"],
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
        ["AB and CD", "I am A", "U.S. and A-B"],
        ["AB and cd", "1 2"],
    ),
    ("change_case:english_capital", {}, [ENGLISH.upper()], [ENGLISH, "Abc"]),
    ("change_case:english_lowercase", {}, [ENGLISH], [ENGLISH.upper(), ENGLISH.title()]),
    ("punctuation:no_comma", {}, ["a b"], ["a, b"]),
    ("startend:quotation", {}, ['"a"', ' "a b" '], ['"a', '"', "a"]),
]


RULE = Options("langdetect", "rule")


@pytest.mark.parametrize(("kind", "arguments", "good", "bad"), CASES)
def test_a_kind(kind: str, arguments: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for text in good:
        assert registry.follows(kind, arguments, text, RULE), text
    for text in [*bad, "", " \n"]:
        assert not registry.follows(kind, arguments, text, RULE), text


def test_all_25_kinds_are_there_and_tried() -> None:
    assert len(registry.IFEVAL) == 25
    assert {case[0] for case in CASES} == set(registry.IFEVAL)


def test_english_by_letters() -> None:
    kind, letters = "change_case:english_lowercase", Options("letters", "rule")
    assert registry.follows(kind, {}, "a cat", letters)
    assert not registry.follows(kind, {}, "кот", letters)
    assert not registry.follows("change_case:english_capital", {}, "ÄB", letters)
    with pytest.raises(ValueError, match="needs langdetect"):
        registry.follows("language:response_language", {"language": "en"}, "a", letters)


def test_language_detection_is_reproducible() -> None:
    assert len({libraries.detect_language("no") for _ in range(3)}) == 1


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
    assert sum(verdict.details["followed"]) == round(2 * reward) or grading == "binary"


def test_reasoning_does_not_count(children: ChildPool) -> None:
    domain = InstructionFollowing(children)
    assert domain.score(TWO, [Message("assistant", '<think>a, b</think>"c"')]).reward == 1.0
    assert domain.score(TWO, [Message("assistant", '"c"</think>a, b')]).reward == 0.0


def test_a_row_names_its_grading(children: ChildPool) -> None:
    domain = InstructionFollowing(children)
    row = {"instruction_id_list": TWO.answer["kinds"], "kwargs": [None, {}]}
    for mode, reward in (("fraction", 0.5), ("binary", 0.0), (None, 0.0)):
        answer = domain.parse({**row, "grading_mode": mode})
        assert (
            domain.score(replace(TWO, answer=answer), [Message("assistant", "a")]).reward == reward
        )
    with pytest.raises(ValueError, match=r"grading_mode\('best'\) must be one of"):
        domain.parse({**row, "grading_mode": "best"})


@pytest.mark.parametrize(
    ("kind", "kwargs", "error"),
    [
        ("keywords:frequency", {"keyword": "a"}, "['frequency', 'relation'] are missing"),
        (
            "keywords:frequency",
            {"keyword": "a", "frequency": 1, "relation": "most"},
            "relation 'most' is neither",
        ),
        ("punctuation:no_comma", {"extra": 1}, "unknown arguments ['extra'], it takes []"),
        ("count:numbers", {"N": "2"}, "N must be a number from 0 on, it is '2'"),
        ("count:numbers", {"N": 2.5}, "N must be a whole number"),
        ("count:words_japanese", {"N": 0}, "count:words_japanese: slice step"),
        ("keywords:existence", {"keywords": "cat"}, "must be a list of texts, it is 'cat'"),
        ("keywords:existence", {"keywords": ["("]}, "missing ), unterminated subpattern"),
        ("startend:end_checker", {"end_phrase": [" "]}, "must be a text, it is ' '"),
        ("punctuation:no_coma", {}, "do you mean punctuation:no_comma?"),
        ("x:unheard_of", {}, "unknown instruction 'x:unheard_of'"),
    ],
)
def test_a_row_with_an_instruction_that_cannot_be_checked(
    children: ChildPool, tmp_path: Path, kind: str, kwargs: dict[str, Any], error: str
) -> None:
    row = {"prompt": "go", "instruction_id_list": [kind], "kwargs": [{**kwargs, "n": None}]}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError) as raised:
        list(InstructionFollowing(children).read(path))
    for part in ("rows.jsonl:1", kind, error):
        assert part in str(raised.value)


def test_a_list_stands_for_its_first_text_and_a_whole_float_for_an_integer() -> None:
    assert registry.checked_arguments(
        "first_word:first_word_sent", {"first_word": ["The", "A"]}
    ) == {"first_word": "The"}
    given = registry.checked_arguments("count:numbers", {"N": 2.0})
    assert type(given["N"]) is int


class Killed(ChildPool):
    """A pool in which a check of the answer runs out of time, and that of a plain text does not."""

    def call(self, function: str, *arguments: Any) -> Any:
        if "aaa" in arguments[2]:
            raise ChildError("killed")
        return True


def test_a_pattern_of_a_row_runs_in_a_child() -> None:
    task = prompt(["keywords:existence"], [{"keywords": ["(a+)+$"]}])
    verdict = InstructionFollowing(Killed()).score(task, [Message("assistant", "a" * 20 + "b")])
    assert (verdict.reward, verdict.fault) == (0.0, "answer")


STAND_IN = """
def sent_tokenize(text): return text.split("|")
def word_tokenize(text): return text.split("+")
def pos_tag(words): raise LookupError("no tagger")
class corpus:
    class stopwords:
        @staticmethod
        def words(language): raise LookupError("no stop words")
"""


@pytest.mark.parametrize("is_there", [True, False])
def test_punkt_splits_where_it_is_installed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_there: bool,
) -> None:
    source = STAND_IN if is_there else "raise ModuleNotFoundError('nltk', name='nltk')"
    (tmp_path / "nltk.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    pool = ChildPool()
    domain = InstructionFollowing(pool)
    kinds = ["length_constraints:number_sentences", "change_case:capital_word_frequency"]
    relations = {"relation": AT_LEAST, "num_sentences": 2}
    capitals = {"capital_relation": AT_LEAST, "capital_frequency": 2}
    task = prompt(kinds, [relations, capitals])
    for text in ("A+B|C", "IT IS. GO"):
        verdict = domain.score(task, [Message("assistant", text)])
        assert verdict.reward == float(is_there is ("|" in text)), verdict
    assert "nltk" not in sys.modules, "its time is not linear: it belongs into a child"
    warnings = [r.message for r in caplog.records if "split by rules" in r.message]
    assert len(warnings) == (not is_there)
    with pytest.raises(ValueError, match="words:start_verb cannot be checked: nltk") as raised:
        domain.parse({"instruction_id_list": ["words:start_verb"]})
    remedy = "nltk.downloader averaged" if is_there else "pip install 'nemocascade[ifeval]'"
    assert remedy in str(raised.value)
    pool.close()
