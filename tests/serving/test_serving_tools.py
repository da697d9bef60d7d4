"""Calls of tools: through the server with the openai client, and in the terminal.

The engine writes texts that are given.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import openai
import pytest
import torch
import uvicorn
from helpers.data import sentencepiece_tokenizer

from nemocascade.envs.tool_calling import ToolCalling
from nemocascade.rollout.engine import Completion, Finish, Request, Sampling, as_work
from nemocascade.runtime.turns import parse_tools
from nemocascade.serving.answers import Answers
from nemocascade.serving.api import typed_arguments
from nemocascade.serving.chat import Talk
from nemocascade.serving.model import OpenModel
from nemocascade.serving.prompts import _Prompt as PromptRow
from nemocascade.serving.prompts import _response as response_fields
from nemocascade.serving.server import application
from nemocascade.serving.settings import ChatSettings
from nemocascade.types import Message, Prompt, ToolCall

END = "<|im_end|>"
ASK: Any = {"role": "user", "content": "Weather?"}
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {
                "town": {"type": "string"},
                "days": {"type": "integer"},
                "hourly": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            },
        },
    },
}


def call(name: str, **arguments: str) -> str:
    """A call as the model writes it."""
    parameters = "".join(f"<parameter={k}>\n{v}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


OSLO = call("weather", town="Oslo", days="3", hourly="True")
ROME = call("weather", town="12", days="1")
BROKEN = "<tool_call>\n<function=weather>\nOslo\n</tool_call>"


@dataclass
class ScriptedEngine:
    """Answers requests with the texts, in turn. prompts: token ids of the requests."""

    texts: list[str] = field(default_factory=list)
    prompts: list[list[int]] = field(default_factory=list)
    finish: Finish = "stop"

    def run(self, requests: Any, *_: Any, observe: Any, **__: Any) -> Iterator[Completion]:
        work, is_open = as_work(requests), True
        while is_open:
            work.idle()
            work.check()
            taken, _cancelled, is_open = work.poll(4, 0)
            for number in taken:
                yield self._answer(work.requests[number], observe)

    def _answer(self, request: Request, observe: Any) -> Completion:
        self.prompts.append(list(request.prompt))
        ids = sentencepiece_tokenizer().encode(self.texts.pop(0), allow_special=True)
        for token in ids:
            observe([request.id], [token], [-0.5])
        tokens = torch.tensor([*request.prompt, *ids])
        written = torch.arange(len(tokens)) >= len(request.prompt)
        return Completion(request, tokens, written, -0.5 * written.float(), self.finish)


def model_of(engine: ScriptedEngine, settings: ChatSettings) -> OpenModel:
    tokenizer = sentencepiece_tokenizer()
    return OpenModel("m", "", cast(Any, None), cast(Any, engine), tokenizer, settings, 8192)


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def client(engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    answers = Answers(model_of(engine, ChatSettings("m", thinking=False)))
    config = uvicorn.Config(application(answers), port=0, log_level="critical")
    server = uvicorn.Server(config)
    threads = [threading.Thread(target=work, daemon=True) for work in (server.run, answers.run)]
    for thread in threads:
        thread.start()
    while not server.started:
        assert threads[0].is_alive()
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0) as found:
        yield found
    answers.close()
    server.should_exit = True
    for thread in threads:
        thread.join(30)


def asked(client: openai.OpenAI, *messages: Any, **fields: Any) -> Any:
    """The choice of a chat with the tool."""
    given = {"model": "m", "messages": [ASK, *messages], "tools": [TOOL], **fields}
    return client.chat.completions.create(**given).choices[0]


def streamed(client: openai.OpenAI, **fields: Any) -> tuple[str, list[Any], list[str]]:
    """Content, deltas of calls and finish reasons of a chat with the tool."""
    content = ""
    calls: list[Any] = []
    reasons: list[str] = []
    given: Any = {"model": "m", "messages": [ASK], "tools": [TOOL], "stream": True, **fields}
    for chunk in client.chat.completions.create(**given):
        (choice,) = chunk.choices
        content += choice.delta.content or ""
        calls += choice.delta.tool_calls or []
        reasons += [choice.finish_reason] if choice.finish_reason else []
    return content, calls, reasons


def pairs(calls: Sequence[Any]) -> list[tuple[str, Any]]:
    """Names and arguments of calls."""
    return [(c.function.name, json.loads(c.function.arguments)) for c in calls]


FOUND = [
    ("weather", {"town": "Oslo", "days": 3, "hourly": True}),
    ("weather", {"town": "12", "days": 1}),
]


def test_a_call_is_returned_with_typed_arguments(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    engine.texts = [f"I look.\n{OSLO}{END}"]
    choice = asked(client)
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I look."
    (found,) = choice.message.tool_calls
    assert found.type == "function"
    assert found.id.startswith("call_")
    assert pairs([found]) == FOUND[:1]


def test_two_calls_in_one_reply(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.texts = [f"{OSLO}\n{ROME}{END}"] * 2
    calls = asked(client).message.tool_calls
    assert pairs(calls) == FOUND
    assert calls[0].id != calls[1].id
    assert pairs(asked(client, parallel_tool_calls=False).message.tool_calls) == FOUND[:1]


def test_streamed_calls(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    engine.texts = [f"I look.\n{OSLO}\n{ROME}{END}"]
    content, calls, reasons = streamed(client)
    assert (content, reasons) == ("I look.", ["tool_calls"])
    assert [c.index for c in calls] == [0, 1]
    assert len({c.id for c in calls}) == 2
    assert pairs(calls) == FOUND


@pytest.mark.parametrize("text", [f"Hm.\n{BROKEN}", f"Hm.\n{OSLO[:-13]}"])
def test_a_malformed_call_stays_text(
    client: openai.OpenAI, engine: ScriptedEngine, text: str
) -> None:
    engine.texts = [text + END] * 2
    choice = asked(client)
    assert (choice.message.content, choice.message.tool_calls) == (text, None)
    assert choice.finish_reason == "stop"
    assert streamed(client) == (text, [], ["stop"])


@pytest.mark.parametrize("fields", [{"tools": openai.omit}, {"tool_choice": "none"}])
def test_without_tools_a_call_is_text(
    client: openai.OpenAI, engine: ScriptedEngine, fields: dict[str, Any]
) -> None:
    engine.texts = [f"I look.\n{OSLO}{END}"] * 2
    choice = asked(client, **fields)
    assert choice.message.content == f"I look.\n{OSLO}"
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "stop")
    assert streamed(client, **fields) == (f"I look.\n{OSLO}", [], ["stop"])


def test_results_are_rendered_into_the_next_prompt(
    client: openai.OpenAI, engine: ScriptedEngine
) -> None:
    """The message that the client got is sent back, with the results."""
    engine.texts = [f"{OSLO}\n{ROME}{END}", f"It rains.{END}"]
    said = asked(client).message
    texts = ("rain", [{"type": "text", "text": "sun"}])
    results = [
        {"role": "tool", "tool_call_id": made.id, "content": text}
        for made, text in zip(said.tool_calls, texts, strict=True)
    ]
    choice = asked(client, said.model_dump(), *results)
    assert (choice.message.content, choice.finish_reason) == ("It rains.", "stop")
    first, second = map(sentencepiece_tokenizer().decode, engine.prompts)
    assert first.endswith("<|im_start|>assistant\n<think></think>")
    assert second == (
        f"{first.removesuffix('<think></think>')}<think></think>\n{OSLO}\n{ROME}\n{END}\n"
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n"
        f"</tool_response>\n{END}\n<|im_start|>assistant\n<think></think>"
    )


def test_calls_in_answers_to_a_file(engine: ScriptedEngine) -> None:
    engine.texts = [f"{OSLO}{END}"]
    settings = ChatSettings("m", thinking=False)
    requests = [Request(0, (5,), Sampling())]
    (completion,) = engine.run(requests, observe=lambda *_: None)
    prompt = PromptRow(0, {}, [5], parse_tools([TOOL]))
    (found,) = response_fields(completion, prompt, model_of(engine, settings))["tool_calls"]
    assert (found["name"], json.loads(found["arguments"])) == FOUND[0]


def test_types_of_arguments() -> None:
    def typed(kind: Any, text: str) -> Any:
        return typed_arguments(ToolCall("f", {"x": text}), {"properties": {"x": kind}})["x"]

    optional = {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert [typed(optional, text) for text in ("3", "None", "null")] == [3, None, None]
    assert [typed({"type": "boolean"}, text) for text in ("True", "false")] == [True, False]
    assert typed({"oneOf": [{"type": "integer"}, {"type": "string"}]}, "3") == "3"
    assert typed({"anyOf": [{"type": "integer"}, {}]}, "3") == "3"
    assert typed({"type": ["integer", "null"]}, "3") == 3
    assert typed({"type": {"no": "type"}}, "3") == typed({"anyOf": 3}, "3") == "3"


@pytest.fixture
def task() -> Prompt:
    """A task whose solution is one call."""
    return next(iter(ToolCalling().prompts(seed=1, count=1, heldout=True)))


def talk_of(engine: ScriptedEngine, shown: list[str], **changes: Any) -> Talk:
    settings = ChatSettings("m", seed=1, **changes)
    model = model_of(engine, settings)
    return Talk(model, settings, ToolCalling(), write=shown.append, colors=True)


def solution(task: Prompt) -> str:
    (made,) = task.demonstration[0].tool_calls
    return call(made.name, **made.arguments)


@pytest.mark.parametrize("show_thinking", [True, False])
def test_a_chat_runs_the_calls_of_a_task(
    engine: ScriptedEngine, task: Prompt, show_thinking: bool
) -> None:
    engine.texts = [f"I think.\n</think>\n{solution(task)}{END}", f"So.\n</think>\nDone.{END}"]
    shown: list[str] = []
    talk = talk_of(engine, shown, show_thinking=show_thinking)
    talk._tasks = iter([task])
    talk.task()
    talk.close()
    (made,) = task.demonstration[0].tool_calls
    text = "".join(shown)
    at = text.index(f"{made.name}({next(iter(made.arguments))}=")
    result = text.index("[tool] ", at)
    assert at < result < text.index("Done.", result)
    assert text.endswith("reward 1\n")
    assert ("I think." in text) == ("\x1b[2mSo." in text) == show_thinking
    assert "<tool_response>" in sentencepiece_tokenizer().decode(engine.prompts[1])


def test_a_malformed_call_of_a_chat_is_answered(engine: ScriptedEngine, task: Prompt) -> None:
    engine.texts = [f"{BROKEN}{END}", f"Sorry.{END}"]
    shown: list[str] = []
    talk = talk_of(engine, shown, thinking=False)
    talk.say("Go.")
    talk.close()
    assert "[tool] error: a call must be" in "".join(shown)


def test_a_chat_says_that_its_turns_are_used_up(engine: ScriptedEngine, task: Prompt) -> None:
    engine.texts = [f"{solution(task)}{END}"] * 2
    shown: list[str] = []
    talk = talk_of(engine, shown, thinking=False, max_turns=2)
    talk.say("Go.")
    talk.close()
    assert len(engine.prompts) == 2
    assert "".join(shown).endswith("[no answer after 2 turns: --max-turns]\n")


def test_a_chat_without_tools_shows_a_call(engine: ScriptedEngine) -> None:
    engine.texts = [f"{OSLO}{END}"]
    shown: list[str] = []
    settings = ChatSettings("m", thinking=False)
    talk = Talk(model_of(engine, settings), settings, write=shown.append)
    talk.say("Go.")
    assert "weather(town='Oslo', days='3', hourly='True')\n" in "".join(shown)
    assert talk._messages[-1] == Message(
        "assistant", "", "", (ToolCall("weather", {"town": "Oslo", "days": "3", "hourly": "True"}),)
    )
