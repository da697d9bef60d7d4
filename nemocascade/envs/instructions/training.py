"""The 29 kinds that the package verifiable-instructions adds to those of IFEval.

NeMo Gym verifies training rows with it. Its sentences are those of `texts.ruled_sentences`.
"""

from __future__ import annotations

import re
from itertools import pairwise

from nemocascade.envs.instructions.ifeval import DIVIDER, Relation, compare, occurrences
from nemocascade.envs.instructions.texts import Splitter, paragraphs, ruled_sentences


def repeat_phrase(text: str, phrase: str, small_n: int) -> bool:
    wanted = phrase.split()
    found = [part.split() for part in _spans(text, wanted[0], wanted[-1])]
    if len(found) != small_n or any(len(part) != len(wanted) for part in found):
        return False
    changes = [sum(a != b for a, b in zip(part, wanted, strict=True)) for part in found]
    # Only the last one has to be changed.
    return max(changes, default=0) <= 1 and changes[-1:] == [1]


def _spans(text: str, first: str, last: str) -> list[str]:
    """Find the shortest parts of a line from one pattern to another, spaces between."""
    start, end = re.compile(f"{first} "), re.compile(f" {last}")
    found = []
    for line in text.split("\n"):
        at = 0
        # A line without a further end is read once, however many starts it has.
        while (opening := start.search(line, at)) and (closing := end.search(line, opening.end())):
            found.append(line[opening.start() : closing.end()])
            at = closing.end()
    return found


def copy(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower() == prompt_to_repeat.strip().lower()


def copy_many(text: str, prompt_to_repeat: str, N: int) -> bool:
    parts = text.split("******")
    return len(parts) == N and all(copy(part, prompt_to_repeat) for part in parts)


def copy_span(text: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    """Unlike IFBench's `repeat:repeat_span`, without the character at `n_end`."""
    return copy(text, prompt_to_repeat[n_start:n_end])


def sentence_hyphens(text: str) -> bool:
    parts, wanted = text.split("-"), ruled_sentences(text.replace("-", " "))
    # The longer list's rest is not compared.
    return all(a == b == a.strip() for a, b in zip(parts, wanted, strict=False))


def no_adjacent(text: str) -> bool:
    letters = [word[0].lower() for word in text.split()]
    if len(letters) > 1 and any(len(letter) != 1 for letter in letters):
        return False
    return all(ord(b) - ord(a) != 1 for a, b in pairwise(letters))


def square_brackets(text: str) -> bool:
    return all(word.startswith("[") and word.endswith("]") for word in text.split())


def word_once(text: str, keyword: str) -> bool:
    return occurrences(text, keyword) == 1


def exclude_word(text: str, keyword: str, instruction: str = "") -> bool:
    """Rows also have the `instruction` from which the word was drawn; it decides nothing."""
    return f" {keyword.strip()} " not in text


def divided_in_two(text: str) -> bool:
    parts = paragraphs(text, DIVIDER)
    return parts is not None and len(parts) == 2


def two_paragraphs(text: str) -> bool:
    parts = paragraphs(text, r"\n\n")
    return parts is not None and len(parts) == 2


def first_word_of_sentences(text: str, first_word: str) -> bool:
    wanted = first_word.strip().lower()
    return all(s.split()[:1] and s.split()[0].lower() == wanted for s in ruled_sentences(text))


def first_word(text: str, first_word: str) -> bool:
    return text.split()[0].lower() == first_word.strip().lower()


def last_word_of_sentences(text: str, last_word: str) -> bool:
    return all(s and last_word_is(s, last_word) for s in ruled_sentences(text))


def last_word_is(text: str, last_word: str) -> bool:
    word = re.sub(r"[^\w\s]", "", text.split()[-1])
    return word.lower() == last_word.strip().lower()


def bigram_wrapping(text: str) -> bool:
    words = text.split()
    pairs = zip(words[::2], words[1::2], strict=False)
    return all(a.startswith("<<") and b.endswith(">>") for a, b in pairs)


def no_dot(text: str) -> bool:
    return "." not in text


def no_exclamation(text: str) -> bool:
    return "!" not in text


def lowercase_words(text: str, N: int) -> bool:
    return len(re.findall(r"\b[a-z]+\b", text)) <= N


def letters(text: str, N: int, relation: Relation) -> bool:
    return compare(len(re.findall("[a-zA-Z]", text)), relation, N)


def composition(text: str, splitter: Splitter, n_sent: int, n_words: int) -> bool:
    parts = re.split(DIVIDER, text)
    if len(parts) != 3:
        return False
    for part in parts:
        sentences = ruled_sentences(part)
        if len(sentences) != n_sent:
            return False
        if any(len(splitter.words(sentence)) != n_words for sentence in sentences):
            return False
    return all(part.strip() for part in parts)


def unique_words(text: str, splitter: Splitter) -> bool:
    words = splitter.words(text)
    return len(words) == len(set(words))


def increment(text: str, keyword1: str, keyword2: str) -> bool:
    return occurrences(text, keyword1) == 1 and occurrences(text, keyword2) == 2


def palindrome(text: str) -> bool:
    return any(word == word[::-1] for word in text.split())


def keyword_position(text: str, splitter: Splitter, keyword: str, n: int, m: int) -> bool:
    sentences = ruled_sentences(text)
    if not 1 <= n <= len(sentences):
        return False
    words = splitter.words(sentences[n - 1])
    return 1 <= m <= len(words) and words[m - 1] == keyword.strip()


def start_end(text: str, splitter: Splitter) -> bool:
    words = splitter.words(text)
    return len(words) > 1 and words[0].lower() == words[-1].lower()
