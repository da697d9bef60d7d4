"""The 25 instruction kinds of IFEval (Zhou et al., arXiv 2311.07911).

Each check is a function of the response and the row's arguments. Where an argument is missing, the
published checks draw a random one; here it is an error. Key words are regular expressions, as
published.
"""

from __future__ import annotations

import json
import re
from typing import Literal

from nemocascade.envs.instructions.libraries import detect_language
from nemocascade.envs.instructions.texts import Splitter, count_words, paragraphs

LanguageCheck = Literal["langdetect", "letters"]
Relation = Literal["less than", "at least"]

CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
DIVIDER = r"\s?\*\*\*\s?"
"""Pattern of the divider between paragraphs."""


def compare(actual: int, relation: str, bound: int) -> bool:
    """Return True if a count is at least, or less than, a bound."""
    return actual < bound if relation == "less than" else actual >= bound


def keywords(text: str, keywords: list[str]) -> bool:
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def frequency(text: str, keyword: str, frequency: int, relation: Relation) -> bool:
    return compare(occurrences(text, keyword), relation, frequency)


def occurrences(text: str, keyword: str) -> int:
    """Count the matches of a key word, in any case."""
    return sum(1 for _ in re.finditer(keyword.strip(), text, re.IGNORECASE))


def forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words)


def letter(text: str, letter: str, let_frequency: int, let_relation: Relation) -> bool:
    return compare(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def language(text: str, language_check: LanguageCheck, language: str) -> bool:
    if language_check != "langdetect":
        raise ValueError(
            "language:response_language needs langdetect: set envs.if_language_check to langdetect"
        )
    return detect_language(text) in (language, None)


def sentences(text: str, splitter: Splitter, num_sentences: int, relation: Relation) -> bool:
    return compare(len(splitter.sentences(text)), relation, num_sentences)


def words(text: str, num_words: int, relation: Relation) -> bool:
    return compare(count_words(text), relation, num_words)


def divided(text: str, num_paragraphs: int) -> bool:
    parts = paragraphs(text, DIVIDER)
    return parts is not None and len(parts) == num_paragraphs


def nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    filled = sum(bool(part.strip()) for part in parts)
    if filled != num_paragraphs or not 1 <= nth_paragraph <= filled:
        return False
    # Empty paragraphs count for the place of the n-th one.
    found = parts[nth_paragraph - 1].split()
    if not found:
        return False
    word = re.split(r"[.,?!'\"]", found[0].lstrip("'").lstrip('"'))[0]
    return word.lower() == first_word.lower()


def placeholders(text: str, num_placeholders: int) -> bool:
    found = 0
    for line in text.split("\n"):
        at = line.find("[")
        # A line without a further `]` is read once, however many brackets it opens.
        while at >= 0 and (end := line.find("]", at)) >= 0:
            found += 1
            at = line.find("[", end)
    return found >= num_placeholders


POSTSCRIPTS = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
"""Patterns of the two usual markers; others are patterns themselves."""


def postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip()
    return re.search(POSTSCRIPTS.get(marker, marker.lower()), text.lower()) is not None


def bullets(text: str, num_bullets: int) -> bool:
    # A line of one star alone makes a bullet with the line behind it.
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained(text: str) -> bool:
    return any(option in text for option in CONSTRAINED_RESPONSES)


def highlights(text: str, num_highlights: int) -> bool:
    single = [h for h in re.findall(r"\*[^\n*]*\*", text) if h.strip("*").strip()]
    double = [h for h in re.findall(r"\*\*[^\n*]*\*\*", text) if h[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.split(rf"\s?{section_spliter.strip()}\s?\d+\s?", text)) > num_sections


def json_format(text: str) -> bool:
    body = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        body = body.removeprefix(fence)
    try:
        json.loads(body.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str) -> bool:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def two_responses(text: str) -> bool:
    parts = paragraphs(text, re.escape("******"))
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def repeat(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def capital_words(
    text: str, splitter: Splitter, capital_frequency: int, capital_relation: Relation
) -> bool:
    found = sum(word.isupper() for word in splitter.words(text))
    return compare(found, capital_relation, capital_frequency)


def capital(text: str, language_check: LanguageCheck) -> bool:
    return text.isupper() and _is_english(text, language_check)


def lowercase(text: str, language_check: LanguageCheck) -> bool:
    return text.islower() and _is_english(text, language_check)


def no_comma(text: str) -> bool:
    return "," not in text


def quotation(text: str) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == '"' and body[-1] == '"'


def _is_english(text: str, check: LanguageCheck) -> bool:
    """Return True for English: by `langdetect`, or, with "letters", by an all-English alphabet."""
    if check == "langdetect":
        return detect_language(text) in ("en", None)
    return all(c.isascii() for c in text if c.isalpha())
