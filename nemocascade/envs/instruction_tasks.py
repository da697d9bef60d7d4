"""Generated instructions of IFEval's kinds in few words, and texts that follow them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from nemocascade.envs.instructions.ifeval import CONSTRAINED_RESPONSES
from nemocascade.envs.instructions.registry import Options, follows
from nemocascade.envs.words import COLORS
from nemocascade.envs.words import SOME_NOUNS as NOUNS
from nemocascade.types import Message, Prompt

TRIES = 200
_OPTIONS = Options("letters", "rule")


@dataclass
class _Text:
    """A text under construction. Instructions edit its parts; `render` joins them."""

    words: list[str]
    extra: list[str] = field(default_factory=list)
    shape: Callable[[str], str] | None = None
    front: str = ""
    postscript: str = ""
    end: str = ""
    case: Callable[[str], str] = str
    quoted: bool = False

    def render(self) -> str:
        body = " ".join([*self.words, *self.extra]) + "."
        body = self.shape(body) if self.shape else body
        parts = [self.front, body, self.postscript, self.end]
        text = self.case(" ".join(part for part in parts if part))
        return f'"{text}"' if self.quoted else text


@dataclass(frozen=True)
class _Ask:
    """An instruction: its wording, its arguments, and the edit that makes a text follow it."""

    wording: str
    kwargs: dict[str, Any]
    edit: Callable[[_Text], None]


def make_task(rng: random.Random, difficulty: int, domain: str) -> Prompt:
    """Make `difficulty` + 1 compatible instructions, and a text that follows them."""
    kinds = _PLAIN if difficulty <= 0 else {**_PLAIN, **_SHAPES}
    for _ in range(TRIES):
        noun, color = rng.choice(NOUNS), rng.choice(COLORS)
        chosen = rng.sample(sorted(kinds), min(difficulty, 4) + 1)
        asks = [kinds[kind](rng) for kind in chosen]
        request = f"Write about a {noun}."
        text = _Text(["a", noun, "is", color])
        plain = text.render()
        for ask in asks:
            ask.edit(text)
        answer = text.render()
        if all(
            follows(kind, ask.kwargs, answer, _OPTIONS)
            for kind, ask in zip(chosen, asks, strict=True)
        ):
            break
    else:
        raise ValueError(f"no text follows {difficulty + 1} instructions at once")
    notes = " ".join(ask.wording for ask in asks)
    return Prompt(
        id="",
        domain=domain,
        messages=(Message("user", f"{request} {notes}"),),
        answer={"kinds": chosen, "kwargs": [ask.kwargs for ask in asks]},
        demonstration=(Message("assistant", answer, f"{noun}. {notes}"),),
        # The careless reply answers the request but ignores the instructions.
        careless=(Message("assistant", plain, f"{noun}."),),
    )


def _adding(wording: str, kwargs: dict[str, Any], words: Sequence[str]) -> _Ask:
    """Instruction that a text follows if words are added."""
    return _Ask(wording, kwargs, lambda text: text.extra.extend(words))


def _setting(wording: str, kwargs: dict[str, Any], **parts: Any) -> _Ask:
    """Instruction that a text follows if these parts are set."""

    def edit(text: _Text) -> None:
        for name, value in parts.items():
            setattr(text, name, value)

    return _Ask(wording, kwargs, edit)


def _existence(rng: random.Random) -> _Ask:
    word = rng.choice(NOUNS)
    return _adding(f"Use the word {word}.", {"keywords": [word]}, [word])


def _frequency(rng: random.Random) -> _Ask:
    word, n = rng.choice(NOUNS), rng.randint(2, 4)
    kwargs = {"keyword": word, "frequency": n, "relation": "at least"}
    return _adding(f"Use the word {word} at least {n} times.", kwargs, [word] * n)


def _forbidden(rng: random.Random) -> _Ask:
    # The text would naturally contain a color, so avoiding it has to be learnt.
    word = rng.choice(COLORS)

    def edit(text: _Text) -> None:
        others = [c for c in COLORS if c != word]
        text.words = [others[0] if w == word else w for w in text.words]

    return _Ask(f"Do not use the word {word}.", {"forbidden_words": [word]}, edit)


def _letter(rng: random.Random) -> _Ask:
    letter, n = rng.choice("qvxyz"), rng.randint(2, 5)
    kwargs = {"letter": letter, "let_frequency": n, "let_relation": "at least"}
    return _adding(f"Use the letter {letter} at least {n} times.", kwargs, [letter] * n)


def _many_words(rng: random.Random) -> _Ask:
    n = rng.randint(5, 12)

    def edit(text: _Text) -> None:
        while len(text.words) + len(text.extra) < n:
            text.words += ["and", COLORS[len(text.words) % len(COLORS)]]

    return _Ask(f"Use at least {n} words.", {"num_words": n, "relation": "at least"}, edit)


def _few_words(rng: random.Random) -> _Ask:
    n = rng.randint(3, 6)

    def edit(text: _Text) -> None:
        text.words = text.words[: n - 1]

    return _Ask(f"Use less than {n} words.", {"num_words": n, "relation": "less than"}, edit)


def _word_count(rng: random.Random) -> _Ask:
    return rng.choice((_many_words, _few_words))(rng)


def _many_sentences(rng: random.Random) -> _Ask:
    n = rng.randint(2, 4)

    def edit(text: _Text) -> None:
        first = " ".join(text.words)
        text.words = [". ".join([first] * n)]

    kwargs = {"num_sentences": n, "relation": "at least"}
    return _Ask(f"Write at least {n} sentences.", kwargs, edit)


def _no_comma(rng: random.Random) -> _Ask:
    return _setting("Use no commas.", {})


def _lowercase(rng: random.Random) -> _Ask:
    return _setting("Use lower case only.", {}, case=str.lower)


def _capital(rng: random.Random) -> _Ask:
    return _setting("Use capital letters only.", {}, case=str.upper)


def _capital_words(rng: random.Random) -> _Ask:
    n = rng.randint(1, 3)
    kwargs = {"capital_frequency": n, "capital_relation": "at least"}
    words = [w.upper() for w in rng.sample(NOUNS, n)]
    return _adding(f"Use at least {n} words in capitals.", kwargs, words)


def _quotation(rng: random.Random) -> _Ask:
    return _setting("Put it in double quotes.", {}, quoted=True)


def _end(rng: random.Random) -> _Ask:
    phrase = f"the {rng.choice(COLORS)} {rng.choice(NOUNS)}"
    return _setting(f"End with: {phrase}", {"end_phrase": phrase}, end=phrase)


def _title(rng: random.Random) -> _Ask:
    return _setting("Add a title in << >>.", {}, front=f"<<{rng.choice(NOUNS)}>>")


def _placeholders(rng: random.Random) -> _Ask:
    n = rng.randint(1, 3)
    words = [f"[{w}]" for w in rng.sample(NOUNS, n)]
    wording = f"Use at least {n} placeholders like [name]."
    return _adding(wording, {"num_placeholders": n}, words)


def _highlights(rng: random.Random) -> _Ask:
    n = rng.randint(1, 3)
    words = [f"*{w}*" for w in rng.sample(NOUNS, n)]
    return _adding(f"Highlight at least {n} parts like *this*.", {"num_highlights": n}, words)


def _postscript(rng: random.Random) -> _Ask:
    line = f"P.S. {rng.choice(NOUNS)}"
    kwargs = {"postscript_marker": "P.S."}
    return _setting("Add a postscript with P.S.", kwargs, postscript=line)


def _bullets(rng: random.Random) -> _Ask:
    n = rng.randint(2, 4)
    lines = "\n".join(f"* {w}" for w in rng.sample(NOUNS, n - 1))
    wording = f"Use exactly {n} bullet points with *."
    return _setting(wording, {"num_bullets": n}, shape=lambda body: f"\n* {body}\n{lines}\n")


def _paragraphs(rng: random.Random) -> _Ask:
    n = rng.randint(2, 3)
    wording = f"Write {n} paragraphs with *** between."
    return _setting(wording, {"num_paragraphs": n}, shape=lambda body: "\n***\n".join([body] * n))


def _nth_paragraph(rng: random.Random) -> _Ask:
    n, word = rng.randint(2, 3), rng.choice(NOUNS)
    nth = rng.randint(2, n)
    kwargs = {"num_paragraphs": n, "nth_paragraph": nth, "first_word": word}

    def shape(body: str) -> str:
        return "\n\n".join(f"{word} {body}" if i == nth else body for i in range(1, n + 1))

    wording = f"Write {n} paragraphs with empty lines between. Start paragraph {nth} with {word}."
    return _setting(wording, kwargs, shape=shape)


def _sections(rng: random.Random) -> _Ask:
    n = rng.randint(2, 3)
    kwargs = {"section_spliter": "Section", "num_sections": n}

    def shape(body: str) -> str:
        return "\n".join(f"Section {i} {body}" for i in range(1, n + 1))

    return _setting(f"Write {n} sections, each with Section X.", kwargs, shape=shape)


def _two_responses(rng: random.Random) -> _Ask:
    other = rng.choice(NOUNS)
    wording = "Give two answers with ****** between."
    return _setting(wording, {}, shape=lambda body: f"{body}\n******\na {other} {body}")


def _json_format(rng: random.Random) -> _Ask:
    return _setting("Answer in JSON.", {}, shape=lambda body: json.dumps({"text": body}))


def _constrained(rng: random.Random) -> _Ask:
    answer = rng.choice(CONSTRAINED_RESPONSES)
    options = " ".join(CONSTRAINED_RESPONSES)
    return _setting(f"Answer one of: {options}", {}, shape=lambda body: answer)


_PLAIN: dict[str, Callable[[random.Random], _Ask]] = {
    "keywords:existence": _existence,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter,
    "length_constraints:number_words": _word_count,
    "length_constraints:number_sentences": _many_sentences,
    "punctuation:no_comma": _no_comma,
    "change_case:english_lowercase": _lowercase,
    "change_case:english_capital": _capital,
    "change_case:capital_word_frequency": _capital_words,
    "startend:quotation": _quotation,
    "startend:end_checker": _end,
    "detectable_format:title": _title,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
}
_SHAPES: dict[str, Callable[[random.Random], _Ask]] = {
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _json_format,
    "detectable_format:constrained_response": _constrained,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "combination:two_responses": _two_responses,
}
