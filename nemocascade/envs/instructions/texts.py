"""Sentences and words of a text, by nltk's punkt or by rules that need no library."""

from __future__ import annotations

import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Tokenizer = Literal["punkt", "rule"]

PUNCTUATION = string.punctuation
"""ASCII punctuation, which the published checks remove."""
_REMOVED = str.maketrans("", "", PUNCTUATION)

_ABBREVIATIONS = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|st|vs|etc|inc|ltd|jr|sr|co|no|fig|e\.g|i\.e|[a-z])\.$", re.IGNORECASE
)
_LONGEST_ABBREVIATION = 8
# Possessive, and only from the start of a run: a run without a space behind it is read once.
_SENTENCE_END = re.compile(r"(?<![.!?])([.!?]++)[\"')\]”’]*+(?=\s|$)")
# Words as in the Penn Treebank: marks alone, runs of dots and dashes whole, clitics apart.
_WORD = re.compile(r"\.{2,}|-{2,}|\w+(?:[-.,:/'’&]\w+)*|[^\w\s]")
_CLITICS = ("n't", "'s", "'m", "'d", "'re", "'ve", "'ll")


@dataclass(frozen=True)
class Splitter:
    """Splits texts into sentences and words.

    tokenizer: "punkt" is what IFEval and IFBench use. It needs nltk with its data `punkt_tab`, and
    is not linear in the text. "rule" approximates it in linear time.
    """

    tokenizer: Tokenizer

    def sentences(self, text: str) -> list[str]:
        """Return the sentences of a text without the space around them."""
        if self.tokenizer == "punkt":
            import nltk

            return [str(sentence) for sentence in nltk.sent_tokenize(text)]
        return _rule_sentences(text)

    def words(self, text: str) -> list[str]:
        """Return words and punctuation marks in the style of the Penn Treebank."""
        if self.tokenizer == "punkt":
            import nltk

            return [str(word) for word in nltk.word_tokenize(text)]
        words: list[str] = []
        for word in _WORD.findall(text):
            words += _parts(word) if "'" in word else (word,)
        return words


def _rule_sentences(text: str) -> list[str]:
    """Split after `.`, `!` or `?` before a space, except after an abbreviation."""
    sentences, start = [], 0
    for end in _SENTENCE_END.finditer(text):
        stop = end.end(1)
        if _ABBREVIATIONS.search(text[max(start, stop - _LONGEST_ABBREVIATION) : stop]):
            continue
        sentences.append(text[start : end.end()].strip())
        start = end.end()
    rest = text[start:].strip()
    return [*sentences, rest] if rest else sentences


def _parts(word: str) -> list[str]:
    """Split a clitic from the end of a word: "don't" is two words, "do" and "n't"."""
    size = next((len(c) for c in _CLITICS if word[-3:].lower().endswith(c)), 0)
    return [word[:-size], word[-size:]] if 0 < size < len(word) else [word]


def listed(words: str) -> tuple[str, ...]:
    """Return the words of a list that is written as one text."""
    return tuple(words.split())


def count_words(text: str) -> int:
    """Count runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def without_punctuation(text: str) -> str:
    """Remove all ASCII punctuation."""
    return text.translate(_REMOVED)


def bare(text: str) -> str:
    """Strip ASCII punctuation and spaces from both ends."""
    return text.strip(PUNCTUATION + " ")


def paragraphs(text: str, separator: str) -> list[str] | None:
    """Split at a pattern, without an empty first or last part; None if an inner part is empty."""
    parts = re.split(separator, text)
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part.strip() for part in parts if part.strip()]


_KEPT, _CUT = "<prd>", "<stop>"
_NEXT = (
    r"(Mr|Mrs|Ms|Dr|Prof|Capt|Cpt|Lt|He\s|She\s|It\s|They\s|Their\s|Our\s|We\s|But\s|However\s"
    r"|That\s|This\s|Wherever)"
)
# In order. A match consumes its letters and digits, so only one dot of "1.2.3" is kept.
_RULES: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
    (r"(Mr|St|Mrs|Ms|Dr)\.", rf"\1{_KEPT}"),
    (r"\.(com|net|org|io|gov|edu|me)", rf"{_KEPT}\1"),
    (r"([0-9])\.([0-9])", rf"\1{_KEPT}\2"),
    (r"\.{2,}", lambda dots: _KEPT * len(dots[0]) + _CUT),
    (r"Ph\.D\.", f"Ph{_KEPT}D{_KEPT}"),
    (r"\s([A-Za-z])\. ", rf" \1{_KEPT} "),
    (rf"([A-Z]\.[A-Z]\.(?:[A-Z]\.)?) {_NEXT}", rf"\1{_CUT} \2"),
    (r"([A-Za-z])\.([A-Za-z])\.([A-Za-z])\.", rf"\1{_KEPT}\2{_KEPT}\3{_KEPT}"),
    (r"([A-Za-z])\.([A-Za-z])\.", rf"\1{_KEPT}\2{_KEPT}"),
    (rf" (Inc|Ltd|Jr|Sr|Co)\. {_NEXT}", rf" \1{_CUT} \2"),
    (r" (Inc|Ltd|Jr|Sr|Co)\.", rf" \1{_KEPT}"),
    (r" ([A-Za-z])\.", rf" \1{_KEPT}"),
    # An end mark changes places with the quote behind it.
    (r"\.”", "”."),
    (r'\."', '".'),
    ('!"', '"!'),
    (r'\?"', '"?'),
    (r"([.?!])", rf"\1{_CUT}"),
    (_KEPT, "."),
)


def ruled_sentences(text: str) -> list[str]:
    """Split as verifiable-instructions does: at every `.`, `?` and `!` that no rule protects."""
    text = f" {text}  ".replace("\n", " ")
    for pattern, made in _RULES:
        text = re.sub(pattern, made, text)
    sentences = [sentence.strip() for sentence in text.split(_CUT)]
    return sentences if sentences[-1] else sentences[:-1]
