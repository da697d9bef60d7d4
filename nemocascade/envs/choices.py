r"""Options of multiple choice as answers state them: by letter, by label and text, or by text.

Letters are told from words by what follows them: `B`, `(b)`, `B: text`, `B) text`, `B. text`,
`\text{B}`, `Option B`, and `B text` with exactly the text of that option.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping

from nemocascade.envs.base import last_boxed

GRADING_MODES = (
    *("strict_single_letter_boxed", "lenient_boxed"),
    *("lenient_answer_colon", "lenient_answer_colon_md"),
)
"""NeMo-Gym's: a letter in the last box; or an option's text in it; a letter or an option's text
after the last `Answer:`; or a letter in the sentence after the last `Answer:` that has one."""

_ANSWER = re.compile(r"answer[*_]{0,2}\s*:[*_]{0,2}\s*(.*)", re.IGNORECASE)
_WRAPPERS = re.compile(
    r"\\(?:(?:text|math)?(?:bf|rm|it|sf|tt|normal)?|boldsymbol)(?![A-Za-z])|[{}$*]"
)
_SPACES = re.compile(r"\\(?:[ ,;:!]|q?quad(?![A-Za-z]))|[~\s]")
_LABEL = re.compile(
    r"[\W_]*(?:(?:option|choice|answer)\b[\W_]*)?([a-z])(?![^\W_])\s*([^\w\s]?)(.*)",
    re.IGNORECASE | re.DOTALL,
)
_DELIMITERS = ":).]-|\u2013\u2014"
_LETTER = re.compile(r"[a-z]", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]")
_LONE = re.compile(r"(?<![^\W_])[A-Z](?![^\W_])")
_LIST = re.compile(r"\s*(?:[/|&,;]|\b(?:or|and)\b|)\s*", re.IGNORECASE)
_FOREIGN = str.maketrans(
    "\u0623\u0628\u062c\u062f\u0985\u09ac\u09a1\u09a2\uff21\uff22\uff23\uff24", "ABCDABCDABCD"
)
"""Letters of options in Arabic and Bengali, and of full width, as in NeMo-Gym."""


def chosen_by(mode: str, text: str, options: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return where a grading mode finds the answer in a text, and the option that it states."""
    texts = _plain_options(options)
    if mode in GRADING_MODES[:2]:
        box = last_boxed(text)
        if box is None:
            return None, None
        letter = _labelled(box, texts)
        return box, letter or (_described(box, texts) if mode == "lenient_boxed" else None)
    stated = [match[1].strip() for match in _ANSWER.finditer(text)]
    if mode == "lenient_answer_colon":
        found = stated[-1] if stated else None
        return found, _stated(found or "", texts)
    for found in reversed(stated):
        if letter := _stated(found, texts) or _mentioned(found, texts):
            return found, letter
    return None, None


def chosen_in(stated: str, options: Mapping[str, str]) -> str | None:
    """Return the option that a text states by its letter, with a label, or by its exact text."""
    return _stated(stated, _plain_options(options))


def _plain_options(options: Mapping[str, str]) -> dict[str, str]:
    """Return the options as the functions below take them: once, as a text may state many."""
    return {letter: _plain(text).casefold() for letter, text in options.items()}


def _stated(stated: str, options: Mapping[str, str]) -> str | None:
    return _labelled(stated, options) or _exact(stated, options)


def _labelled(stated: str, options: Mapping[str, str]) -> str | None:
    plain = _plain(stated)
    plain = plain.translate(_FOREIGN) if len(plain) == 1 else plain
    label = _LABEL.fullmatch(plain)
    letter = label[1].upper() if label is not None else ""
    if label is None or letter not in options:
        return None
    rest = label[2] + label[3]
    if not _WORD.search(rest):
        return letter
    if not label[1].isupper() or _exact(stated, options):
        return None  # a word, or an option that reads like a label, such as "E. coli"
    if not _LETTER.search(rest) or (
        not label[2] and _plain(label[3]).casefold() == options[letter]
    ):
        return letter
    others = options.keys() - {letter}
    is_list = _plain(label[3]).strip(_DELIMITERS + "( ") in others
    return letter if label[2] and label[2] in _DELIMITERS and not is_list else None


def _exact(stated: str, options: Mapping[str, str]) -> str | None:
    plain = _plain(stated).casefold()
    found = [letter for letter, text in options.items() if text == plain]
    return found[0] if len(found) == 1 else None


def _described(stated: str, options: Mapping[str, str]) -> str | None:
    """Return the only option whose text is that of a box, or is in it."""
    if exact := _exact(stated, options):
        return exact
    whole = _plain(stated).casefold()
    found = [letter for letter, text in options.items() if text and text in whole]
    return found[0] if len(found) == 1 else None


def _mentioned(stated: str, options: Mapping[str, str]) -> str | None:
    """Return the letter that begins a sentence, else its last capital; None for several."""
    plain = _plain(stated).translate(_FOREIGN)
    lone = [match for match in _LONE.finditer(plain) if match[0] in options]
    for left, right in itertools.pairwise(lone):
        if left[0] != right[0] and _LIST.fullmatch(plain, left.end(), right.start()):
            return None
    label = _LABEL.fullmatch(plain)
    if label is not None and label[1].upper() in options:
        return label[1].upper()
    return lone[-1][0] if lone else None


def _plain(text: str) -> str:
    """Return a text without LaTeX's and Markdown's marks, and with single spaces."""
    return " ".join(_WRAPPERS.sub("", _SPACES.sub(" ", text)).split())
