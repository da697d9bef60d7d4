"""The engine on a server, against a loopback server that implements the protocol."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from nemocascade.rollout.engine import Completion, Request, Sampling
from nemocascade.rollout.openai import OpenAIEngine, ServerError


class Handler(BaseHTTPRequestHandler):
    """Each token is the sum of the last two and the seed's parity, modulo 50."""

    server: Any

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        if self.server.failures:
            self.reply(self.server.failures.pop(0), {"error": "overloaded"})
        elif self.path != "/v1/completions":
            self.reply(200, {"success": True})
        else:
            self.reply(200, {"choices": [self.choice(body)]})

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = list(body["prompt"])
        start = len(ids)
        finish = "length"
        while len(ids) - start < body["max_tokens"]:
            ids.append((sum(ids[-2:]) + 1) % 50)
            if ids[-1] in body.get("stop_token_ids", ()):
                finish = "stop"
                break
        written = ids[start:]
        found: dict[str, Any] = {"text": "", "finish_reason": finish, "index": 0}
        if "logprobs" in body:
            names = [f"token_id:{i}" for i in written]
            found["logprobs"] = {"tokens": names, "token_logprobs": [-0.1 * i for i in written]}
        if self.server.form == "ids":
            found["token_ids"] = written
        elif self.server.form == "text":
            found["logprobs"]["tokens"] = ["a"] * len(written)
        elif self.server.form == "short":
            found["logprobs"]["token_logprobs"].pop()
        return found

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def server() -> Iterator[Any]:
    found: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found.seen, found.failures, found.form = [], [], "names"
    found.url = f"http://127.0.0.1:{found.server_port}"
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield found
    found.shutdown()
    found.server_close()


def continued(prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        ids.append((sum(ids[-2:]) + 1) % 50)
    return ids


@pytest.mark.parametrize("form", ["names", "ids"])
def test_ids_and_logprobs(server: Any, form: str) -> None:
    server.form = form
    requests = [Request(i, (i, i + 1)) for i in range(20)]
    engine = OpenAIEngine(server.url + "/", "policy", concurrency=7, api_key="k")
    found = {c.request.id: c for c in engine.run(requests, Sampling(max_tokens=6, top_k=5))}
    assert sorted(found) == list(range(20))
    for i, c in found.items():
        assert c.tokens.tolist() == continued([i, i + 1], 6)
        assert c.written.tolist() == [False] * 2 + [True] * 6
        assert torch.allclose(c.logprob[2:], -0.1 * c.tokens[2:].float())
        assert c.finish == "length"
    path, body, key = server.seen[0]
    assert (path, key) == ("/v1/completions", "Bearer k")
    assert (body["model"], body["temperature"], body["top_k"]) == ("policy", 1.0, 5)
    assert len({b["seed"] for _, b, _ in server.seen}) == 20


def test_stops_and_environments(server: Any) -> None:
    """A stopped text goes on with what the environment adds; its tokens are not the model's."""
    stop = Sampling(max_tokens=60, stop_tokens=tuple((t,) for t in range(0, 50, 7)))
    engine = OpenAIEngine(server.url, "policy")

    def respond(c: Completion) -> list[int] | None:
        return [40, 41, 42] if c.turns < 3 else None

    [c] = engine.run([Request(1, (3, 5))], stop, respond)
    assert c.turns == 3
    assert c.finish == "stop"
    at = [i for i, t in enumerate(c.tokens.tolist()) if not c.written[i]]
    assert c.tokens[at].tolist() == [3, 5, 40, 41, 42, 40, 41, 42]
    assert not c.logprob[at].any()
    assert int(c.tokens[-1]) % 7 == 0
    assert c.last_turn() == c.tokens[at[-1] + 1 :].tolist()
    [c] = engine.run([Request(1, (3, 5))], stop, lambda c: [1] * 70)
    assert c.finish == "length"
    assert c.turns == 1


def test_a_failing_server(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemocascade.rollout.openai._FIRST_WAIT_S", 0.001)
    engine, request = OpenAIEngine(server.url, "policy"), Request(4, (1, 2))
    server.failures = [503, 500]
    [c] = engine.run([request], Sampling(max_tokens=2))
    assert len(c.response) == 2
    assert len(server.seen) == 3
    server.failures = [400]
    with pytest.raises(ServerError, match=r"status 400.*overloaded"):
        list(engine.run([request], Sampling(max_tokens=2)))
    server.failures = [500] * 4
    with pytest.raises(ServerError, match="status 500"):
        list(engine.run([request], Sampling(max_tokens=2)))
    for form, message in (("text", "named 'a'"), ("short", "2 tokens and 1 log-prob")):
        server.form = form
        with pytest.raises(ServerError, match=message):
            list(engine.run([request], Sampling(max_tokens=2)))
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    gone = OpenAIEngine(f"http://127.0.0.1:{free.getsockname()[1]}", "policy")
    with pytest.raises(ServerError, match="refused"):
        list(gone.run([request], Sampling()))


def test_settings_that_no_server_knows(server: Any) -> None:
    engine = OpenAIEngine(server.url, "policy")
    with pytest.raises(ValueError, match="sequences of tokens"):
        engine.run([], Sampling(stop_tokens=((1, 2),)))
    with pytest.raises(ValueError, match=r"temperature\(0.8\).*at_temperature"):
        engine.run([], Sampling(temperature=0.8))
    assert not list(
        OpenAIEngine(server.url, "m", at_temperature=True).run([], Sampling(temperature=0.8))
    )


def test_weights_are_handed_over_as_a_folder(server: Any, tmp_path: Path) -> None:
    written: list[Path] = []

    def export() -> Path:
        folder = tmp_path / f"step_{len(written)}"
        folder.mkdir()
        written.append(folder)
        return folder

    engine = OpenAIEngine(server.url, "policy", weights=export)
    for _ in range(2):
        list(engine.run([Request(1, (1, 2))], Sampling(max_tokens=1)))
    paths = [(path, body.get("model_path")) for path, body, _ in server.seen]
    assert paths[0] == ("/update_weights_from_disk", str(written[0]))
    assert paths[2] == ("/update_weights_from_disk", str(written[1]))
    assert paths[1][0] == paths[3][0] == "/v1/completions"


@pytest.mark.slow
def test_transformers_serve(tmp_path: Path) -> None:
    """A real server with a tiny checkpoint: its greedy text is that of `generate`."""
    transformers = pytest.importorskip("transformers")
    for package in ("fastapi", "uvicorn", "accelerate"):
        pytest.importorskip(package)
    folder = write_checkpoint(tmp_path / "tiny", transformers)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            wait_for(f"http://127.0.0.1:{port}/v1/models", process)
            codec = WordCodec(folder)
            engine = OpenAIEngine(
                f"http://127.0.0.1:{port}", str(folder), codec=codec, logprobs=False
            )
            request = Request(1, tuple(codec.encode("w3 w5 w7")))
            [c] = engine.run([request], Sampling(temperature=0, max_tokens=6))
        finally:
            process.kill()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = model.generate(
        torch.tensor([request.prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert c.tokens.tolist() == expected[0].tolist()
    assert c.logprob[c.written].isnan().all()


class WordCodec:
    """Words, by the checkpoint's tokenizer."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Any, *, skip_special: bool = False) -> str:
        text: str = self._tokenizer.decode(list(ids))
        return text


def write_checkpoint(folder: Path, transformers: Any) -> Path:
    """A tiny random model with a tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", eos_token="w0", pad_token="w0"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def wait_for(url: str, process: Any) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except urllib.error.HTTPError:
            return  # it answers, if only that it cannot
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not answer")
