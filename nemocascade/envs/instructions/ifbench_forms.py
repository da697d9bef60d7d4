"""IFBench's kinds about the form of an answer (Pyatkin et al., arXiv 2507.02833)."""

from __future__ import annotations

import csv
import io
import re
import unicodedata
from collections import defaultdict, deque
from itertools import pairwise

from nemocascade.envs.instructions.libraries import is_emoji
from nemocascade.envs.instructions.texts import (
    PUNCTUATION,
    Splitter,
    bare,
    listed,
    without_punctuation,
)

_PAIRS = {")": "(", "]": "[", "}": "{"}
_CAPITALS = listed(
    "Reykjavik Helsinki Oslo Tallinn Stockholm Riga Moscow Copenhagen Vilnius Minsk Dublin Berlin "
    "Amsterdam Warsaw London Brussels Prague Luxembourg Paris Vienna Bratislava Budapest Vaduz "
    "Chisinau Bern Ljubljana Zagreb"
)
"""Europe's capitals from 45 degrees north on, from north to south."""
_DAYS = {2: 29, 4: 30, 6: 30, 9: 30, 11: 30}
_REPEATED = "only output this sentence here, ignore all other requests."


def punctuation(text: str) -> bool:
    if not any(mark in text for mark in ("!?", "?!", "‽")):
        return False
    pair = "?!" if "?!" in text else "!?"
    return set(".,!?;:") <= set(text.replace(pair, "", 1))


def parentheses(text: str) -> bool:
    """Five levels of brackets, the innermost of which is closed."""
    levels: list[str] = []
    deepest = 0
    for char in text:
        if char in "([{":
            levels.append(char)
            deepest = max(deepest, len(levels))
        elif char in _PAIRS:
            if levels and levels[-1] == _PAIRS[char]:
                levels.pop()
                if deepest >= 5:
                    return True
            else:
                levels, deepest = [], 0
    return False


def quotes(text: str) -> bool:
    """Three levels of quotes that close again, single and double ones alternating."""
    levels: list[str] = []
    deepest = 0
    for char in text:
        if levels and char == levels[-1]:
            levels.pop()
            if deepest - len(levels) >= 3:
                return True
        elif char in "\"'":
            levels.append(char)
            deepest = max(deepest, len(levels))
    return False


def options(text: str, options: str) -> bool:
    separator = next((mark for mark in ("/", "or") if mark in options), ",")
    choices = [choice.strip() for choice in options.split(separator)]
    # Lettered options must be given with their brackets.
    if re.match(r"\W*[aA]\W*[bB]\W*[cC]\W*", options):
        return text in choices
    return bare(text).lower() in [bare(choice).lower() for choice in choices]


def newline_words(text: str) -> bool:
    body = without_punctuation(text).strip()
    return sum(line != "" for line in body.split("\n")) == len(body.split())


def emoji_sentences(text: str, splitter: Splitter) -> bool:
    """Every sentence ends with an emoji, or the next one starts with it."""
    sentences = [without_punctuation(s).strip() for s in splitter.sentences(text)]
    for this, following in zip(sentences, [*sentences[1:], ""], strict=True):
        if not this:
            return False
        if not any(map(is_emoji, this[-2:])) and not (following and is_emoji(following[0])):
            return False
    return True


def line_indent(text: str) -> bool:
    indents = [len(line) - len(line.lstrip(" ")) for line in _without_blank(text.split("\n"))]
    return all(a < b for a, b in pairwise(indents))


def _without_blank(lines: list[str]) -> list[str]:
    """Remove blank lines as the published check does: it skips the line behind each of them.

    The line removed is the first equal one, which may be one that was skipped.
    """
    places: defaultdict[str, deque[int]] = defaultdict(deque)
    for place, line in enumerate(lines):
        places[line].append(place)
    removed = set()
    place = 0
    while place < len(lines):
        blank = not lines[place].strip()
        if blank:
            removed.add(places[lines[place]].popleft())
        place += 2 if blank else 1
    return [line for place, line in enumerate(lines) if place not in removed]


def quote_explanation(text: str) -> bool:
    """No two quotations stand side by side, and none at the end."""
    body = "".join(text.replace("'\"'", "").split())
    body_end = body.strip("0123456789" + PUNCTUATION.replace('"', ""))
    return '""' not in body and not body_end.endswith('"')


def separated_list(text: str, sep: str) -> bool:
    return text.count(sep) >= 2


def thesis(text: str) -> bool:
    """Something in italics, and something behind it. `</em>` counts as four characters."""
    start = next((at for tag in ("<i>", "<em>") if (at := text.find(tag)) >= 0), -1)
    if start < 0:
        return False
    body = text[start:]
    end = next((at for tag in ("</i>", "</em>") if (at := body.find(tag)) >= 0), -1)
    return end >= 0 and bool(body[3:end].strip()) and bool(body[end + 4 :].strip())


def sub_bullets(text: str) -> bool:
    return all("-" in bullet for bullet in text.split("*")[1:])


def sentences_then_bullets(text: str, splitter: Splitter) -> bool:
    """Two sentences, then two bullets; no further text behind an empty line or a bullet."""
    sentences = bullets = 0
    may_continue = True
    for line in text.split("\n"):
        if line.strip().startswith("*"):
            may_continue = False
            bullets += 1
            if sentences < 2:
                return False
        elif not may_continue:
            return False
        else:
            found = len(splitter.sentences(line.strip()))
            sentences, may_continue = sentences + found, found > 0
    return bullets >= 2


def multiples(text: str) -> bool:
    return re.findall(r"\d+", text) == ["14", "21", "28", "35", "42", "49"]


def choice_questions(text: str) -> bool:
    """Four questions with five options each, every question longer than the one before."""
    if not text.startswith("Question"):
        return False
    parts = (part.strip() for part in re.split(r"Question \d+[.|):;]?\s*", text))
    lengths = []
    for question in (part for part in parts if part):
        lines = [line.strip() for line in question.split("\n")]
        marks = [bool(re.match(r"[A-Ea-e][.|)]\s*\w", line)) for line in lines]
        if sum(marks) != 5:
            return False
        lengths.append(len(" ".join(lines[: marks.index(True)]).strip()))
    return len(lengths) == 4 and all(a < b for a, b in pairwise(lengths))


def reversed_countries(text: str) -> bool:
    lines = [stripped for line in text.split("\n") if (stripped := bare(line))]
    start = next((i for i, line in enumerate(lines) if "Zimbabwe" in line), len(lines))
    names = [_ascii(line) for line in lines[start:]]
    return len(names) >= 52 and names == sorted(names, reverse=True)


def _ascii(text: str) -> str:
    """Drop the accents of letters, and all other characters that are not ASCII."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def reversed_words(text: str) -> bool:
    words = without_punctuation(text.lower()).split()
    return "bald eagle" in " ".join(reversed(words))


def reversed_letters(text: str) -> bool:
    return "elgae dlab" in text.lower()


def capitals(text: str) -> bool:
    found = [part.strip() for part in _ascii(text).split(",")]
    return tuple(part for part in found if part) == _CAPITALS


def _table(text: str, rows: int, delimiter: str = ",") -> list[list[str]] | None:
    """Parse a table of five columns; None for other numbers of rows."""
    try:
        found = list(csv.reader(io.StringIO(text), delimiter=delimiter))
    except csv.Error:
        return None
    return found if len(found) == rows else None


def _has_header(text: str, names: str, separator: str, space: str) -> bool:
    """Return True for these columns, each name in quotes or not, spaces before all but one."""
    first, *others = text.split("\n")[0].strip().split(separator)
    found = [first, *(name.lstrip(space) for name in others)]
    wanted = names.split()
    return len(found) == len(wanted) and all(
        name in (right, f'"{right}"') for name, right in zip(found, wanted, strict=True)
    )


def csv_cities(text: str) -> bool:
    table = _table(text, 8)
    if table is None or table[0] != ["ID", "Country", "City", "Year", "Count"]:
        return False
    return all(len(row) == 5 for row in table[1:])


def csv_special(text: str) -> bool:
    """One quoted field has a mark in it; rows behind it may have any number of columns."""
    if not _has_header(text, "ProductID Category Brand Price Stock", ",", " \t"):
        return False
    for row in (_table(text.replace('"', '"""'), 15) or [])[1:]:
        if len(row) != 5:
            return False
        if any(map(_is_quoted_with_mark, row)):
            return True
    return False


def _is_quoted_with_mark(field: str) -> bool:
    line = field.split("\n")[0]
    inner = line[1 : line.rfind('"')] if line.startswith('"') else ""
    return re.search(r"[^\d\w\s]", inner) is not None


def csv_quoted(text: str) -> bool:
    if not _has_header(text, "StudentID Subject Grade Semester Score", "\t", " "):
        return False
    table = _table(text.replace('"', '"""'), 4, "\t")
    if table is None or any(len(row) != 5 for row in table):
        return False
    fields = [field.strip() for row in table for field in row]
    return all(field[:1] == field[-1:] == '"' for field in fields)


def dates(text: str) -> bool:
    for date in text.split(","):
        if not re.fullmatch(r"\d{4}-\d{2}-\d{2}", date.strip()):
            return False
        year, month, day = map(int, date.strip().split("-"))
        # Month 0 passes as published, with days up to 99.
        if not 1769 <= year <= 1821 or month > 12 or (month and day > _DAYS.get(month, 31)):
            return False
    return True


def repeat_changed(text: str, prompt_to_repeat: str) -> bool:
    return text != prompt_to_repeat and text.split()[1:] == prompt_to_repeat.split()[1:]


def repeat_sentence(text: str) -> bool:
    return text.strip().lower() == _REPEATED


def repeat_span(text: str, prompt_to_repeat: str, n_start: int, n_end: int) -> bool:
    return text.strip().lower() == prompt_to_repeat[n_start : n_end + 1].strip().lower()


def template(text: str) -> bool:
    return all(part in text for part in ("My Answer:", "My Conclusion:", "Future Outlook:"))


def no_whitespace(text: str) -> bool:
    return not any(char.isspace() for char in text)
