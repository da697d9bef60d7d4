"""Parsers of model text in the trainer's process need time that is linear in the text.

Each parser reads texts of n and 4n characters of every kind. Linear parsers need four times as
long, quadratic ones sixteen times. The quick tests put each kind of text into a third of the
frames, which differs from parser to parser; the slow ones into all.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from nemocascade.data.reply import parse_reply
from nemocascade.envs import choices, code_blocks, code_outputs, long_context
from nemocascade.envs.base import final_text, last_boxed
from nemocascade.envs.instructions import registry
from nemocascade.envs.instructions.registry import Options
from nemocascade.envs.instructions.texts import ruled_sentences
from nemocascade.envs.tool_calling import ToolCalling
from nemocascade.judges.prompts import (
    compare_question,
    grade_question,
    parse_comparison,
    parse_grade,
)
from nemocascade.judges.rule import quality, words_f1
from nemocascade.recipe.envs import AgentConfig
from nemocascade.runtime.turns import encodable
from nemocascade.sandbox.pool import _parse
from nemocascade.swe.edits import EditError, apply_edits, parse_edits
from nemocascade.swe.patches import PatchError, parse_patch
from nemocascade.swe.reports import read_reports
from nemocascade.swe.workspace import ToolError, Workspace, arguments_of, cut
from nemocascade.types import Message, Outcome, Prompt, SandboxError, ToolCall

SIZE = 6_000
"""Characters of the shorter text: a quadratic step per character takes 0.1 s or more."""
LINEAR = 6.0
"""Largest ratio of the times of n and 4n characters."""
QUICK_S = 0.004
"""Times below it are not compared: a quadratic parser needs more."""
TRIES = 4

UNITS = {
    "dots": ".",
    "dots and quotes": '."',
    "marks": "?!",
    "open brackets": "[",
    "close brackets": "]",
    "bracket pairs": "[]",
    "open braces": "{",
    "brace pairs": "{}",
    "objects": '{"a":',
    "lists": "[1,",
    "backslashes": "\\",
    "escaped braces": "\\{",
    "quotes": '"',
    "spaces": " ",
    "tabs": "\t",
    "newlines": "\n",
    "returns": "\r\n",
    "spaced newlines": " \n",
    "letters": "a",
    "words": "word ",
    "capitals": "A.",
    "abbreviations": "etc. ",
    "digits": "7",
    "digits and commas": "1,234,",
    "minus": "-",
    "dashes in lines": "-\n",
    "stars": "*",
    "starred lines": "* a\n",
    "stars and letters": "*a",
    "hashes": "### a\n",
    "backticks": "`",
    "fences": "```\n",
    "fences of Python": "```python\n",
    "spaced fences": "``` ",
    "tilde fences": "~~~a\n",
    "fences of both kinds": "~~~a\n```b\n",
    "indented fences": "    ```a\n",
    "less": "<",
    "greater": ">",
    "less and greater": "<>",
    "titles": "<<a",
    "think": "<think>",
    "think lines": "<think>\n",
    "end of think": "</think>",
    "boxes": "\\boxed{",
    "closed boxes": "\\boxed{1}",
    "spaced boxes": "\\boxed ",
    "decorations": "\\text{",
    "answers": "Answer:\n",
    "answers in a line": "answer: ",
    "calls": "<tool_call>",
    "closed calls": "<tool_call>\n<function=f>\n</function>\n</tool_call>",
    "functions": "<function=f>\n",
    "ends of functions": "</function>",
    "parameters": "<parameter=a>\nb\n</parameter>\n",
    "searches": "<<<<<<< SEARCH\n",
    "dividers": "=======\n",
    "replaces": ">>>>>>> REPLACE\n",
    "hunks": "@@ -1 +1 @@\n",
    "files of a patch": "--- a/x\n+++ b/x\n@@ -1 +1 @@\n-a\n+b\n",
    "combining": "e\u0301",
    "accents alone": "\u0301",
    "fullwidth": "\uff21",
    "emoji": "\U0001f600",
    "lone surrogates": "\ud83d",
}
FRAMES: dict[str, tuple[str, str]] = {
    "alone": ("", ""),
    "then a letter": ("", "x"),
    "in a box": ("\\boxed{", "}"),
    "in decorations": ("\\boxed{\\text{", "}}"),
    "in a fence": ("```python\n", "\n```"),
    "after a fence": ("```", "x"),
    "after an answer": ("Answer:", ""),
    "in a call": ("<tool_call>\n<function=f>\n<parameter=a>\n", "\n</parameter>\n</function>\n"),
    "in a closed call": ("<tool_call>\n<function=f>\n", "</function>\n</tool_call>"),
    "in a path": ("### a", "b\n<<<<<<< SEARCH\nx\n=======\ny\n>>>>>>> REPLACE"),
    "in an edit": ("### a\n<<<<<<< SEARCH\n", "\n=======\ny\n>>>>>>> REPLACE"),
    "in an object": ('{"score": ', "}"),
}


def turn(text: str) -> list[Message]:
    return [Message("assistant", text)]


def edit(text: str) -> None:
    """Parse and apply the edits of an answer, to a file that looks like its text."""
    try:
        apply_edits({"a": text + "\nx\n"}, parse_edits(text))
    except EditError:
        return


def patch(text: str) -> None:
    try:
        parse_patch(text)
    except PatchError:
        return


def workspace(text: str) -> None:
    made = Workspace({"a": b"x\n" * 10}, AgentConfig())
    for name, arguments in (
        ("read", {"path": text, "start": text}),
        ("read", {"path": "a", "start": text}),
        ("search", {"text": text}),
        ("edit", {"path": "a", "old": text, "new": text}),
        ("edit", {"path": "b", "old": "", "new": text}),
        ("edit", {"path": "b", "old": text[:-1], "new": text}),
    ):
        try:
            cut(encodable(made.call(name, arguments_of(name, arguments))), 100)
        except ToolError as error:
            cut(encodable(str(error)), 100, end=True)


def calls(text: str) -> None:
    """Score an answer's calls: many of them, and with long arguments."""
    domain = ToolCalling()
    answer = {"office": {}, "calls": [], "allowed": ["add_task", "write_file"]}
    prompt = Prompt("x", "tool_calling", (Message("user", "go"),), answer)
    long = ToolCall("write_file", {"path": text, "text": text})
    made = tuple(ToolCall("add_task", {"title": text[:9]}) for _ in range(len(text) // 64))
    for part in ((long,), made):
        domain.score(prompt, [Message("assistant", text, tool_calls=part)])
        session = domain.session(prompt)
        session.step(part)


def reports(text: str) -> None:
    outcome = Outcome("ok", 0, text, text, _parse(text.encode(errors="replace")), 0.0, 0.0)
    try:
        read_reports(outcome, "nonce", "unittest")
    except SandboxError:
        return


QUICK = Options("letters", "rule")
VALUES: dict[Any, Any] = {str: "a", int: 2, float: 2.0, list[str]: ["a", "ab"]}
GIVEN: dict[str, Any] = {
    "keyword": "ab",
    "forbidden_words": ["ab", "-"],
    "postscript_marker": "P.P.S",
    "phrase": "a big word",
    "num_paragraphs": 1,
    "nth_paragraph": 1,
    "n": 1,
    "m": 1,
}
"""Arguments that reach far; others have the value of their type."""


def given(kind: str) -> dict[str, Any]:
    takes = registry.arguments_of(kind).items()
    return {name: GIVEN.get(name, VALUES.get(type_, "at least")) for name, (type_, _) in takes}


ARGUMENTS = {kind: given(kind) for kind in registry.KINDS if not registry.needed(kind, QUICK)}
QUESTION = (Message("user", "q"),)
PARSERS: dict[str, Callable[[str], object]] = {
    "final text": lambda t: final_text(turn(t)),
    "reply": lambda t: parse_reply(t, reasoning="closed", ends=("<|im_end|>",)),
    "thinking reply": lambda t: parse_reply(t, reasoning="open", ends=("<|im_end|>",)),
    "box": last_boxed,
    **{
        f"choice by {mode}": lambda t, mode=mode: choices.chosen_by(mode, t, {"A": "a", "B": t})  # type: ignore[misc]
        for mode in choices.GRADING_MODES
    },
    "choice": lambda t: choices.chosen_in(t, {"A": "a", "B": "b"}),
    "answer": lambda t: long_context.normalised(long_context.answer_of(t)),
    "program": code_blocks.programs_of,
    "future imports": lambda t: code_blocks.joined_source((t, f"from __future__ import {t}")),
    "output": lambda t: code_outputs.same_output(t, t + "0"),
    "results": lambda t: code_outputs.same_value(list(_parse(t.encode(errors="replace"))), [[1]]),
    "edits": edit,
    "patch": patch,
    "workspace": workspace,
    "calls": calls,
    "test reports": reports,
    "comparison": parse_comparison,
    "grade": parse_grade,
    "question": lambda t: (grade_question(QUESTION, t), compare_question(QUESTION, t, t)),
    "rule judge": lambda t: (words_f1(t, "a b"), quality(t, ["a"], ["b"])),
    "sentences": ruled_sentences,
    **{
        kind: lambda t, kind=kind, given=given: registry.follows(kind, given, t, QUICK)  # type: ignore[misc]
        for kind, given in ARGUMENTS.items()
    },
}


def seconds(parser: Callable[[str], object], text: str) -> float:
    """CPU time of this thread; the machine's load does not count."""
    start = time.thread_time()
    parser(text)
    return time.thread_time() - start


def ratio(parser: Callable[[str], object], make: Callable[[int], str], size: int = SIZE) -> float:
    """Ratio of the times of 4n and n, from the best of several tries; 0 if too short to tell.

    A ratio that is too large is measured once more at 16n and 4n: what a busy machine adds to
    milliseconds vanishes there, what a quadratic parser adds stays.
    """
    found = 0.0
    for n in (size, 4 * size):
        large = seconds(parser, make(4 * n))
        if large < QUICK_S:
            return 0.0
        small = seconds(parser, make(n))
        for _ in range(TRIES):
            if large < QUICK_S or large < LINEAR * small:
                break
            large = min(large, seconds(parser, make(4 * n)))
            small = min(small, seconds(parser, make(n)))
        found = 0.0 if large < QUICK_S else large / small
        if found < LINEAR:
            break
    return found


def text_of(frame: str, unit: str, size: int) -> str:
    start, end = FRAMES[frame]
    return start + UNITS[unit] * (size // len(UNITS[unit])) + end


def test_every_kind_of_instruction_is_tried() -> None:
    assert len(ARGUMENTS) > 100
    for kind, given in ARGUMENTS.items():
        assert registry.is_quick(kind, registry.checked_arguments(kind, given), QUICK), kind


TURNS = 3


def frames_of(name: str, unit: str, turns: int) -> Sequence[str]:
    """Every frame in which a parser reads a unit, or one in `turns` of them, by turns."""
    # Instructions know nothing of fences, boxes and calls.
    every = ("alone", "then a letter", "in an object") if name in ARGUMENTS else tuple(FRAMES)
    turn = list(PARSERS).index(name) + list(UNITS).index(unit)
    return every[turn % turns :: turns]


def test_quick_tests_meet_every_frame() -> None:
    for name in PARSERS:
        met = {frame for unit in UNITS for frame in frames_of(name, unit, TURNS)}
        assert met == set(frames_of(name, "dots", 1))


@pytest.mark.parametrize(
    "turns", [TURNS, pytest.param(1, marks=pytest.mark.slow)], ids=["third", "all"]
)
@pytest.mark.parametrize("name", PARSERS)
def test_time_is_linear(name: str, turns: int) -> None:
    parser = PARSERS[name]
    slow = {
        f"{unit}, {frame}": round(found, 1)
        for unit in UNITS
        for frame in frames_of(name, unit, turns)
        if (found := ratio(parser, lambda n, f=frame, u=unit: text_of(f, u, n))) >= LINEAR  # type: ignore[misc]
    }
    assert not slow


def test_a_quadratic_parser_is_found() -> None:
    assert ratio(re.compile(r"[.!?]+(?=\s|$)").findall, lambda n: "." * n + "x", 500) > LINEAR
