"""IFBench's kinds about words and sentences (Pyatkin et al., arXiv 2507.02833)."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise

from nemocascade.envs.instructions.libraries import part_of_speech, stop_words, syllables
from nemocascade.envs.instructions.texts import (
    PUNCTUATION,
    Splitter,
    bare,
    count_words,
    listed,
    without_punctuation,
)

_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_CONJUNCTIONS = frozenset(listed("and but for nor or so yet"))
_NAMES = frozenset(
    listed(
        "Emma Liam Sophia Jackson Olivia Noah Ava Lucas Isabella Mason Mia Ethan Charlotte "
        "Alexander Amelia Benjamin Harper Leo Zoe Daniel Chloe Samuel Lily Matthew Grace Owen "
        "Abigail Gabriel Ella Jacob Scarlett Nathan Victoria Elijah Layla Nicholas Audrey "
        "David Hannah Christopher Penelope Thomas Nora Andrew Aria Joseph Claire Ryan Stella "
        "Jonathan"
    )
)
"""Names that prompts of `count:person_names` list."""
_PRONOUNS = frozenset(
    listed(
        "i me we us you he him she her it they them my mine our ours your yours his hers its "
        "their theirs myself ourselves yourself yourselves himself herself itself themselves "
        "this that these those who whom whose which what whoever whomever whatever whichever "
        "anybody anyone anything everybody everyone everything nobody nothing somebody "
        "someone something each either neither both all some any none"
    )
)
_PRIMES = frozenset(n for n in range(2, 100) if all(n % k for k in range(2, n)))
_KEYWORD_COUNTS = (1, 2, 3, 5, 7)


def word_count(text: str, min_words: int, max_words: int) -> bool:
    return min_words <= count_words(text) <= max_words


def unique_words(text: str, N: int) -> bool:
    return len({bare(word) for word in text.lower().split()}) >= N


def stop_word_share(text: str, percentage: float) -> bool:
    words = re.findall(r"\w+", text)
    stop = stop_words()
    found = sum(word.lower() in stop for word in words)
    # Rounded as published: 7 of 100 words are more than 7 percent.
    return bool(words) and found / len(words) * 100 <= percentage


def conjunctions(text: str, small_n: int) -> bool:
    """Words that differ in case or in the marks around them count as different."""
    found = {word for word in text.split() if bare(word).lower() in _CONJUNCTIONS}
    return len(found) >= small_n


def person_names(text: str, N: int) -> bool:
    return len(_NAMES & set(re.findall(r"\w+", text))) >= N


def overlap(text: str, reference_text: str, percentage: float) -> bool:
    """Compare sets of three characters, within two percent."""
    ours, theirs = ({t[i : i + 3] for i in range(len(t) - 2)} for t in (text, reference_text))
    if not ours:
        return False
    return percentage - 2 <= len(ours & theirs) / len(ours) * 100 <= percentage + 2


def numbers(text: str, N: int) -> bool:
    return len(re.findall(r"\d+", without_punctuation(text))) == N


def alphabet(text: str) -> bool:
    letters = [word.lower()[0] for word in without_punctuation(text).split()]
    if not letters or letters[0] not in _ALPHABET:
        return False
    first = _ALPHABET.index(letters[0])
    return all(letter == _ALPHABET[(first + i) % 26] for i, letter in enumerate(letters))


def vowels(text: str) -> bool:
    body = text.strip()
    return "\n" not in body and len(set(body.lower()) & set("aeiou")) <= 3


def consonants(text: str) -> bool:
    return all(re.search(r"[b-df-hj-np-tv-z]{2}", word) for word in text.lower().split())


def alliteration(text: str, splitter: Splitter) -> bool:
    """Each sentence has more words in runs of one first letter than the sentence before it."""
    before = -1
    for sentence in splitter.sentences(text):
        words = [word.lstrip(PUNCTUATION + " ") for word in sentence.lower().split()]
        letters = [word[0] for word in words if word]
        same = [a == b for a, b in pairwise(letters)]
        starts = sum(now and not last for last, now in pairwise([False, *same]))
        if sum(same) + starts <= before:
            return False
        before = sum(same) + starts
    return True


def palindromes(text: str) -> bool:
    words = without_punctuation(text).lower().split()
    return sum(len(word) >= 5 and word == word[::-1] for word in words) >= 10


def prime_lengths(text: str) -> bool:
    return all(len(word) in _PRIMES for word in without_punctuation(text).split())


def japanese(text: str, N: int) -> bool:
    words = [bare(word) for word in text.split()][N - 1 :: N]
    return all(
        re.search("[\u3040-\u30ff\u4e00-\u9fff]", word)
        for word in words
        if word and not word.isdigit()
    )


def start_verb(text: str, splitter: Splitter) -> bool:
    words = splitter.words(text)
    return bool(words) and "VB" in part_of_speech(words)


def repeats(text: str, small_n: int) -> bool:
    words = Counter(without_punctuation(text.lower()).split())
    return max(words.values(), default=0) <= small_n


def sentence_keyword(text: str, splitter: Splitter, word: str, N: int) -> bool:
    sentences = splitter.sentences(text)
    if len(sentences) < N:
        return False
    pattern = rf"\b{re.escape(word)}\b"
    return re.search(pattern, sentences[N - 1], re.IGNORECASE) is not None


def pronouns(text: str, splitter: Splitter, N: int) -> bool:
    words = splitter.words(text.replace("/", " ").lower())
    return sum(word in _PRONOUNS for word in words) >= N


def syllable_parity(text: str) -> bool:
    odd = [syllables(word) % 2 for word in without_punctuation(text).lower().split()]
    return all(a != b for a, b in pairwise(odd))


def last_first(text: str, splitter: Splitter) -> bool:
    edge = PUNCTUATION + " "
    for this, following in pairwise(splitter.sentences(text)):
        last, first = this.rstrip(edge).split()[-1:], following.lstrip(edge).split()[:1]
        if not last or not first or last[0].lower() != first[0].lower():
            return False
    return True


def paragraph_last_first(text: str) -> bool:
    lines = (bare(line.strip().lower()).split() for line in text.split("\n"))
    return all(words[0] == words[-1] for words in lines if words)


def word_increment(text: str, splitter: Splitter, small_n: int) -> bool:
    counts = [len(without_punctuation(s).split()) for s in splitter.sentences(text)]
    return bool(counts) and all(b == a + small_n for a, b in pairwise(counts))


def no_consecutive(text: str) -> bool:
    letters = [word[0] for word in without_punctuation(text.lower()).split()]
    return all(a != b for a, b in pairwise(letters))


def keywords(
    text: str, keyword1: str, keyword2: str, keyword3: str, keyword4: str, keyword5: str
) -> bool:
    words = (keyword1, keyword2, keyword3, keyword4, keyword5)
    found = tuple(text.lower().count(word.strip().lower()) for word in words)
    return found == _KEYWORD_COUNTS


def keyword_position(text: str, splitter: Splitter, keyword: str, n: int, m: int) -> bool:
    """Unlike `keywords:keyword_specific_position`: in any case, marks are not words."""
    sentences = splitter.sentences(text)
    if not 1 <= n <= len(sentences):
        return False
    words = [w for w in splitter.words(sentences[n - 1]) if any(c.isalnum() for c in w)]
    return 1 <= m <= len(words) and words[m - 1].lower() == keyword.strip().lower()


def second_and_last(text: str, splitter: Splitter, keyword: str) -> bool:
    """The second and the last but one word are the key word; a mark at the end is not a word."""
    words = splitter.words(text)
    end = -3 if words and words[-1] in PUNCTUATION else -2
    if len(words) < -end:
        return False
    return words[1].lower() == words[end].lower() == keyword.strip().lower()


def sentence_types(text: str, splitter: Splitter) -> bool:
    ends = Counter(sentence[-1:] for sentence in splitter.sentences(text))
    return ends["."] == 2 * ends["?"]


def sentence_balance(text: str, splitter: Splitter) -> bool:
    ends = Counter(sentence[-1:] for sentence in splitter.sentences(text))
    return ends["."] == ends["?"] == ends["!"]


def sentence_lengths(text: str, splitter: Splitter) -> bool:
    sentences = splitter.sentences(text)
    return len(sentences) == 3 and len({len(s.strip()) for s in sentences}) == 1


def sentence_alphabet(text: str, splitter: Splitter) -> bool:
    words = [sentence.split()[:1] for sentence in splitter.sentences(text)]
    return [word[0].lower()[0] for word in words if word] == list(_ALPHABET)


def title_case(text: str, splitter: Splitter) -> bool:
    for word in splitter.words(text):
        first, rest = word[0], word[1:]
        if first.isalpha() and first.islower() and (not rest or rest.isupper() or rest.islower()):
            return False
    return True
