"""Libraries and data of the user's machine that some instruction kinds need.

Each is imported where it is used, which is in child processes that can be killed. Nothing is ever
downloaded.
"""

from __future__ import annotations

import importlib
from typing import Any

_EXTRA = "pip install 'nemocascade[ifeval]'"
_DATA = {
    "punkt": "punkt_tab",
    "stopwords": "stopwords",
    "tagger": "averaged_perceptron_tagger_eng",
}
"""Data sets of nltk: our name and nltk's."""
LIBRARIES = ("langdetect", "punkt", "stopwords", "tagger", "emoji", "syllapy")


def missing() -> dict[str, str]:
    """Return what is not installed here, each with the command that installs it."""
    return {name: remedy for name in LIBRARIES if (remedy := _remedy(name))}


def _remedy(name: str) -> str:
    package = "nltk" if name in _DATA else name
    try:
        module: Any = importlib.import_module(package)
    except ModuleNotFoundError:
        return f"{package} is not installed: {_EXTRA}"
    if name not in _DATA:
        return ""
    try:
        _use(module, name)
    except LookupError:
        command = f"python -m nltk.downloader {_DATA[name]}"
        return f"nltk has no data {_DATA[name]} on this machine: {command}"
    return ""


def _use(nltk: Any, name: str) -> None:
    """Load data of nltk. Raises LookupError if it is not on the machine."""
    if name == "punkt":
        nltk.word_tokenize("a")
    elif name == "tagger":
        nltk.pos_tag(["a"])
    else:
        nltk.corpus.stopwords.words("english")


def detect_language(text: str) -> str | None:
    """Return the ISO 639-1 code of the language; None if undetectable, as for digits only."""
    import langdetect

    # langdetect is random unless it is given a seed.
    langdetect.DetectorFactory.seed = 0
    try:
        return str(langdetect.detect(text))
    except langdetect.LangDetectException:
        return None


def stop_words() -> frozenset[str]:
    """Return nltk's English stop words."""
    import nltk

    return frozenset(nltk.corpus.stopwords.words("english"))


def part_of_speech(words: list[str]) -> str:
    """Return the Penn Treebank tag of the first of some words, as nltk tags them together."""
    import nltk

    return str(nltk.pos_tag(words)[0][1])


def is_emoji(character: str) -> bool:
    """Return True if a character is an emoji."""
    import emoji

    return bool(emoji.is_emoji(character))


def syllables(word: str) -> int:
    """Count the syllables of an English word."""
    import syllapy

    return int(syllapy.count(word))
