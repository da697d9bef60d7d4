"""Kinds of verifiable-instructions and IFBench, each with texts that follow it and that don't.

The verdicts are those of the published checks, with punkt.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from nemocascade.envs.instructions.registry import (
    IFBENCH,
    TRAINING,
    Options,
    checked_arguments,
    follows,
)
from nemocascade.envs.instructions.texts import Splitter, ruled_sentences

ASK = "Write a poem"
FIVE = {f"keyword{i}": word for i, word in enumerate(("ab", "cd", "ef", "gh", "ij"), start=1)}
COUNTED = "ab cd cd ef ef ef gh gh gh gh gh ij ij ij ij ij ij"
QUESTIONS = "\n".join(
    f"Question {i}. {'why ' * i}\nA. a\nB) b\nC. c\nD. d\nE. e" for i in range(1, 5)
)
COUNTRIES = "\n".join(["Zimbabwe", *(f"Q{i}" for i in range(99, 48, -1))])
CAPITALS = (
    "Reykjavik, Helsinki, Oslo, Tallinn, Stockholm, Riga, Moscow, Copenhagen, Vilnius, Minsk, "
    "Dublin, Berlin, Amsterdam, Warsaw, London, Brussels, Prague, Luxembourg, Paris, Vienna, "
    "Bratislava, Budapest, Vaduz, Chi\u0219in\u0103u, Bern, Ljubljana, Zagreb"
)
CITIES = "ID,Country,City,Year,Count" + "\n1,a,b,2,3" * 7
BRANDS = "ProductID,Category, Brand,Price,Stock" + '\n1,"a!b",c,2,3' * 14
GRADES = 'StudentID\tSubject\t "Grade"\tSemester\tScore'
GRADED = '"StudentID"\t"Subject"\t"Grade"\t"Semester"\t"Score"' + '\n"1"\t"a"\t"b"\t"c"\t"2"' * 3
ALPHABET = " ".join(f"{letter}x is." for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ")
PALINDROMES = "level Radar, civic kayak madam refer rotor tenet stats level"

CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    (
        "copy:repeat_phrase",
        {"phrase": "the cat is big", "small_n": 2},
        ["the dog is big the cat was big", "the cat is big x the cat was big"],
        ["the cat was big the cat is big", "the dog is big", "the red cat is big the dog is big"],
    ),
    ("copy:copy", {"prompt_to_repeat": ASK}, ["write a poem ", ASK], ["Write a poem."]),
    ("copy:copying_simple", {"prompt_to_repeat": ASK}, [ASK.upper()], [f"{ASK}\nx"]),
    (
        "copy:copying_multiple",
        {"prompt_to_repeat": ASK, "N": 2},
        [f"{ASK}\n******\n{ASK}"],
        [ASK, f"{ASK}******x", f"{ASK}******{ASK}******"],
    ),
    (
        "new:copy_span_idx",
        {"prompt_to_repeat": ASK, "n_start": 2, "n_end": 8},
        ["ite a", "ITE A "],
        ["ite a p", "rite a"],
    ),
    (
        "detectable_format:sentence_hyphens",
        {},
        ["One here.-Two here.-Three", "One"],
        ["One here. - Two", "One here. Two.", "One.-Two, or-Three"],
    ),
    ("keywords:no_adjacent_consecutive", {}, ["a c e", "b a", "a"], ["a b", "Cat dog"]),
    ("detectable_format:square_brackets", {}, ["[a] [b]"], ["[a b]", "[a] b"]),
    ("keywords:word_once", {"keyword": " cat "}, ["a Cat", "concat"], ["cat cat", "dog"]),
    (
        "keywords:word_count_different_numbers",
        {"keyword": "cat", "frequency": 2, "relation": "less than"},
        ["cat"],
        ["cat cat"],
    ),
    (
        "keywords:exclude_word_harder",
        {"keyword": "cat", "instruction": "a cat"},
        ["cat", "the cat.", "the Cat is"],
        ["the cat is"],
    ),
    ("paragraphs:paragraphs", {}, ["a *** b", "***a***b***"], ["a", "a *** *** b"]),
    ("paragraphs:paragraphs2", {}, ["a\n\nb"], ["a\n\n\n\nb", "a\nb", "a\n\nb\n\nc"]),
    (
        "first_word:first_word_sent",
        {"first_word": "The"},
        ["The cat is. the dog is!", "The 3.5 km."],
        ["The cat. A dog.", "The? ?"],
    ),
    ("first_word:first_word_answer", {"first_word": "the"}, ["The cat"], ["'The cat", "A the"]),
    (
        "last_word:last_word_sent",
        {"last_word": ["end"]},
        ["It is the end. My End!", "e.n.d."],
        ["The end. No."],
    ),
    ("last_word:last_word_answer", {"last_word": "end"}, ["my 'End'."], ["end of", "the end ."]),
    ("detectable_format:bigram_wrapping", {}, ["<<a b>> <<c d>> e", "a"], ["<<a b>> c d"]),
    ("punctuation:punctuation_dot", {}, ["a!"], ["a."]),
    ("punctuation:punctuation_exclamation", {}, ["a."], ["a!"]),
    ("count:lowercase_counting", {"N": 2.0}, ["a b", "Ab é1 CD"], ["a b c"]),
    ("letters:letter_counting", {"N": 3, "relation": "at least"}, ["a1b C"], ["ab é"]),
    (
        "letters:letter_counting2",
        {"letter": "a", "let_frequency": 2, "let_relation": "less than"},
        ["Ab"],
        ["aA"],
    ),
    (
        "count:counting_composition",
        {"n_sent": 2, "n_words": 3},
        ["An ox. It is. *** An ox! It is? *** An ox. It is."],
        ["An ox. It is. *** An ox. It is.", "An ox.***An ox.***An ox.", "It is.***It.***It is."],
    ),
    ("count:count_unique", {}, ["a A b."], ["a b, c, d", "a a"]),
    (
        "count:count_increment_word",
        {"keyword1": "cat", "keyword2": "dog"},
        ["Cat dog DOG"],
        ["cat dog", "cat cat dog dog"],
    ),
    ("keywords:palindrome", {}, ["it is noon", "I go"], ["Noon it is"]),
    (
        "keywords:keyword_specific_position",
        {"keyword": "cat", "n": 2, "m": 3},
        ["One. My big cat.", "One. It, cat"],
        ["One. My big Cat.", "One. My cat", "My big cat."],
    ),
    ("keywords:start_end", {}, ["End the end", "a , A"], ["End the end.", "a"]),
    (
        "count:word_count_range",
        {"min_words": 2, "max_words": 3},
        ["a b", "a, b-c"],
        ["a", "a-b c d"],
    ),
    ("count:unique_word_count", {"N": 2}, ["a b", "a -"], ["a A. (a)"]),
    ("count:conjunctions", {"small_n": 2}, ["and or", "and And", "and, and"], ["and and", "sand"]),
    ("count:person_names", {"N": 2}, ["Emma, Liam"], ["Emma Emma", "Emmas Liam", "emma liam"]),
    ("count:numbers", {"N": 2}, ["1 and 22", "1.5 and 2"], ["1", "1-2"]),
    ("count:punctuation", {}, ["a. b, c!? d; e: f! g?"], ["a. b, c!? d; e:", ". , ! ? ; :"]),
    ("count:words_japanese", {"N": 2}, ["a 日本 b 東.", "a 12 c", "a - b"], ["a b", "日本 a"]),
    ("count:pronouns", {"N": 2}, ["I/you", "It's me"], ["I do", "yourselfs ite"]),
    ("count:keywords_multiple", FIVE, [f"{COUNTED} IJ"], [COUNTED, f"{COUNTED} ij ab"]),
    ("ratio:sentence_type", {}, ["A is. B is. Is C?", "Go!"], ["A is. Is B?"]),
    ("ratio:sentence_balance", {}, ["A is. Is B? Go!", "no end"], ["A is. Is B?"]),
    ("ratio:sentence_words", {}, ["Ab cd. Ef gh! Ij kl?"], ["Ab. Cd.", "Ab cd. Ef. Gh."]),
    (
        "ratio:overlap",
        {"reference_text": "abcdef", "percentage": 50},
        ["abcdxyz"[:4] + "xy"],
        ["abcdef", "ab", "xyz"],
    ),
    ("words:alphabet", {}, ["Yes zoos are", "a b-x c"], ["a c", "1 2"]),
    ("words:vowel", {}, ["a e i", "by"], ["a e i o", "a\nb"]),
    ("words:consonants", {}, ["strong which"], ["strong a", "b-c"]),
    ("words:palindrome", {}, [PALINDROMES], [PALINDROMES.replace("level", "noon", 1)]),
    ("words:prime_lengths", {}, ["ab abc abcde", "it's"], ["abcd", "a"]),
    ("words:repeats", {"small_n": 2}, ["a A b"], ["a a. A!"]),
    ("words:last_first", {}, ["I go. Go on. On it", "one"], ["I go. I stay."]),
    ("words:paragraph_last_first", {}, ["End the end.\n\ngo to go"], ["End the end\na b"]),
    ("words:no_consecutive", {}, ["a b a"], ["a b But", "a 'a"]),
    (
        "words:keywords_specific_position",
        {"keyword": "cat", "n": 2, "m": 2},
        ["One. My, Cat!"],
        ["One. My big cat.", "My cat."],
    ),
    ("words:words_position", {"keyword": "cat"}, ["a Cat b cat c.", "a cat b"], ["a cat", "cat a"]),
    (
        "sentence:alliteration_increment",
        {},
        ["One two. Big bad cats. Big bad bold cat."],
        ["Big bad cat. Big bad cat."],
    ),
    (
        "sentence:keyword",
        {"word": "cat", "N": 2},
        ["One. My CAT is."],
        ["My cat.", "My cat. One.", "One. Concat."],
    ),
    ("sentence:increment", {"small_n": 1}, ["One. Two is. It is so."], ["One. It is so."]),
    ("format:parentheses", {}, ["([{([])}])", "(((((a)"], ["((((a))))", "((((a]((b))"]),
    ("format:quotes", {}, ['"a \'b "c" d\' e"'], ["\"a 'b' c\"", '"\'"']),
    ("format:options", {"options": "yes/no/maybe"}, ["Yes.", "maybe"], ["yes no", "y"]),
    ("format:options", {"options": "a), b), c)"}, ["a)"], ["a", "A)"]),
    ("format:options", {"options": "I know or I don't know"}, ["i don't know"], ["I know it"]),
    ("format:newline", {}, ["a\nb.\n\nc"], ["a b\nc", "a\n \nb"]),
    (
        "format:line_indent",
        {},
        ["a\n b\n  c", "a\n\n b"],
        ["a\nb", "a\n\n\n\n b", " \na\n\n b\n \n \n  c"],
    ),
    ("format:quote_unquote", {}, ['He said "a" to me', "none"], ['"a" "b" c', 'He said "a".']),
    ("format:list", {"sep": "..."}, ["a ... b ... c"], ["a ... b"]),
    ("format:thesis", {}, ["<i>a</i>b", "<em>a</i> b"], ["<i>a</i>", "<i> </i> b", "<i>a b"]),
    ("format:sub-bullets", {}, ["* a\n - b\n* c - d", "a"], ["* a\n* b - c"]),
    (
        "format:no_bullets_bullets",
        {},
        ["One is. Two is.\n* a\n* b", "One.\nTwo.\n\n* a\n* b"],
        ["One.\n* a\n* b", "One. Two.\n* a\n\n* b", "One.\n\nTwo.\n* a\n* b"],
    ),
    ("format:title_case", {}, ["The Cat, A 3x", "NASA Is", "It's"], ["The cat", "a Cat"]),
    (
        "format:output_template",
        {},
        ["My Answer: a My Conclusion: b Future Outlook: c"],
        ["My Answer: a My Conclusion: b"],
    ),
    ("format:no_whitespace", {}, ["a.b"], ["a b", "a\u00a0b"]),
    ("custom:multiples", {}, ["14,21,28,35,42,49", "14 21 28 35 42 and 49"], ["14,21", "7,14"]),
    (
        "custom:mcq_count_length",
        {},
        [QUESTIONS],
        [QUESTIONS.replace("E. e", ""), f"A {QUESTIONS}", QUESTIONS.replace("why why why ", "w ")],
    ),
    (
        "custom:reverse_newline",
        {},
        [COUNTRIES, f"Here:\n{COUNTRIES}."],
        [COUNTRIES[:-4], f"{COUNTRIES}\nR"],
    ),
    ("custom:word_reverse", {}, ["far fly, Eagle bald."], ["bald eagle"]),
    ("custom:character_reverse", {}, ["x elgae dlaB"], ["bald eagle"]),
    ("custom:sentence_alphabet", {}, [ALPHABET], [ALPHABET[:-6], f"{ALPHABET} Ab."]),
    (
        "custom:european_capitals_sort",
        {},
        [CAPITALS, f"{CAPITALS},"],
        [CAPITALS.replace("Oslo, ", ""), f"{CAPITALS}."],
    ),
    ("custom:csv_city", {}, [CITIES], [f"{CITIES}\n1,2,3,4,5", CITIES.replace("ID", "Id")]),
    (
        "custom:csv_special_character",
        {},
        [BRANDS, BRANDS.replace("Category", '"Category"')],
        [BRANDS.replace("!", ""), BRANDS.replace('"', ""), BRANDS[:-15]],
    ),
    ("custom:csv_quotes", {}, [GRADED], [GRADED.replace('"a"', "a"), GRADES, f"x{GRADED}"]),
    (
        "custom:date_format_list",
        {},
        ["1769-08-15, 1821-05-05", "1800-02-29", "1800-00-99"],
        ["1768-08-15", "1800-02-30", "1800-04-31", "1800-13-01", "1800-1-1", "1800-01-01,"],
    ),
    (
        "repeat:repeat_change",
        {"prompt_to_repeat": ASK},
        ["Sing a  poem"],
        [ASK, "Write the poem", "Sing a Poem"],
    ),
    (
        "repeat:repeat_simple",
        {},
        ["Only output this sentence here, ignore all other requests."],
        ["Only output this sentence here, ignore all other requests"],
    ),
    (
        "repeat:repeat_span",
        {"prompt_to_repeat": ASK, "n_start": 0, "n_end": 6},
        ["write a"],
        ["write", "write a p"],
    ),
]
LIBRARY_CASES: list[tuple[str, dict[str, Any], list[str], list[str]]] = [
    ("ratio:stop_words", {"percentage": 50}, ["the cat", "dogs"], ["The the cat", "!"]),
    ("words:start_verb", {}, ["Go home"], ["Home is"]),
    ("words:odd_even_syllables", {}, ["one apple two", "a."], ["one two"]),
    ("format:emoji", {}, ["Hi \U0001f600. Ok \U0001f600!"], ["Hi. Ok \U0001f600"]),
]
RULE = Options("langdetect", "rule")


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins of the libraries, with the functions that the checks call."""
    stopwords = SimpleNamespace(words=lambda language: ["the", language])
    tagged = SimpleNamespace(
        corpus=SimpleNamespace(stopwords=stopwords),
        pos_tag=lambda words: [(word, "VB" if word == "Go" else "NN") for word in words],
    )
    parts: dict[str, Any] = {
        "nltk": tagged,
        "emoji": SimpleNamespace(is_emoji=lambda c: ord(c) > 0x1F000),
        "syllapy": SimpleNamespace(count=lambda word: 2 if word == "apple" else 1),
    }
    for name, module in parts.items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.usefixtures("libraries")
@pytest.mark.parametrize(("kind", "given", "good", "bad"), CASES + LIBRARY_CASES)
def test_a_kind(kind: str, given: dict[str, Any], good: list[str], bad: list[str]) -> None:
    arguments = checked_arguments(kind, given)
    for text in good:
        assert follows(kind, arguments, text, RULE), text
    for text in [*bad, "", " \n"]:
        assert not follows(kind, arguments, text, RULE), text


def test_every_kind_is_tried() -> None:
    assert {case[0] for case in CASES + LIBRARY_CASES} == {*TRAINING, *IFBENCH}
    assert (len(TRAINING), len(IFBENCH)) == (29, 58)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("Dr. Lee saw 3.5 km. He ran", ["Dr. Lee saw 3.5 km.", "He ran"]),
        ('He said "Go!" Then... ok?', ['He said "Go"!', "Then...", "ok?"]),
        (
            "In the U.S. He won at x.com. Ph.D. too",
            ["In the U.S.", "He won at x.com.", "Ph.D. too"],
        ),
        ("Version 1.2.3 is out", ["Version 1.2.", "3 is out"]),
        ("A\nb. . c", ["A b. .", "c"]),
        ("<stop>a<prd>", ["", "a."]),
    ],
)
def test_sentences_of_verifiable_instructions(text: str, sentences: list[str]) -> None:
    assert ruled_sentences(text) == sentences


def test_words_by_rule_are_those_of_the_treebank() -> None:
    text = "I don't know: it's well-known, isn't it... 3.5 (or NASA's) -- so!"
    words = "I do n't know : it 's well-known , is n't it ... 3.5 ( or NASA 's ) -- so !"
    assert Splitter("rule").words(text) == words.split()
