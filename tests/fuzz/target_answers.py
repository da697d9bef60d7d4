"""Answers of a model: parsers and verifiers of every environment, tools, edits, patches.

No answer may leave a task without a verdict: a verifier that fails on an answer has failed.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from fuzz.harness import Target
from fuzz.mutations import TEXTS, Choices, edited, mutated
from fuzz.row_seeds import PATCH, SHOP
from fuzz.target_rows import PROGRAMS, environments
from helpers.data import sentencepiece_tokenizer

from nemocascade.data.chat_template import Conversation, encode
from nemocascade.data.reply import parse_reply
from nemocascade.envs.base import demonstration, final_text, tool_results
from nemocascade.envs.code_blocks import programs_of
from nemocascade.envs.code_outputs import same_output, same_value
from nemocascade.recipe.envs import AgentConfig
from nemocascade.runtime.jsonl import json_text, parse_line
from nemocascade.runtime.turns import encodable
from nemocascade.swe.edits import EditError, apply_edits, edit_text, parse_edits
from nemocascade.swe.patches import PatchError, apply_patch, parse_patch
from nemocascade.swe.workspace import TOOLS, ToolError, Workspace, arguments_of, cut
from nemocascade.types import Message, Prompt, ToolCall

PARTS = (
    *(
        "\\boxed{A}",
        "\\boxed{\\frac{1}{2}}",
        "\\boxed{10^{10^{8}}}",
        "\\boxed{\\text{B}}",
        "\\frac",
    ),
    *(
        "Answer: ana",
        "**Answer**:\n",
        "* a\n",
        "P.S. x",
        "<<title>>",
        "[x]",
        "\n\n",
        "***",
        "******",
    ),
    *('{"a": 1}', "{", "}", "[1, 2]", "```json\n", "def f(x):\n    return x\n", "print(1)\n"),
    *("<parameter=a>\n1\n</parameter>\n", "</function>", "<function=add_task>\n"),
    *("### shop.py\n", "<<<<<<< SEARCH\n", "=======\n", ">>>>>>> REPLACE\n", "@@ -1 +1 @@\n"),
    *("--- a/shop.py\n", "+++ b/shop.py\n", "diff --git a/x b/y\n", "new file mode 100644\n"),
    *('"a\\303\\251"', "rename from a\n", "\\ No newline at end of file\n", "GIT binary patch\n"),
    *TEXTS,
)


@functools.cache
def _tasks() -> dict[str, list[Prompt]]:
    """A few tasks of each domain and difficulty."""
    return {
        name: [
            prompt
            for level in range(4)
            for prompt in islice(domain.prompts(seed=5, count=3, difficulty=level), 3)
        ]
        for name, domain in environments().items()
    }


def _text(choices: Choices, text: str, most: int = 5) -> str:
    for _ in range(choices.below(most)):
        text = edited(choices, text, PARTS)
    return text


def _turn(message: Message) -> str:
    """The text of a turn as the template renders it."""
    whole = Conversation((Message("user", "x"), message))
    segments = sentencepiece_tokenizer().template.render(whole, thinking=True)
    return "".join(s.text for s in segments if s.trained)


def _answer(choices: Choices, names: Sequence[str]) -> tuple[str, int, list[str]]:
    name = choices.of(names)
    tasks = _tasks()[name]
    number = choices.below(len(tasks))
    turns = demonstration(tasks[number], thinking=True, careless=choices.chance(2))
    texts = [_text(choices, _turn(turn)) for turn in turns if turn.role == "assistant"]
    return name, number, texts[: 4 if choices.chance(8) else None]


def _score(case: tuple[str, int, list[str]], folder: Path) -> None:
    name, number, texts = case
    prompt, environment = _tasks()[name][number], environments()[name]
    session = environment.session(prompt)
    tokenizer = sentencepiece_tokenizer()
    asked = Conversation(prompt.messages, prompt.tools)
    response: list[Message] = []
    for text in texts:
        reply = tokenizer.template.parse(text, thinking=True)
        response.append(reply.message)
        if session is not None and not session.done:
            results = tool_results(session, reply.message, reply.faults)
            if results:
                after = tokenizer.template.render_results(
                    asked, reply.message, results, thinking=True
                )
                encode(after, tokenizer)
            response += results
    verdict = environment.score(prompt, response)
    assert verdict.error is None, verdict.error
    assert verdict.reward is not None
    assert 0 <= verdict.reward <= 1
    again = parse_line(json_text([verdict.details, texts]).encode())
    # Two halves of a character in a row are that character in JSON.
    assert again[1] == json.loads(json.dumps(texts))
    if environment.by_group:
        (verdicts,) = environment.score_groups([(prompt, [response, response, []])])
        assert len(verdicts) == 3
        assert all(v.error is None for v in verdicts)


FAST = ("multiple_choice", "tool_calling", "structured_output", "instruction_following")
RULES = (*FAST, "preference", "long_context")


def _rules(choices: Choices) -> tuple[str, int, list[str]]:
    return _answer(choices, RULES)


def _mathematics(choices: Choices) -> tuple[str, int, list[str]]:
    return _answer(choices, ("math",))


def _programs(choices: Choices) -> tuple[str, int, list[str]]:
    return _answer(choices, PROGRAMS)


def _reply(choices: Choices) -> tuple[Literal["open", "closed", "free"], bool, str]:
    call = "<tool_call>\n<function=f>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
    as_json = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    text = choices.of((call, as_json, f"x</think>\n{call}", f"<think>x</think>{as_json}"))
    reasoning = choices.of(("open", "closed", "free"))
    return reasoning, choices.chance(2), _text(choices, text, 7)  # type: ignore[return-value]


def _parse(case: tuple[Literal["open", "closed", "free"], bool, str], folder: Path) -> None:
    reasoning, json_calls, text = case
    reply = parse_reply(text, reasoning=reasoning, ends=("<|im_end|>",), json_calls=json_calls)
    final = final_text([reply.message])
    assert programs_of(final)
    same_output(text, final)
    same_value([text], [final])


def _edits(choices: Choices) -> str:
    edit = f"### shop.py\n<<<<<<< SEARCH\n{SHOP}=======\n    return 2\n>>>>>>> REPLACE\n"
    new = "### new/a.py\n<<<<<<< SEARCH\n=======\nx = 1\n>>>>>>> REPLACE"
    return _text(choices, choices.of((edit, new, f"Text.\n{edit}\n{new}")), 7)


def _edit(text: str, folder: Path) -> None:
    edits = parse_edits(text)
    changed = apply_edits({"shop.py": SHOP, "b.py": "\r\n"}, edits)
    assert all(isinstance(new.encode(), bytes) for new in changed.values())
    if "\r" not in text:
        assert parse_edits("\n".join(map(edit_text, edits))) == edits


PATCHES = (
    PATCH,
    "--- /dev/null\n+++ b/new.py\n@@ -0,0 +1,2 @@\n+a\n+b\n",
    "diff --git a/shop.py b/b.py\nsimilarity index 90%\nrename from shop.py\nrename to b.py\n",
    "diff --git a/x.bin b/x.bin\nindex 1..2 100644\nGIT binary patch\nliteral 1\nIcmZPo\n\n",
    f"From 1234\nSubject: x\n\n---\n{PATCH}-- \n2.1\n",
)


def _patches(choices: Choices) -> str:
    return _text(choices, choices.of(PATCHES), 6)


def _patch(text: str, folder: Path) -> None:
    assert parse_patch(text)
    changed = apply_patch({"shop.py": SHOP.encode(), "x.bin": b"\xff"}, text)
    assert all(isinstance(data, bytes) for data in changed.values())


CALLS: tuple[Any, ...] = (
    {"name": "list", "arguments": {}},
    {"name": "read", "arguments": {"path": "shop.py", "start": "1", "end": "2"}},
    {"name": "search", "arguments": {"text": "total", "path": "tests"}},
    {"name": "edit", "arguments": {"path": "shop.py", "old": "xs) + 1", "new": "xs)"}},
    {"name": "edit", "arguments": {"path": "a/b.py", "old": "", "new": "x"}},
    {"name": "run_tests", "arguments": {"tests": "a"}},
)


def _calls(choices: Choices) -> list[Any]:
    return [mutated(choices, CALLS) for _ in range(1 + choices.below(4))]


def _call(calls: list[Any], folder: Path) -> None:
    made = Workspace(
        {"shop.py": SHOP.encode(), "tests/a.py": b"x", "x.bin": b"\xff"}, AgentConfig()
    )
    for call in calls:
        if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
            continue
        name = str(call.get("name"))
        try:
            given = arguments_of(name, call["arguments"])
            if name in TOOLS and name not in ("run_tests", "submit"):
                cut(encodable(made.call(name, given)), 100).encode()
        except ToolError as error:
            cut(encodable(str(error)), 100, end=True).encode()
    assert all(isinstance(data, bytes) for data in made.files.values())


def _office(choices: Choices) -> list[Any]:
    jobs = [call for task in _tasks()["tool_calling"] for call in task.answer["calls"]]
    return [mutated(choices, jobs) for _ in range(1 + choices.below(4))]


def _work(calls: list[Any], folder: Path) -> None:
    domain = environments()["tool_calling"]
    prompt = _tasks()["tool_calling"][0]
    made = tuple(
        ToolCall(str(call.get("name")), call["arguments"])
        for call in calls
        if isinstance(call, dict) and isinstance(call.get("arguments"), dict)
    )
    verdict = domain.score(prompt, [Message("assistant", json.dumps(calls)[:99], tool_calls=made)])
    assert verdict.error is None, verdict.error


TARGETS = (
    Target("answers to rules", _rules, _score, (), share=16),
    Target("answers in mathematics", _mathematics, _score, (), share=1.5),
    Target("answers with programs", _programs, _score, (), share=0.4),
    Target("replies", _reply, _parse, (), share=8),
    Target("edits", _edits, _edit, (EditError,), share=8),
    Target("patches", _patches, _patch, (PatchError,), share=8),
    Target("calls of a workspace", _calls, _call, (), share=6),
    Target("calls of an office", _office, _work, (), share=6),
)
