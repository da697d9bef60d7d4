"""The 25 instruction kinds of IFEval (Zhou et al., arXiv 2311.07911), by id and arguments.

Each check is a function of the response and the row's arguments. It differs from the published
checker in four ways. Sentences are split by a rule, not by a model that must be downloaded.
Words in capitals are found by a pattern, not a tokenizer. Key words are plain text, not patterns.
A missing argument is an error; the published checker draws a random one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Literal

LanguageCheck = Literal["langdetect", "letters"]

_ABBREVIATIONS = re.compile(
    r"\b(?:mr|mrs|ms|dr|prof|st|vs|etc|inc|ltd|jr|sr|co|no|fig|e\.g|i\.e|[a-z])\.$", re.IGNORECASE
)
_LONGEST_ABBREVIATION = 8
# Possessive, and only from the start of a run: a run without a space behind it is read once.
_SENTENCE_END = re.compile(r"(?<![.!?])([.!?]++)[\"')\]”’]*+(?=\s|$)")
CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


def follows(kind: str, arguments: dict[str, Any], text: str, language: LanguageCheck) -> bool:
    """Return True if `text` follows the instruction `kind`; an empty text follows none.

    Raises KeyError for an unknown kind, ValueError or TypeError for arguments that do not fit the
    kind, LookupError if `langdetect` is needed but not installed.
    """
    check = KINDS[kind]
    if not text.strip():
        return False
    if kind.startswith(("language:", "change_case:english_")):
        return check(text, language_check=language, **arguments)
    return check(text, **arguments)


def needs_langdetect(kind: str, language: LanguageCheck) -> bool:
    """Return True if the check calls `langdetect`, which is slow and not linear in the text."""
    return kind.startswith("language:") or (
        language == "langdetect" and kind.startswith("change_case:english_")
    )


def count_words(text: str) -> int:
    """Count runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def count_sentences(text: str) -> int:
    """Count sentences: they end in `.`, `!` or `?` and a space, abbreviations excepted."""
    count, start = 0, 0
    for end in _SENTENCE_END.finditer(text):
        stop = end.end(1)
        if _ABBREVIATIONS.search(text[max(start, stop - _LONGEST_ABBREVIATION) : stop]):
            continue
        count += 1
        start = end.end()
    return count + bool(text[start:].strip())


def _compare(actual: int, relation: str, bound: int) -> bool:
    if relation == "less than":
        return actual < bound
    if relation == "at least":
        return actual >= bound
    raise ValueError(f"relation {relation!r} is neither 'less than' nor 'at least'")


def _keywords(text: str, keywords: list[str]) -> bool:
    folded = text.lower()
    return all(word.strip().lower() in folded for word in keywords)


def _frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(text.lower().count(keyword.strip().lower()), relation, frequency)


def _forbidden(text: str, forbidden_words: list[str]) -> bool:
    return not any(
        re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE)
        for word in forbidden_words
    )


def _letter(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(text.lower().count(letter.strip().lower()), let_relation, let_frequency)


def _language(text: str, language: str, language_check: LanguageCheck) -> bool:
    if language_check != "langdetect":
        raise ValueError(
            "language:response_language needs langdetect: set the language check to 'langdetect'"
        )
    return _detect(text) in (language, None)


def _sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _compare(count_sentences(text), relation, num_sentences)


def _words(text: str, num_words: int, relation: str) -> bool:
    return _compare(count_words(text), relation, num_words)


def _inner_filled(parts: list[str]) -> list[str] | None:
    """Return the non-empty parts; None if an inner part is empty."""
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return [part.strip() for part in parts if part.strip()]


def _paragraphs(text: str, num_paragraphs: int) -> bool:
    parts = _inner_filled(re.split(r"\s?\*\*\*\s?", text))
    return parts is not None and len(parts) == num_paragraphs


def _nth_paragraph(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = text.split("\n\n")
    filled = sum(bool(part.strip()) for part in parts)
    if filled != num_paragraphs or not 1 <= nth_paragraph <= filled:
        return False
    words = parts[nth_paragraph - 1].split()
    if not words:
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'\""))[0]
    return word.lower() == first_word.lower()


def _placeholders(text: str, num_placeholders: int) -> bool:
    found = 0
    for line in text.split("\n"):
        at = line.find("[")
        # A line without a further `]` is read once, however many brackets it opens.
        while at >= 0 and (end := line.find("]", at)) >= 0:
            found += 1
            at = line.find("[", end)
    return found >= num_placeholders


def _postscript(text: str, postscript_marker: str) -> bool:
    marker = postscript_marker.strip().lower()
    patterns = {"p.p.s": r"p\.\s?p\.\s?s", "p.s.": r"p\.\s?s\."}
    return re.search(patterns.get(marker, re.escape(marker)), text.lower()) is not None


def _bullets(text: str, num_bullets: int) -> bool:
    stars = re.findall(r"^[^\S\n]*\*[^*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def _constrained(text: str) -> bool:
    return any(option in text for option in CONSTRAINED_RESPONSES)


def _highlights(text: str, num_highlights: int) -> bool:
    single = [h for h in re.findall(r"\*[^\n*]*\*", text) if h.strip("*").strip()]
    double = [h for h in re.findall(r"\*\*[^\n*]*\*\*", text) if h[2:-2].strip()]
    return len(single) + len(double) >= num_highlights


def _sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", text)) >= num_sections


def _json_format(text: str) -> bool:
    body = re.sub(r"^```(?:json|Json|JSON)?", "", text.strip()).removesuffix("```")
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _title(text: str) -> bool:
    for line in text.split("\n"):
        start, end = line.find("<<"), line.rfind(">>")
        if 0 <= start < end - 2 and line[start:end].lstrip("<").rstrip(">").strip():
            return True
    return False


def _two_responses(text: str) -> bool:
    parts = _inner_filled(text.split("******"))
    return parts is not None and len(parts) == 2 and parts[0] != parts[1]


def _repeat(text: str, prompt_to_repeat: str) -> bool:
    if not prompt_to_repeat.strip():
        raise ValueError("prompt_to_repeat is empty")
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _capital_words(text: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"\w+(?:[.'’-]\w+)*", text)
    return _compare(sum(w.isupper() for w in words), capital_relation, capital_frequency)


def _capital(text: str, language_check: LanguageCheck) -> bool:
    return text.isupper() and _english(text, language_check)


def _lowercase(text: str, language_check: LanguageCheck) -> bool:
    return text.islower() and _english(text, language_check)


def _no_comma(text: str) -> bool:
    return "," not in text


def _quotation(text: str) -> bool:
    body = text.strip()
    return len(body) > 1 and body[0] == '"' and body[-1] == '"'


def _english(text: str, check: LanguageCheck) -> bool:
    """Return True for English: by `langdetect`, or, with "letters", by an all-English alphabet."""
    if check == "langdetect":
        return _detect(text) in ("en", None)
    return all(c.isascii() for c in text if c.isalpha())


def _detect(text: str) -> str | None:
    """Return the ISO 639-1 code of the language; None if undetectable, as for digits only."""
    try:
        import langdetect
    except ModuleNotFoundError as error:
        raise LookupError(
            "langdetect is not installed: pip install 'nemocascade[ifeval]', or set the language "
            "check to 'letters'"
        ) from error
    # langdetect is random unless it is given a seed.
    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


KINDS: dict[str, Callable[..., bool]] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeat,
    "startend:end_checker": _end,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _capital,
    "change_case:english_lowercase": _lowercase,
    "punctuation:no_comma": _no_comma,
    "startend:quotation": _quotation,
}
