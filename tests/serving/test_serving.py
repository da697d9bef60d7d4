"""A model in use: a server that the openai client talks to, answers to a file, a chat."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import httpx2
import openai
import pytest
from helpers.ranks import run_ranks
from helpers.serving import client_of, model_of, served, start_artifact
from starlette.testclient import TestClient

from nemocascade.envs.base import Domain
from nemocascade.envs.registry import close_environments, make_environments
from nemocascade.megatron.convert import export_huggingface
from nemocascade.recipe import EngineConfig, RecipeError
from nemocascade.rollout.capacity import CapacityError
from nemocascade.rollout.completions import PATH, drawn_ids, read_answer, request_body
from nemocascade.rollout.engine import Sampling
from nemocascade.runtime.row_errors import DataError
from nemocascade.serving import answers as serving_answers
from nemocascade.serving.answers import Answers
from nemocascade.serving.api import typed_arguments
from nemocascade.serving.chat import Talk
from nemocascade.serving.echo import PromptScores
from nemocascade.serving.model import open_model
from nemocascade.serving.prompts import generate
from nemocascade.serving.server import application, serve
from nemocascade.serving.settings import (
    ChatSettings,
    GenerateSettings,
    ModelSettings,
    ServeSettings,
)
from nemocascade.types import ToolCall

FP32 = EngineConfig(precision="fp32")
MESSAGES: Any = [{"role": "user", "content": "Say three words."}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Explain a word.",
        "parameters": {"type": "object", "properties": {"word": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> str:
    return start_artifact(tmp_path_factory.mktemp("sft"))


@pytest.fixture(scope="module")
def server(artifact: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    yield from served(artifact, tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def client(server: str) -> Any:
    return client_of(server)


def test_a_chat_is_answered(client: Any) -> None:
    reply = client.chat.completions.create(
        model=model_of(client), messages=MESSAGES, temperature=0, max_tokens=8, logprobs=True
    )
    assert reply.object == "chat.completion"
    (choice,) = reply.choices
    assert choice.finish_reason == "length"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 8
    assert all(token.logprob <= 0 for token in choice.logprobs.content)
    assert reply.usage is not None
    assert reply.usage.completion_tokens == 8
    assert reply.usage.total_tokens == 8 + reply.usage.prompt_tokens


@pytest.mark.parametrize("thinking", [True, False])
def test_a_stream_is_the_whole_answer(client: Any, thinking: bool) -> None:
    fields: dict[str, Any] = {
        "model": model_of(client),
        "messages": MESSAGES,
        "seed": 7,
        "n": 2,
        "extra_body": {
            "return_token_ids": True,
            "chat_template_kwargs": {"enable_thinking": thinking},
        },
    }
    whole = client.chat.completions.create(**fields)
    parts: list[dict[str, Any]] = [{"text": "", "ids": [], "end": None} for _ in range(2)]
    usage = None
    for chunk in client.chat.completions.create(
        **fields, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            part, delta = parts[choice.index], choice.delta
            part["text"] += getattr(delta, "reasoning_content", None) or ""
            part["text"] += delta.content or ""
            part["ids"] += getattr(choice, "token_ids", None) or []
            part["end"] = choice.finish_reason or part["end"]
    for choice, part in zip(whole.choices, parts, strict=True):
        said = choice.message
        reasoning = getattr(said, "reasoning_content", None) or ""
        assert part["text"] == reasoning + (said.content or "")
        assert part["ids"] == choice.token_ids
        assert part["end"] == choice.finish_reason
    assert parts[0]["ids"] != parts[1]["ids"], "choices of one request differ"
    assert usage == whole.usage


def test_a_completion_of_token_ids_is_that_of_their_text(client: Any) -> None:
    name = model_of(client)
    asked = {"model": name, "temperature": 0, "max_tokens": 6, "logprobs": 1}
    asked["extra_body"] = {"return_token_ids": True, "ignore_eos": True}
    first = client.completions.create(prompt="one two three", **asked)
    ids = first.choices[0].model_dump()["prompt_token_ids"]
    second = client.completions.create(prompt=ids, **asked)
    assert first.choices[0].text == second.choices[0].text
    logprobs = first.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert (len(logprobs.tokens), len(logprobs.token_logprobs)) == (6, 6)
    streamed = client.completions.create(prompt=ids, stream=True, **asked)
    assert "".join(c.choices[0].text for c in streamed) == first.choices[0].text
    several = client.completions.create(prompt=["one two three", "four"], **asked)
    assert several.choices[0].text == first.choices[0].text
    assert [c.index for c in several.choices] == [0, 1]


def test_a_prompt_is_repeated_with_its_log_probabilities(server: str, client: Any) -> None:
    """The requests that lm-eval makes for log-likelihoods: batches of token ids with `echo`."""
    name, prompt = model_of(client), [20, 30, 40]
    asked: dict[str, Any] = {"model": name, "temperature": 0, "logprobs": 1, "seed": 1234}
    written = client.completions.create(
        **asked,
        prompt=prompt,
        max_tokens=6,
        extra_body={"return_token_ids": True, "ignore_eos": True},
    ).choices[0]
    whole = [*prompt, *written.token_ids]
    other = [*whole[:-1], 50]
    body = {**asked, "prompt": [whole, other], "max_tokens": 1, "echo": True}
    reply = httpx2.post(f"{server}/v1/completions", json=body, timeout=60).json()
    sums = []
    for choice, ids in zip(reply["choices"], (whole, other), strict=True):
        found = choice["logprobs"]
        assert len(found["tokens"]) == len(found["token_logprobs"]) == len(ids) + 1
        assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
        assert choice["text"].startswith("".join(found["tokens"][: len(prompt)]))
        # As lm-eval reads them.
        logprobs, best = (found[k][len(prompt) : -1] for k in ("token_logprobs", "top_logprobs"))
        sums.append(logprobs)
        greedy = all(a == max(b.values()) for a, b in zip(logprobs, best, strict=True))
        assert greedy == (ids is whole)
    assert sums[0] == pytest.approx(written.logprobs.token_logprobs, abs=1e-4)
    assert sums[1][:-1] == pytest.approx(sums[0][:-1], abs=1e-6)
    assert sums[1][-1] < sums[0][-1]


def test_a_client_that_leaves_does_not_end_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the scores of a prompt is cancelled before they are made, and meanwhile."""
    made: list[bool] = []
    waiting: list[Future[PromptScores]] = []

    def scored(model: Any, prompt: Any) -> PromptScores:
        made.append(waiting[1].cancel())
        return PromptScores([0.5], [])

    monkeypatch.setattr(serving_answers, "score_prompt", scored)
    answers = serving_answers.Answers(cast(Any, None))
    waiting += [answers.score([1, 2]), answers.score([3, 4])]
    waiting[0].cancel()
    answers._work.check()
    assert made == [False]
    assert waiting[1].result(timeout=0).logprobs == [0.5]
    assert not answers._futures


def test_rollouts_of_a_server_engine_can_come_from_it(server: str, client: Any) -> None:
    """The requests that `rollout.engine server` and `pass-rates --server` send."""
    size = 400
    sampling = Sampling(temperature=0.7, top_p=0.9, stop_tokens=((3,),), max_tokens=9)
    prompt = [20, 30, 40]
    body = request_body(model_of(client), prompt, 9, sampling, number=5, drawn=drawn_ids(size, 512))
    replies = [httpx2.post(f"{server}{PATH}", content=body, timeout=60).content for _ in range(2)]
    found = [read_answer(reply, prompt, 9, sampling, size) for reply in replies]
    assert found[0] == found[1], "a seed decides the tokens"
    assert found[0].finish == ("stop" if found[0].ids[-1] == 3 else "length")


def test_a_stop_ends_the_text_before_it(client: Any) -> None:
    asked: dict[str, Any] = {"model": model_of(client), "prompt": "one", "temperature": 0}
    asked["extra_body"] = {"ignore_eos": True}
    whole = client.completions.create(**asked, max_tokens=12).choices[0].text
    assert len(whole) > 5
    stop = whole[3:5]
    cut = client.completions.create(**asked, max_tokens=12, stop=stop).choices[0]
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_tools_are_declared_in_the_prompt(client: Any) -> None:
    name = model_of(client)
    counts = []
    for tools in ([], [TOOL]):
        fields = {"tools": tools} if tools else {}
        reply = client.chat.completions.create(
            model=name, messages=MESSAGES, max_tokens=1, **fields
        )
        assert reply.usage is not None
        counts.append(reply.usage.prompt_tokens)
    assert counts[1] > counts[0] + 20


def test_arguments_have_the_declared_types() -> None:
    schema = {"properties": {"n": {"type": "integer"}, "s": {"type": "string"}, "l": {}}}
    call = ToolCall("f", {"n": "3", "s": "3", "l": "3", "other": "3"})
    assert typed_arguments(call, schema) == {"n": 3, "s": "3", "l": "3", "other": "3"}
    assert typed_arguments(ToolCall("f", {"n": "three"}), schema) == {"n": "three"}


@pytest.mark.parametrize(
    ("changes", "status", "says"),
    [
        ({"model": "other"}, 404, "'other' is not here"),
        ({"messages": []}, 400, "at least one turn"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "last turn"),
        ({"messages": [{"role": "nobody", "content": "x"}]}, 400, "unknown role"),
        ({"temperature": -1}, 400, "temperature(-1.0) must be 0"),
        ({"temperature": 1e-40}, 400, "temperature(1e-40) must be 0"),
        ({"top_p": 0}, 400, "top_p(0.0)"),
        ({"max_tokens": 0}, 400, "max_tokens(0)"),
        ({"n": "2"}, 400, "n('2')"),
        ({"presence_penalty": 0.5}, 400, "presence_penalty(0.5) is not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format"),
        ({"logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"logit_bias": 5}, 400, "logit_bias"),
        ({"temperature": 10**400}, 400, "must be a number"),
        ({"stop": [""]}, 400, "stop must be"),
        ({"echo": True}, 400, "echo is not supported here"),
        ({"messages": [{"role": "user", "content": "word " * 4000}]}, 400, "context"),
    ],
)
def test_what_is_not_supported_is_an_error(
    server: str, client: Any, changes: dict[str, Any], status: int, says: str
) -> None:
    body = {"model": model_of(client), "messages": MESSAGES, "max_tokens": 2, **changes}
    reply = httpx2.post(f"{server}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == status, reply.text
    assert says in reply.json()["error"]["message"]


def test_a_prompt_that_is_a_number_is_an_error(server: str) -> None:
    reply = httpx2.post(f"{server}/v1/completions", json={"prompt": 5}, timeout=60)
    assert reply.status_code == 400, reply.text
    assert "prompt must be text, or token ids" in reply.json()["error"]["message"]


def test_the_model_is_found_by_its_name(client: Any) -> None:
    assert client.models.retrieve(model_of(client)).id == model_of(client)
    with pytest.raises(openai.NotFoundError, match="'other' is not here"):
        client.models.retrieve("other")


def test_a_failure_of_the_program_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        name, context = "broken", 8

        @property
        def tokenizer(self) -> Any:
            raise KeyError("a bug")

    app = application(Answers(cast(Any, Broken())))
    with TestClient(app, raise_server_exceptions=False) as client:
        reply = client.post("/v1/completions", json={"prompt": "x"})
    assert reply.status_code == 500
    assert reply.json()["error"]["type"] == "server_error"
    assert "KeyError: 'a bug'" in caplog.text


def test_a_body_that_is_no_json_is_an_error(server: str) -> None:
    reply = httpx2.post(f"{server}/v1/completions", content=b"{", timeout=60)
    assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")


def test_a_client_that_leaves_frees_its_slot(server: str, client: Any) -> None:
    name = model_of(client)
    for _ in range(8):
        stream = client.chat.completions.create(
            model=name, messages=MESSAGES, max_tokens=400, stream=True, temperature=0
        )
        next(iter(stream))
        stream.close()
    reply = client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=2, timeout=30)
    assert reply.choices[0].finish_reason in ("length", "stop")


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings_of(artifact: str, folder: Path, **changes: Any) -> GenerateSettings:
    rows = [{"prompt": f"Say {n}.", "tag": n} for n in range(5)]
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    given: dict[str, Any] = {
        "prompts": str(prompts),
        "output": str(folder / "answers.jsonl"),
        "max_tokens": 6,
        "samples": 2,
        "work_dir": str(folder / "work"),
        "engine": FP32,
    }
    return GenerateSettings(artifact, **{**given, **changes})


def test_a_file_is_answered_and_resumed(artifact: str, tmp_path: Path) -> None:
    settings = settings_of(artifact, tmp_path)
    found = generate(settings)
    rows = rows_of(Path(settings.output))
    assert [row["tag"] for row in rows] == list(range(5))
    assert all(len(row["responses"]) == 2 for row in rows)
    tokens = [r["token_ids"] for row in rows for r in row["responses"]]
    assert found["tokens"] == sum(map(len, tokens))
    assert all(len(r["logprobs"]) == len(r["token_ids"]) for row in rows for r in row["responses"])
    with pytest.raises(RecipeError, match=r"output.* exists"):
        generate(settings)
    # A killed job has left some answers, and half of a line.
    other = settings_of(artifact, tmp_path, output=str(tmp_path / "again.jsonl"))
    folder = Path(f"{other.output}.progress")
    before = settings_of(artifact, tmp_path, output=other.output, max_tokens=5)
    kept = {"row": 1, "sample": 1, "response": {"token_ids": [1, 2], "content": "kept"}}
    folder.mkdir()
    (folder / "rank_0.jsonl").write_text(json.dumps(kept) + '\n{"row": 0, "sam', encoding="utf-8")
    generate(other)
    again = rows_of(Path(other.output))
    assert again[1]["responses"][1] == kept["response"]
    again[1]["responses"][1] = rows[1]["responses"][1]
    assert again == rows, "the other answers do not depend on what is answered again"
    assert not folder.exists()
    Path(other.output).unlink()
    folder.mkdir()
    (folder / "settings.json").write_text('{"max_tokens": 6}', encoding="utf-8")
    with pytest.raises(DataError, match=r"another .*max_tokens.*delete the folder"):
        generate(before)


def test_bad_rows_are_named(artifact: str, tmp_path: Path) -> None:
    settings = settings_of(artifact, tmp_path)
    Path(settings.prompts).write_text('{"prompt": "x"}\n{"other": 1}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"prompts.jsonl:2: neither 'messages' nor 'prompt'"):
        generate(settings)
    Path(settings.prompts).write_text('{"prompt": "x"}\n{"prompt": "y"\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"prompts.jsonl:2: not JSON"):
        generate(settings)


def ranks_generate(artifact: str, folder: str) -> None:
    from dataclasses import replace

    from nemocascade.recipe import ParallelConfig

    settings = settings_of(artifact, Path(folder))
    generate(settings)
    generate(replace(settings, output=f"{folder}/tp.jsonl", parallel=ParallelConfig(tp=2)))


def test_every_layout_gives_the_same_answers(artifact: str, tmp_path: Path) -> None:
    run_ranks(ranks_generate, 2, {"artifact": artifact, "folder": str(tmp_path)})
    alone = tmp_path / "alone"
    alone.mkdir()
    settings = settings_of(artifact, alone)
    generate(settings)
    whole = rows_of(Path(settings.output))
    for name in ("answers", "tp"):
        rows = rows_of(tmp_path / f"{name}.jsonl")
        ids = [[r["token_ids"] for r in row["responses"]] for row in rows]
        assert ids == [[r["token_ids"] for r in row["responses"]] for row in whole], name


def test_a_hugging_face_folder_is_imported_once(artifact: str, tmp_path: Path) -> None:
    from nemocascade.data.serving import serving_of
    from nemocascade.megatron.artifact import read_artifact
    from nemocascade.megatron.convert import Serving

    folder = tmp_path / "published"
    serving = Serving(*serving_of(read_artifact(Path(artifact))))
    export_huggingface(Path(artifact), folder, serving=serving)
    ids = []
    for name in (artifact, str(folder), str(folder)):
        with open_model(ModelSettings(name, work_dir=str(tmp_path / "w"), engine=FP32)) as model:
            ids.append(model.tokenizer.prompt_ids(model_turns(), thinking=True))
    assert ids[0] == ids[1] == ids[2]
    assert len(list((tmp_path / "w").glob("imported-*"))) == 1


def model_turns() -> list[Any]:
    from nemocascade.types import Message

    return [Message("user", "x")]


def test_a_chat_remembers_its_turns(artifact: str, tmp_path: Path) -> None:
    shown: list[str] = []
    # Bytes that are not UTF-8 come as halves of surrogate pairs.
    said = ["Say one.", "/thinking", "Say \udcff two.", "/nonsense", "/reset", "/task", "/exit"]
    lines = iter(said)
    settings = ChatSettings(
        artifact, max_tokens=6, seed=3, work_dir=str(tmp_path), engine=FP32, system="Be brief."
    )
    with open_model(settings) as model:
        talk = Talk(model, settings, write=shown.append)
        asked: list[int] = []
        run = model.engine.run

        def counting(requests: Any, *rest: Any, **named: Any) -> Any:
            asked.append(len(requests[0].prompt))
            return run(requests, *rest, **named)

        model.engine.run = counting  # type: ignore[method-assign]
        talk.run(lambda _: next(lines))
    assert len(asked) == 2
    assert asked[1] > asked[0]
    text = "".join(shown)
    assert "[cut at 6 tokens: --max-tokens]" in text
    assert "/nonsense is not a command" in text
    assert "no task: start with --domain NAME" in text


@pytest.fixture
def environments() -> Iterator[dict[str, Domain]]:
    found = make_environments()
    yield found
    close_environments(found)


def test_a_context_beyond_memory_is_rejected_before_it_is_served(
    artifact: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ServeSettings(
        artifact, port=0, context=1 << 20, kv_gib=0.01, work_dir=str(tmp_path), engine=FP32
    )
    with pytest.raises(CapacityError, match=r"set kv_gib to .* or context"):
        serve(settings)
    assert "http://" not in caplog.text


def test_a_task_beyond_the_context_is_rejected(
    artifact: str, environments: dict[str, Domain], tmp_path: Path
) -> None:
    shown: list[str] = []
    settings = ChatSettings(artifact, context=8, work_dir=str(tmp_path), engine=FP32)
    with open_model(settings) as model:
        talk = Talk(model, settings, environments["math"], write=shown.append)
        lines = iter(["/task", "/exit"])
        talk.run(lambda _: next(lines))
    assert "and the context 8" in "".join(shown)


def test_a_task_of_a_domain_is_asked_and_scored(
    artifact: str, environments: dict[str, Domain], tmp_path: Path
) -> None:
    shown: list[str] = []
    settings = ChatSettings(artifact, max_tokens=4, work_dir=str(tmp_path), engine=FP32)
    with open_model(settings) as model:
        talk = Talk(model, settings, environments["tool_calling"], write=shown.append)
        talk.task()
        talk.close()
    text = "".join(shown)
    assert "[user] " in text
    assert "reward 0" in text
