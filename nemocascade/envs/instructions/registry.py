"""All instruction kinds by id: what checks them, and what that check needs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from typing import Any, get_type_hints

from nemocascade.envs.instructions import ifbench_forms as forms
from nemocascade.envs.instructions import ifbench_words as words
from nemocascade.envs.instructions import ifeval, training
from nemocascade.envs.instructions.ifeval import LanguageCheck, Relation
from nemocascade.envs.instructions.texts import Splitter, Tokenizer

_PLAIN = re.compile(r"[^.^$*+?{}\[\]\\|()]*")


@dataclass(frozen=True)
class Kind:
    """An instruction kind.

    check: a function of the text, of a `splitter` or `language_check` if it has such a parameter,
    and of the row's arguments. needs: names of `libraries.LIBRARIES` that it cannot do without.
    patterns: arguments that are regular expressions.
    """

    check: Callable[..., bool]
    needs: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Options:
    """How texts are read: the test for English, and what splits sentences and words."""

    language_check: LanguageCheck
    tokenizer: Tokenizer


def follows(kind: str, arguments: Mapping[str, Any], text: str, options: Options) -> bool:
    """Return True if `text` follows the instruction `kind`; an empty text follows none.

    arguments: as `checked_arguments` returns them. Raises KeyError for an unknown kind, TypeError
    or ValueError for arguments that do not fit it, ImportError or LookupError for what is missing.
    """
    check = KINDS[kind].check
    if not text.strip():
        return False
    given: dict[str, Any] = dict(arguments)
    if splits(kind):
        given["splitter"] = Splitter(options.tokenizer)
    if "language_check" in _parameters(kind):
        given["language_check"] = options.language_check
    return check(text, **given)


def is_quick(kind: str, arguments: Mapping[str, Any], options: Options) -> bool:
    """Return True if a check uses no library and takes a time that is linear in the text."""
    if needed(kind, options) or (splits(kind) and options.tokenizer == "punkt"):
        return False
    texts = [arguments[name] for name in KINDS[kind].patterns]
    flat = [t for found in texts for t in (found if isinstance(found, list) else [found])]
    return all(_PLAIN.fullmatch(t) or t.strip() in ifeval.POSTSCRIPTS for t in flat)


def splits(kind: str) -> bool:
    """Return True if a check splits the text into sentences or words."""
    return "splitter" in _parameters(kind)


def needed(kind: str, options: Options) -> tuple[str, ...]:
    """Return the libraries without which nothing can check a kind."""
    case = kind in ("change_case:english_capital", "change_case:english_lowercase")
    return () if case and options.language_check == "letters" else KINDS[kind].needs


def checked_arguments(kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a row's instruction in the types that its check takes.

    A whole float becomes an integer. Of a list where a text belongs, the first is meant. Raises
    ValueError for an unknown kind, and for arguments that are missing, unknown or of a wrong type.
    """
    if kind not in KINDS:
        near = get_close_matches(kind, KINDS, n=1)
        raise ValueError(
            f"unknown instruction {kind!r}: IFEval, verifiable-instructions and IFBench have none "
            "of that name" + (f"; do you mean {near[0]}?" if near else ": nothing can check it")
        )
    takes = arguments_of(kind)
    required = [name for name, (_, is_required) in takes.items() if is_required]
    if unknown := sorted(set(given) - set(takes)):
        raise ValueError(f"{kind}: unknown arguments {unknown}, it takes {list(takes)}")
    if absent := sorted(set(required) - set(given)):
        raise ValueError(f"{kind}: arguments {absent} are missing")
    return {name: _converted(f"{kind}: {name}", takes[name][0], v) for name, v in given.items()}


@cache
def _parameters(kind: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(KINDS[kind].check).parameters


@cache
def arguments_of(kind: str) -> dict[str, tuple[Any, bool]]:
    """Types of the row's arguments by name, each with True if it must be there."""
    hints = get_type_hints(KINDS[kind].check)
    return {
        name: (hints[name], parameter.default is parameter.empty)
        for name, parameter in _parameters(kind).items()
        if name not in ("text", "splitter", "language_check")
    }


def _converted(where: str, kind: Any, value: Any) -> Any:
    if kind == Relation:
        if value not in ("less than", "at least"):
            raise ValueError(f"{where} {value!r} is neither 'less than' nor 'at least'")
        return value
    if kind is str:
        value = value[0] if isinstance(value, list) and value else value
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where} must be a text, it is {value!r}")
        return value
    if kind == list[str]:
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise ValueError(f"{where} must be a list of texts, it is {value!r}")
        return value
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError(f"{where} must be a number from 0 on, it is {value!r}")
    if kind is int and value != int(value):
        raise ValueError(f"{where} must be a whole number, it is {value!r}")
    return int(value) if kind is int else float(value)


IFEVAL = {
    "keywords:existence": Kind(ifeval.keywords, patterns=("keywords",)),
    "keywords:frequency": Kind(ifeval.frequency, patterns=("keyword",)),
    "keywords:forbidden_words": Kind(ifeval.forbidden, patterns=("forbidden_words",)),
    "keywords:letter_frequency": Kind(ifeval.letter),
    "language:response_language": Kind(ifeval.language, needs=("langdetect",)),
    "length_constraints:number_sentences": Kind(ifeval.sentences),
    "length_constraints:number_paragraphs": Kind(ifeval.divided),
    "length_constraints:number_words": Kind(ifeval.words),
    "length_constraints:nth_paragraph_first_word": Kind(ifeval.nth_paragraph),
    "detectable_content:number_placeholders": Kind(ifeval.placeholders),
    "detectable_content:postscript": Kind(ifeval.postscript, patterns=("postscript_marker",)),
    "detectable_format:number_bullet_lists": Kind(ifeval.bullets),
    "detectable_format:constrained_response": Kind(ifeval.constrained),
    "detectable_format:number_highlighted_sections": Kind(ifeval.highlights),
    "detectable_format:multiple_sections": Kind(ifeval.sections, patterns=("section_spliter",)),
    "detectable_format:json_format": Kind(ifeval.json_format),
    "detectable_format:title": Kind(ifeval.title),
    "combination:two_responses": Kind(ifeval.two_responses),
    "combination:repeat_prompt": Kind(ifeval.repeat),
    "startend:end_checker": Kind(ifeval.end),
    "change_case:capital_word_frequency": Kind(ifeval.capital_words),
    "change_case:english_capital": Kind(ifeval.capital, needs=("langdetect",)),
    "change_case:english_lowercase": Kind(ifeval.lowercase, needs=("langdetect",)),
    "punctuation:no_comma": Kind(ifeval.no_comma),
    "startend:quotation": Kind(ifeval.quotation),
}
TRAINING = {
    "copy:repeat_phrase": Kind(training.repeat_phrase, patterns=("phrase",)),
    "copy:copy": Kind(training.copy),
    "copy:copying_simple": Kind(training.copy),
    "copy:copying_multiple": Kind(training.copy_many),
    "new:copy_span_idx": Kind(training.copy_span),
    "detectable_format:sentence_hyphens": Kind(training.sentence_hyphens),
    "keywords:no_adjacent_consecutive": Kind(training.no_adjacent),
    "detectable_format:square_brackets": Kind(training.square_brackets),
    "keywords:word_once": Kind(training.word_once, patterns=("keyword",)),
    "keywords:word_count_different_numbers": Kind(ifeval.frequency, patterns=("keyword",)),
    "keywords:exclude_word_harder": Kind(training.exclude_word),
    "paragraphs:paragraphs": Kind(training.divided_in_two),
    "paragraphs:paragraphs2": Kind(training.two_paragraphs),
    "first_word:first_word_sent": Kind(training.first_word_of_sentences),
    "first_word:first_word_answer": Kind(training.first_word),
    "last_word:last_word_sent": Kind(training.last_word_of_sentences),
    "last_word:last_word_answer": Kind(training.last_word_is),
    "detectable_format:bigram_wrapping": Kind(training.bigram_wrapping),
    "punctuation:punctuation_dot": Kind(training.no_dot),
    "punctuation:punctuation_exclamation": Kind(training.no_exclamation),
    "count:lowercase_counting": Kind(training.lowercase_words),
    "letters:letter_counting": Kind(training.letters),
    "letters:letter_counting2": Kind(ifeval.letter),
    "count:counting_composition": Kind(training.composition),
    "count:count_unique": Kind(training.unique_words),
    "count:count_increment_word": Kind(training.increment, patterns=("keyword1", "keyword2")),
    "keywords:palindrome": Kind(training.palindrome),
    "keywords:keyword_specific_position": Kind(training.keyword_position),
    "keywords:start_end": Kind(training.start_end),
}
IFBENCH = {
    "count:word_count_range": Kind(words.word_count),
    "count:unique_word_count": Kind(words.unique_words),
    "count:conjunctions": Kind(words.conjunctions),
    "count:person_names": Kind(words.person_names),
    "count:numbers": Kind(words.numbers),
    "count:punctuation": Kind(forms.punctuation),
    "count:words_japanese": Kind(words.japanese),
    "count:pronouns": Kind(words.pronouns),
    "count:keywords_multiple": Kind(words.keywords),
    "ratio:stop_words": Kind(words.stop_word_share, needs=("stopwords",)),
    "ratio:sentence_type": Kind(words.sentence_types),
    "ratio:sentence_balance": Kind(words.sentence_balance),
    "ratio:sentence_words": Kind(words.sentence_lengths),
    "ratio:overlap": Kind(words.overlap),
    "words:alphabet": Kind(words.alphabet),
    "words:vowel": Kind(words.vowels),
    "words:consonants": Kind(words.consonants),
    "words:palindrome": Kind(words.palindromes),
    "words:prime_lengths": Kind(words.prime_lengths),
    "words:start_verb": Kind(words.start_verb, needs=("punkt", "tagger")),
    "words:repeats": Kind(words.repeats),
    "words:odd_even_syllables": Kind(words.syllable_parity, needs=("syllapy",)),
    "words:last_first": Kind(words.last_first),
    "words:paragraph_last_first": Kind(words.paragraph_last_first),
    "words:no_consecutive": Kind(words.no_consecutive),
    "words:keywords_specific_position": Kind(words.keyword_position),
    "words:words_position": Kind(words.second_and_last),
    "sentence:alliteration_increment": Kind(words.alliteration),
    "sentence:keyword": Kind(words.sentence_keyword),
    "sentence:increment": Kind(words.word_increment),
    "format:parentheses": Kind(forms.parentheses),
    "format:quotes": Kind(forms.quotes),
    "format:options": Kind(forms.options),
    "format:newline": Kind(forms.newline_words),
    "format:emoji": Kind(forms.emoji_sentences, needs=("emoji",)),
    "format:line_indent": Kind(forms.line_indent),
    "format:quote_unquote": Kind(forms.quote_explanation),
    "format:list": Kind(forms.separated_list),
    "format:thesis": Kind(forms.thesis),
    "format:sub-bullets": Kind(forms.sub_bullets),
    "format:no_bullets_bullets": Kind(forms.sentences_then_bullets),
    "format:title_case": Kind(words.title_case),
    "format:output_template": Kind(forms.template),
    "format:no_whitespace": Kind(forms.no_whitespace),
    "custom:multiples": Kind(forms.multiples),
    "custom:mcq_count_length": Kind(forms.choice_questions),
    "custom:reverse_newline": Kind(forms.reversed_countries),
    "custom:word_reverse": Kind(forms.reversed_words),
    "custom:character_reverse": Kind(forms.reversed_letters),
    "custom:sentence_alphabet": Kind(words.sentence_alphabet),
    "custom:european_capitals_sort": Kind(forms.capitals),
    "custom:csv_city": Kind(forms.csv_cities),
    "custom:csv_special_character": Kind(forms.csv_special),
    "custom:csv_quotes": Kind(forms.csv_quoted),
    "custom:date_format_list": Kind(forms.dates),
    "repeat:repeat_change": Kind(forms.repeat_changed),
    "repeat:repeat_simple": Kind(forms.repeat_sentence),
    "repeat:repeat_span": Kind(forms.repeat_span),
}
KINDS: dict[str, Kind] = {**IFEVAL, **TRAINING, **IFBENCH}
