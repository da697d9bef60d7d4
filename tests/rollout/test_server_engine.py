"""The engine on servers, against loopback servers with vLLM's API that fail on demand."""

from __future__ import annotations

import base64
import json
import math
import socket
import stat
import threading
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.fake_server import VOCABULARY, FakeServer, continued, fake_server, logprobs

from nemocascade.recipe import ModelConfig, RolloutConfig, RolloutServerConfig
from nemocascade.rollout.completions import BadReplyError, drawn_ids, read_answer
from nemocascade.rollout.engine import Completion, Request, RequestList, Sampling, Supply
from nemocascade.rollout.flight import Flight, request_name
from nemocascade.rollout.server import ServerEngine
from nemocascade.rollout.servers import ServerError, ServerPool
from nemocascade.rollout.weight_updates import WeightUpdates
from nemocascade.runtime.http import announced_servers
from nemocascade.runtime.stopping import STOP, StopAsked, StopRequest
from nemocascade.runtime.watchdog import Watchdog
from nemocascade_vllm.serve import announce, announcement

SHORT = Sampling(max_tokens=6)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with fake_server() as found:
        yield found


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemocascade.rollout.server._FIRST_WAIT_S", 0.001)


def engine_of(
    *servers: FakeServer, routing: ModelConfig | None = None, **more: Any
) -> ServerEngine:
    fields: dict[str, Any] = {"urls": tuple(s.url for s in servers), "wait_s": 2.0} | more
    settings = RolloutServerConfig(**fields)
    return ServerEngine(settings, vocabulary=VOCABULARY, routing=routing)


def check(found: list[Completion], count: int, length: int = 6) -> None:
    """Every text is what the model's formula gives."""
    assert sorted(c.request.id for c in found) == list(range(count))
    for c in found:
        prompt = list(c.request.prompt)
        assert c.tokens.tolist() == continued(prompt, length)
        assert c.written.tolist() == [False] * len(prompt) + [True] * length
        expected = logprobs(c.tokens, len(prompt))
        assert torch.allclose(c.logprob[len(prompt) :], expected)
        assert c.finish == "length"


def requests(count: int) -> list[Request]:
    return [Request(i, (i % 40, i % 40 + 1)) for i in range(count)]


@pytest.mark.parametrize("form", ["", "names"])
def test_ids_and_logprobs(server: FakeServer, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fault = form
    monkeypatch.setenv("POLICY_KEY", "k")
    engine = engine_of(server, concurrency=7, api_key_env="POLICY_KEY")
    check(list(engine.run(requests(20), replace(SHORT, top_k=5))), 20)
    path, body, key = next(s for s in server.seen if s[0] == "/v1/completions")
    assert key == "Bearer k"
    assert (body["model"], body["temperature"], body["top_k"]) == ("policy", 1.0, 5)
    assert len({b["seed"] for p, b, _ in server.seen if p == path}) == 20
    assert server.most_busy <= 7


def test_stops_and_environments(server: FakeServer) -> None:
    """A stopped text continues with what the environment adds; its tokens are not the model's."""
    stop = Sampling(max_tokens=60, stop_tokens=tuple((t,) for t in range(0, 50, 7)))
    engine = engine_of(server)

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


FAULTS = {
    "500": "status_500",
    "429": "status_429",
    "drop": "connection",
    "nonsense": "nonsense",
    "text": "nonsense",
    "wrong_ids": "nonsense",
    "no_logprobs": "nonsense",
    "short": "nonsense",
    "nan": "nonsense",
    "finish": "nonsense",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_counted_and_no_wrong_text_comes_back(server: FakeServer, fault: str) -> None:
    with fake_server() as other:
        server.faults = [fault]
        engine = engine_of(server, other, concurrency=1)
        check(list(engine.run(requests(4), SHORT)), 4)
        assert engine.pool.counts[FAULTS[fault]] == 1
        # A broken connection may be that of a server that is gone.
        assert engine.pool.counts["lost"] == (fault == "drop")
        assert engine.metrics()[f"server_{FAULTS[fault]}"] == 1


@pytest.mark.parametrize("fault", ["500", "nonsense", "nan"])
def test_a_text_that_always_fails_is_dropped(server: FakeServer, fault: str) -> None:
    server.faults = [fault] * 2
    [c] = engine_of(server, retries=1).run([Request(4, (1, 2))], SHORT)
    assert (c.finish, c.response) == ("abort", [])
    server.fault = fault
    engine = engine_of(server, retries=9)
    with pytest.raises(ServerError, match="all 1 rollout servers are lost"):
        list(engine.run([Request(4, (1, 2))], SHORT))


def test_an_aborted_text_goes_on_from_its_ids(server: FakeServer) -> None:
    with fake_server() as other:
        server.faults, other.faults = ["abort"], ["abort"]
        engine = engine_of(server, other, concurrency=1)
        check(list(engine.run(requests(1), SHORT)), 1)
        assert engine.pool.counts["aborted"] == 2
        prompts = [b["prompt"] for s in (server, other) for p, b, _ in s.seen if "comp" in p]
        # 3 of 6 tokens, then 1 of 3, then the rest.
        assert sorted(map(len, prompts)) == [2, 5, 6]
    server.fault = "abort"
    [c] = engine_of(server, retries=2).run([Request(1, (3, 5))], Sampling(max_tokens=400))
    assert c.finish == "abort"
    assert c.tokens.tolist() == continued([3, 5], len(c.response))


def test_requests_go_to_the_least_loaded_server(server: FakeServer) -> None:
    with fake_server() as other:
        engine = engine_of(server, other, concurrency=8)
        check(list(engine.run(requests(40), SHORT)), 40)
        counts = [s.paths.count("/v1/completions") for s in (server, other)]
        assert sum(counts) == 40
        assert min(counts) >= 10


def test_a_lost_server_is_excluded(server: FakeServer) -> None:
    with fake_server() as other:
        engine = engine_of(server, other, concurrency=4)
        check(list(engine.run(requests(4), SHORT)), 4)
        other.shutdown()
        other.server_close()
        check(list(engine.run(requests(20), SHORT)), 20)
        assert engine.pool.counts["lost"] == 1
        server.shutdown()
        server.server_close()
        with pytest.raises(ServerError, match=r"all 2 rollout servers are lost: http.*refused"):
            list(engine.run(requests(20), SHORT))


def test_a_slow_server_costs_one_timeout(server: FakeServer) -> None:
    server.fault = "slow"
    with fake_server() as other:
        engine = engine_of(server, other, timeout_s=1.5)
        started = time.monotonic()
        check(list(engine.run(requests(12), SHORT)), 12)
        assert time.monotonic() - started < 25
        assert engine.pool.counts["timeout"] >= 1


def test_a_rejected_request_names_the_server(server: FakeServer) -> None:
    server.faults = ["400"]
    with pytest.raises(ServerError, match=r"127.0.0.1:\d+ rejects the request.*status 400"):
        list(engine_of(server).run(requests(1), SHORT))


def test_nobody_waits_for_texts_that_are_not_wanted(server: FakeServer) -> None:
    """A failed respond, or a loop that ends early, cuts off what is under way."""
    server.faults = [""]
    server.fault = "slow"
    started = time.monotonic()
    # More requests than may run at once: some are cancelled before they begin.
    found = engine_of(server, concurrency=3).run(requests(8), SHORT)
    assert next(found).finish == "length"
    found.close()  # type: ignore[attr-defined]
    stop = Sampling(max_tokens=60, stop_tokens=tuple((t,) for t in range(50)))

    def fails(_: Completion) -> list[int] | None:
        raise OSError("a tool died")

    # A server of its own: a request of the loop above may still be on its way to the first.
    with fake_server() as other:
        other.faults, other.fault = [""], "slow"
        with pytest.raises(OSError, match="a tool died"):
            list(engine_of(other).run(requests(8), stop, fails))
    assert time.monotonic() - started < 25


class Cancelling(RequestList):
    """Cancels all requests but one once that one has been answered.

    free_slots: the number given to the first poll.
    """

    def __init__(self, requests: list[Request], server: FakeServer) -> None:
        super().__init__(requests)
        self.left, self.server, self.free_slots, self.polls = list(self.requests), server, 0, 0

    def poll(self, free_slots: int, busy: int) -> Supply:
        self.polls += 1
        self.free_slots = self.free_slots or free_slots
        taken, self.left = self.left[:free_slots], self.left[free_slots:]
        # The first is answered, the second is in flight, and the third has not been sent.
        done = self.polls > 3 and len(self.server.seen) > 2
        return Supply(taken, list(self.requests)[1:] if done else (), not done)


def test_cancelled_requests_are_cut_off(server: FakeServer) -> None:
    server.faults, server.fault = [""], "slow"
    started = time.monotonic()
    work = Cancelling(requests(3), server)
    engine = engine_of(server, concurrency=2)
    check(list(engine.run(work, SHORT)), 1)
    assert work.free_slots == 2
    assert time.monotonic() - started < 25
    # The engine and its connections still work.
    server.fault = ""
    check(list(engine.run(requests(3), SHORT)), 3)


def test_a_request_that_is_sent_while_it_is_cancelled_is_cut_off_later() -> None:
    class Pool:
        sent = threading.Event()
        cut_off = threading.Event()

        def cancel(self, names: Collection[str] | None = None) -> None:
            if self.sent.is_set() and names == {request_name(7)}:
                self.cut_off.set()

    pool = Pool()
    flight = Flight(cast(ServerPool, pool), 1)

    def complete(stop: threading.Event) -> Completion:
        begun.set()
        stop.wait(10)
        late.wait(10)
        pool.sent.set()
        assert pool.cut_off.wait(10), "nobody cut it off"
        return cast(Completion, None)

    begun, late = threading.Event(), threading.Event()
    flight.ask(7, complete)
    assert begun.wait(10)
    flight.cancel({7})
    late.set()
    assert pool.sent.wait(10)
    assert flight.take([]) == []
    assert pool.cut_off.is_set()
    flight.close()


def test_each_request_has_its_own_settings(server: FakeServer) -> None:
    mixed = [Request(0, (1, 2)), Request(1, (1, 2), Sampling(max_tokens=3))]
    found = {c.request.id: len(c.response) for c in engine_of(server).run(mixed, SHORT)}
    assert found == {0: 6, 1: 3}


def test_servers_that_cannot_be_used(server: FakeServer, tmp_path: Path) -> None:
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ServerError, match=rf"0 of 1 .*wait_s\(2\).*{url}.*refused"):
        engine_of(urls=(url,)).run(requests(1), SHORT)
    with pytest.raises(ServerError, match="none is announced in"):
        engine_of(urls=(), announce=str(tmp_path), wait_s=0.1).run(requests(1), SHORT)
    with pytest.raises(ServerError, match=r"serves 'policy', and rollout.server.model is 'other'"):
        engine_of(server, model="other").run(requests(1), SHORT)
    with pytest.raises(ServerError, match=r"api_key_env\(NO_SUCH_KEY\) is not set"):
        engine_of(server, api_key_env="NO_SUCH_KEY")
    with pytest.raises(ValueError, match="sequences of tokens"):
        engine_of(server).run([], Sampling(stop_tokens=((1, 2),)))


@pytest.mark.parametrize("is_main", [True, False])
def test_a_stop_ends_the_wait_for_servers(is_main: bool, tmp_path: Path) -> None:
    """A weight update waits for servers on the main rank; all ranks leave."""
    (tmp_path / STOP).touch()
    shared: list[Any] = []

    def broadcast(box: Any) -> Any:
        shared.append(box)
        return box if is_main else (None, "", True)

    world = SimpleNamespace(
        is_main=is_main,
        broadcast_object=broadcast,
        watch=Watchdog(),
        stop=StopRequest(tmp_path),
    )
    settings = RolloutServerConfig(urls=("http://127.0.0.1:9",), wait_s=30.0)
    none: Any = None
    updates = WeightUpdates(
        cast(Any, world),
        settings,
        none,
        none,
        sampling=SHORT,
        vocabulary=VOCABULARY,
        model_vocabulary=VOCABULARY,
        longest=10,
        alarm=0.1,
    )
    start = time.monotonic()
    with pytest.raises(StopAsked):
        updates.update(ServerPool(settings))
    assert time.monotonic() - start < 25
    assert shared == [(None, "", is_main)]


def test_announced_servers(server: FakeServer, tmp_path: Path) -> None:
    folder = tmp_path / "servers"
    assert announced_servers(folder) == {}
    file = announcement(folder, server.url)
    announce(file, server.url, "secret")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    for name, text in {"a": "{", "b": "[]", "c": '{"url": "nowhere"}', "d": '{"url": 3}'}.items():
        (folder / f"{name}.json").write_text(text)
    assert announced_servers(folder) == {server.url: "secret"}
    engine = engine_of(urls=(), announce=str(folder))
    check(list(engine.run(requests(3), SHORT)), 3)
    assert {key for path, _, key in server.seen if "completions" in path} == {"Bearer secret"}
    file.unlink()
    assert ServerPool(RolloutServerConfig(announce=str(folder))).named() == {}


def test_routing_of_the_server(server: FakeServer) -> None:
    shape = ModelConfig(pattern="ME*E", num_experts=4, experts_per_token=2)
    with pytest.raises(ServerError, match="enable-return-routed-experts"):
        list(engine_of(server, routing=shape).run(requests(1), SHORT))
    server.layers = 2
    [c] = engine_of(server, routing=shape).run(requests(1), SHORT)
    assert c.routing is not None
    assert list(c.routing.shape) == [7, 2, 2]
    assert c.routing.flatten().tolist() == [i % 4 for i in range(28)]
    server.layers = 3
    [c] = engine_of(server, routing=shape, retries=1).run(requests(1), SHORT)
    assert c.finish == "abort"


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"server": {}}, "no server is named"),
        ({"server": {"urls": ("ftp://x",)}}, "must be http://host:port"),
        ({"server": {"urls": ("http://x:1",), "api": "sglang"}}, "weights disk for sglang"),
        ({"temperature": 0.8}, "--logprobs-mode processed_logprobs"),
        ({"top_p": 0.9}, "truncated_logprobs False, or top_p 1 and top_k 0"),
        (
            {"server": {"logprobs": "processed"}, "top_k": 9, "truncated_logprobs": False},
            "truncated_logprobs True",
        ),
    ],
)
def test_settings_that_no_server_can_follow(changes: dict[str, Any], problem: str) -> None:
    server = {"urls": ("http://127.0.0.1:1",), **changes.get("server", {})}
    if changes.get("server") == {}:
        server = {}
    settings = RolloutConfig(
        **{**changes, "engine": "server", "server": RolloutServerConfig(**server)}
    )
    found = settings.problems()
    assert len(found) == 1
    assert problem in found[0]
    assert not replace(settings, engine="live").problems()


def test_ids_that_the_tokenizer_lacks_are_not_drawn(server: FakeServer) -> None:
    assert drawn_ids(50, 50) == {}
    assert drawn_ids(50, 52) == {"logit_bias": {"50": -100, "51": -100}}
    assert drawn_ids(3, 7) == {"allowed_token_ids": [0, 1, 2]}
    settings = RolloutServerConfig(urls=(server.url,))
    engine = ServerEngine(settings, vocabulary=VOCABULARY, model_vocabulary=200)
    check(list(engine.run(requests(1), SHORT)), 1)
    bodies = [body for path, body, _ in server.seen if path == "/v1/completions"]
    assert bodies[0]["allowed_token_ids"] == list(range(VOCABULARY))


def test_a_reply_is_json_or_nothing(server: FakeServer) -> None:
    """Replies of any form are nonsense or an answer, never another error."""
    whole = {
        "choices": [
            {"token_ids": [1], "finish_reason": "stop", "logprobs": {"token_logprobs": [-1.0]}}
        ]
    }
    assert read_answer(json.dumps(whole).encode(), [3], 4, SHORT, 9).ids == [1]
    choice: dict[str, Any] = whole["choices"][0]
    header = b"{'descr': '<i8', 'fortran_order': False, 'shape': (10000000000000, 9, 9), }"
    huge = b"\x93NUMPY\x01\x00v\x00" + header.ljust(117) + b"\n"
    torn = b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '|u1', 'shape".ljust(117) + b"\n"
    changes: list[dict[str, Any]] = [
        {"token_ids": [1.5e300]}, {"token_ids": "ab"}, {"token_ids": {}}, {"token_ids": [-1]},
        {"token_ids": [9]}, {"token_ids": []}, {"token_ids": [1] * 5}, {"finish_reason": []},
        {"finish_reason": None}, {"logprobs": 3}, {"logprobs": {"token_logprobs": [None]}},
        {"logprobs": {"token_logprobs": [0.5]}}, {"prompt_token_ids": [4]},
        {"routed_experts": "!"}, {"routed_experts": 3}, {"token_ids": [math.inf]},
        {"logprobs": {"token_logprobs": [10**400]}},
        {"routed_experts": base64.b64encode(b"PK\x05\x06" + bytes(18)).decode()},
        {"routed_experts": base64.b64encode(huge).decode()},
        {"routed_experts": base64.b64encode(torn).decode()},
    ]  # fmt: skip
    broken = [b"", b"[", b"[]", b"null", b'{"choices": []}', b"[" * 100_000, b"\xff"]
    broken += [
        json.dumps({"choices": [c]}).encode() for c in ({}, *({**choice, **d} for d in changes))
    ]
    for reply in broken:
        with pytest.raises(BadReplyError):
            read_answer(reply, [3], 4, SHORT, 9)
