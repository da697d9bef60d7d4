"""The engine on live weights: batching, shared prefill, stops, lengths, environments."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping, Sequence

import pytest
import torch
from helpers.rollout import ODD, draw_tokens, full_logits, make_model

from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import CascadeModel
from nemocascade.megatron.replay import RouteRecorder
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig
from nemocascade.rollout.engine import Completion, Request, RequestList, Sampling, Supply
from nemocascade.rollout.live import LiveEngine
from nemocascade.rollout.replies import RespondError
from nemocascade.runtime.world import World
from nemocascade.types import Document, pack_documents

VOCABULARY = ODD.vocab_size


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def chunks(world: World) -> list[CascadeModel]:
    return make_model(world, ODD)


def make_requests(prompts: int, rollouts: int) -> list[Request]:
    """Prompts of different lengths, each continued `rollouts` times."""
    return [
        Request(p * rollouts + g, tuple(draw_tokens(VOCABULARY, 3 + 7 * p, seed=p).tolist()))
        for p in range(prompts)
        for g in range(rollouts)
    ]


def copies(request: Request, count: int) -> list[Request]:
    """Requests with one prompt."""
    return [Request(i, request.prompt) for i in range(count)]


def texts(found: Sequence[Completion]) -> dict[int, list[int]]:
    return {c.request.id: c.response for c in found}


def test_greedy_tokens_are_the_most_probable(world: World, chunks: list[CascadeModel]) -> None:
    engine = LiveEngine(world, chunks, slots=3)
    sampling = Sampling(temperature=0.0, max_tokens=9)
    found = list(engine.run(make_requests(5, 1), sampling))
    assert sorted(c.request.id for c in found) == list(range(5))
    for c in found:
        logits = full_logits(chunks, c.tokens)
        start = len(c.request.prompt)
        assert c.response == logits[start - 1 : -1].argmax(1).tolist()
        assert c.finish == "length"
        assert len(c.response) == 9
        assert c.written.tolist() == [i >= start for i in range(len(c.tokens))]


def test_no_room_is_made_beyond_the_longest_text(world: World, chunks: list[CascadeModel]) -> None:
    """The pool holds what all texts need at their largest length, and a stored prompt."""
    engine = LiveEngine(world, chunks, slots=2)
    (prompt, *_) = make_requests(1, 1)
    for most, requests in ((20, 1), (300, 1), (300, 5)):
        list(engine.run(copies(prompt, requests), Sampling(temperature=0.0, max_tokens=most)))
        assert engine._model is not None
        needed = -(-(len(prompt.prompt) + most) // 16) * min(2, requests)
        assert engine._model.table.blocks == needed + 1


def test_logprobs_are_of_the_untruncated_distribution(
    world: World, chunks: list[CascadeModel]
) -> None:
    engine = LiveEngine(world, chunks, slots=4)
    sampling = Sampling(temperature=0.7, top_k=20, top_p=0.8, max_tokens=12)
    for c in engine.run(make_requests(4, 2), sampling):
        start = len(c.request.prompt)
        logprobs = (full_logits(chunks, c.tokens) / 0.7).log_softmax(1)[start - 1 : -1]
        expected = logprobs.gather(1, c.tokens[start:, None]).squeeze(1)
        assert float((c.logprob[start:] - expected).abs().max()) < 1e-4
        assert not c.logprob[:start].any()


def test_logprobs_of_the_truncated_distribution(world: World, chunks: list[CascadeModel]) -> None:
    """Those of the softmax over the tokens that top-k and top-p leave."""
    engine = LiveEngine(world, chunks, slots=4)
    sampling = Sampling(0.7, 20, 0.8, truncated_logprobs=True, max_tokens=12)
    for c in engine.run(make_requests(4, 2), sampling):
        start = len(c.request.prompt)
        logits = full_logits(chunks, c.tokens)[start - 1 : -1] / 0.7
        for row, token, found in zip(
            logits, c.tokens[start:].tolist(), c.logprob[start:], strict=True
        ):
            ranked, order = row.softmax(0).sort(descending=True)
            ranked = ranked[:20] / ranked[:20].sum()
            count = int((ranked.cumsum(0) - ranked < 0.8).sum())
            kept = order[:count].tolist()
            assert token in kept
            expected = float(row[token] - row[kept].logsumexp(0))
            assert float(found) == pytest.approx(expected, abs=1e-4)


def test_tokens_do_not_depend_on_the_batch(world: World, chunks: list[CascadeModel]) -> None:
    """Other numbers of slots, other orders, other company: the same bits."""
    requests = make_requests(6, 3)
    sampling = Sampling(max_tokens=15, seed=4, stop_tokens=tuple((t,) for t in range(8)))
    first = list(LiveEngine(world, chunks, slots=18).run(requests, sampling))
    assert len({tuple(t) for t in texts(first).values()}) == len(requests)
    lengths = {len(c.response) for c in first}
    assert len(lengths) > 2, "no text stopped early"
    of = {c.request.id: c for c in first}
    shuffled = random.Random(1).sample(requests, len(requests))
    for slots, order in ((1, requests), (5, requests), (7, shuffled), (40, shuffled[:4])):
        engine = LiveEngine(world, chunks, slots=slots)
        found = list(engine.run(order, sampling))
        assert len(found) == len(order)
        for c in found:
            same = of[c.request.id]
            assert torch.equal(c.tokens, same.tokens), (slots, c.request.id)
            assert torch.equal(c.logprob, same.logprob), (slots, c.request.id)
            assert c.finish == same.finish
    other = LiveEngine(world, chunks, slots=18).run(requests, Sampling(max_tokens=15, seed=5))
    assert texts(list(other)) != texts(first)


def test_a_prompt_is_read_once(world: World, chunks: list[CascadeModel]) -> None:
    """However many slots there are for its requests, and slots are refilled at once."""
    requests = make_requests(3, 8)
    sampling = Sampling(max_tokens=6, seed=1)
    expected = texts(list(LiveEngine(world, chunks, slots=24).run(requests, sampling)))
    for slots in (3, 8, 11):
        engine = LiveEngine(world, chunks, slots=slots)
        assert texts(list(engine.run(requests, sampling))) == expected
        assert engine.counts.prefills == 3
        assert engine.counts.prefill_tokens == sum(len(r.prompt) for r in requests[::8])
        assert engine.counts.generated == 24 * 6
        # 5 more steps for each text after its first token, never with an idle slot but at the end.
        assert engine.counts.steps <= -(-24 // slots) * 5 + 5
    together = LiveEngine(world, chunks, slots=24, prefill_tokens=1000)
    found = texts(list(together.run(requests, sampling)))
    assert found == expected


def test_stops(world: World, chunks: list[CascadeModel]) -> None:
    """By a token, by a sequence of tokens, by a string across tokens."""
    [request] = make_requests(1, 1)
    plain = Sampling(max_tokens=20, seed=3)

    def decode(ids: Sequence[int]) -> str:
        return "".join(f"<{i}>" for i in ids)

    engine = LiveEngine(world, chunks, slots=2, decode=decode)
    [whole] = engine.run([request], plain)
    text = whole.response
    at = next(i for i in range(5, 20) if text[i] not in text[:i] and text[i - 1 : i + 1])
    cases = (
        Sampling(max_tokens=20, seed=3, stop_tokens=((text[at],),)),
        Sampling(
            max_tokens=20, seed=3, stop_tokens=((text[at - 1], text[at]), (VOCABULARY - 1,) * 9)
        ),
        Sampling(max_tokens=20, seed=3, stop_strings=(f"{text[at - 1]}><{text[at]}>",)),
    )
    for sampling in cases:
        [c] = engine.run([request], sampling)
        assert c.response == text[: at + 1]
        assert c.finish == "stop"
    with pytest.raises(ValueError, match="not below the vocabulary"):
        list(engine.run([request], Sampling(stop_tokens=((VOCABULARY,),))))
    with pytest.raises(ValueError, match="decode"):
        list(LiveEngine(world, chunks).run([request], Sampling(stop_strings=("x",))))


def test_an_environment_continues_a_text(world: World, chunks: list[CascadeModel]) -> None:
    """Short and long answers, late ones, and none: it continues as if it had been one prompt."""
    stop = tuple((t,) for t in range(0, VOCABULARY, 4))
    sampling = Sampling(max_tokens=60, seed=8, stop_tokens=stop)

    def respond(c: Completion) -> list[int] | None:
        if c.turns == 4:
            return None
        time.sleep(0.002 * (c.request.id % 3))
        return [1 + (c.request.id + i) % VOCABULARY for i in range(3 if c.turns < 3 else 40)]

    engine = LiveEngine(world, chunks, slots=4)
    found = list(engine.run(make_requests(6, 1), sampling, respond))
    assert {c.turns for c in found} >= {3, 4} or {c.turns for c in found} == {4}
    again = list(LiveEngine(world, chunks, slots=1).run(make_requests(6, 1), sampling, respond))
    assert texts(again) == texts(found)
    for c in found:
        logprobs = full_logits(chunks, c.tokens).log_softmax(1)
        expected = logprobs[:-1].gather(1, c.tokens[1:, None]).squeeze(1)
        rows = c.written[1:]
        assert float((c.logprob[1:][rows] - expected[rows]).abs().max()) < 1e-4
        assert not c.logprob[~c.written].any()
        ends = [i for i in range(len(c.tokens) - 1) if c.written[i] and not c.written[i + 1]]
        assert len(ends) == c.turns - 1
        assert all(int(c.tokens[i]) % 4 == 0 for i in ends)
        assert len(c.tokens) <= len(c.request.prompt) + 60
    assert any(not c.written[len(c.request.prompt) :].all() for c in found)


def test_an_environment_that_fails_ends_the_run(world: World, chunks: list[CascadeModel]) -> None:
    def respond(_: Completion) -> list[int]:
        raise KeyError("no such tool")

    sampling = Sampling(max_tokens=50, stop_tokens=tuple((t,) for t in range(0, VOCABULARY, 2)))
    with pytest.raises(RespondError, match="no such tool"):
        list(LiveEngine(world, chunks, slots=2).run(make_requests(3, 1), sampling, respond))


def test_weights_are_live(world: World) -> None:
    """A change of any weight shows in the next run, of the same engine."""
    chunks = make_model(world, ODD, seed=2)
    engine = LiveEngine(world, chunks, slots=2)
    requests, sampling = make_requests(1, 1), Sampling(temperature=0, max_tokens=4)
    [before] = engine.run(requests, sampling)
    for name, value in chunks[0].named_parameters():
        if value.dim() == 1 and "final_norm" not in name and ".norm" not in name:
            old = value.detach().clone()
            with torch.no_grad():
                value.add_(0.3)
            [after] = engine.run(requests, sampling)
            assert not torch.equal(after.logprob, before.logprob), name
            with torch.no_grad():
                value.copy_(old)
    [back] = engine.run(requests, sampling)
    assert torch.equal(back.logprob, before.logprob)


def test_broken_calls(world: World, chunks: list[CascadeModel]) -> None:
    engine = LiveEngine(world, chunks, slots=2)
    request = Request(1, (1, 2))
    with pytest.raises(ValueError, match="one id"):
        engine.run([request, request], Sampling())
    with pytest.raises(ValueError, match="empty prompt"):
        Request(1, ())
    with pytest.raises(ValueError, match=r"temperature\(-1\).*top_p\(0\)"):
        Sampling(temperature=-1, top_p=0)
    broken = make_model(world, ODD, seed=2)
    with torch.no_grad():
        broken[0].lm_head()[3, 5] = float("nan")
    with pytest.raises(FloatingPointError, match="request 1"):
        list(LiveEngine(world, broken).run([request], Sampling(max_tokens=3)))


def test_routing_is_recorded(world: World, chunks: list[CascadeModel]) -> None:
    """The experts of every token that was read: those of the training forward on the same text."""
    stop = tuple((t,) for t in range(0, VOCABULARY, 4))
    engine = LiveEngine(world, chunks, slots=3, record_routing=True)
    found = list(
        engine.run(
            make_requests(2, 4),
            Sampling(max_tokens=30, seed=2, stop_tokens=stop),
            lambda c: None if c.turns > 2 else [5] * (2 if c.turns == 1 else 12),
        )
    )
    assert max(c.turns for c in found) == 3
    agree = total = 0
    for c in found:
        document = Document(c.tokens, torch.ones(len(c.tokens), dtype=torch.bool), "text")
        batch = pack_documents([document], len(c.tokens))
        recorder = RouteRecorder(ODD, len(c.tokens), world.device)
        with torch.no_grad():
            chunks[0](Microbatch.from_batch(batch, world.device, recorder=recorder))
        expected = recorder.gathered(world.groups)[:-1]
        assert c.routing is not None
        assert c.routing.shape == expected.shape
        assert c.routing.dtype == expected.dtype
        agree += int((c.routing == expected).sum())
        total += expected.numel()
    # Experts whose scores are nearly alike may change places.
    assert agree > 0.995 * total
    [plain] = LiveEngine(world, chunks).run(make_requests(1, 1), Sampling(max_tokens=2))
    assert plain.routing is None


class Pieces(RequestList):
    """Requests that are given out a few at a time; some are cancelled at a number of polls."""

    is_ordered = False

    def __init__(self, requests: Sequence[Request], cancelled: Mapping[int, Sequence[int]]) -> None:
        super().__init__(requests)
        self.left, self.cancelled, self.polls = list(self.requests), cancelled, 0
        self.free_slots: list[int] = []

    def poll(self, free_slots: int, busy: int) -> Supply:
        self.polls += 1
        self.free_slots.append(free_slots)
        taken, self.left = self.left[: max(0, free_slots)], self.left[max(0, free_slots) :]
        return Supply(taken, self.cancelled.get(self.polls, ()), bool(self.left) or self.polls < 60)


@pytest.mark.parametrize("environment", [False, True])
@pytest.mark.parametrize("chunk", [0, 6])
def test_cancelled_requests_leave_their_slots_and_change_no_other(
    world: World, chunks: list[CascadeModel], environment: bool, chunk: int
) -> None:
    """At any poll: while they wait, are prefilled, are decoded, or wait for the environment."""

    def respond(c: Completion) -> list[int] | None:
        time.sleep(0.003)
        return None if c.turns > 2 else [c.request.id % 7 + 1] * 9

    requests = make_requests(5, 4)
    stops = tuple((t,) for t in range(0, VOCABULARY, 9))
    sampling = Sampling(max_tokens=30, seed=2, stop_tokens=stops)
    reply = respond if environment else None
    engine = LiveEngine(world, chunks, slots=3, prefill_chunk=chunk, prefill_tokens=64)
    alone = LiveEngine(world, chunks, slots=3, prefill_chunk=chunk)
    expected = texts(list(alone.run(requests, sampling, reply)))
    for first in (1, 2, 3, 5, 9):
        cancelled: dict[int, Sequence[int]] = {
            first: [1, 2, 3],
            first + 2: [5, 6],
            first + 4: [8, 9, 10, 11, 18],
        }
        work = Pieces(requests, cancelled)
        found = texts(list(engine.run(work, sampling, reply)))
        assert found.keys() <= expected.keys()
        assert {n: expected[n] for n in found} == found
        dropped = {n for ids in cancelled.values() for n in ids}
        assert expected.keys() - found.keys() <= dropped
        # Some may have finished before; of the first ones, none that was still waiting.
        assert len(found) < len(expected)
        assert max(work.free_slots) == 3, "every slot is free again"


def test_each_request_is_sampled_by_its_own_settings(
    world: World, chunks: list[CascadeModel]
) -> None:
    """In one run, bit for bit as in runs of their own."""
    stops = tuple((t,) for t in range(0, VOCABULARY, 9))
    ways = [
        Sampling(temperature=0.0, max_tokens=7),
        Sampling(temperature=0.0, max_tokens=25),
        Sampling(temperature=1.3, max_tokens=12, seed=4, stop_tokens=stops),
        Sampling(temperature=0.7, top_p=0.8, max_tokens=12, seed=4, truncated_logprobs=True),
    ]
    requests = make_requests(8, 1)
    expected = {}
    for n, way in enumerate(ways):
        engine = LiveEngine(world, chunks, slots=3)
        for c in engine.run(requests[n::4], way):
            expected[c.request.id] = (c.tokens.tolist(), c.logprob.tolist(), c.finish)
    mixed = [Request(r.id, r.prompt, ways[r.id % 4]) for r in requests]
    engine = LiveEngine(world, chunks, slots=5)
    found = {
        c.request.id: (c.tokens.tolist(), c.logprob.tolist(), c.finish)
        for c in engine.run(mixed, Sampling(max_tokens=3))
    }
    assert found == expected
    assert len({len(tokens) for tokens, _, _ in found.values()}) > 4
