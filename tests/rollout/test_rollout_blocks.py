"""The blocked KV cache: its allocator, its size, and sequences that are suspended for others."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from helpers.rollout import EVEN, ODD, draw_tokens, make_model, make_runner

from nemocascade.megatron.generation import kv_cache
from nemocascade.megatron.generation.kv_cache import (
    MOST_SLOTS,
    BlockTable,
    CacheBytes,
    CacheMemory,
    Load,
    blocks_of,
    state_bytes,
)
from nemocascade.megatron.model import CascadeModel
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig, tiny
from nemocascade.rollout import live
from nemocascade.rollout.blocks import BlockPool
from nemocascade.rollout.capacity import GIB, CapacityError, check_capacity
from nemocascade.rollout.engine import Completion, Counts, Request, RequestList, Sampling, Supply
from nemocascade.rollout.generation import Generation
from nemocascade.rollout.live import LiveEngine
from nemocascade.rollout.residency import Residency
from nemocascade.rollout.slots import SlotTable
from nemocascade.runtime.world import World

SIZE = 16  # tokens of a block on a CPU
STOPS = tuple((t,) for t in range(0, ODD.vocab_size, 9))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def chunks(world: World) -> list[CascadeModel]:
    return make_model(world, ODD)


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[BlockPool]:
    """The pools of all runs."""
    found: list[BlockPool] = []

    class Watched(Generation):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            found.append(self.residency.pool)

    monkeypatch.setattr(live, "Generation", Watched)
    return found


def test_the_pool_against_an_oracle() -> None:
    """Random sequences start, fork, grow and end: users of a block are counted as the oracle counts
    them, and nobody writes where another reads."""
    for seed in range(20):
        draw = random.Random(seed)
        pool = BlockPool(40, 4)
        # Blocks and tokens of each sequence; tokens are known by what was written.
        texts: list[tuple[list[int], list[int]]] = []
        memory: dict[tuple[int, int], int] = {}
        for _ in range(400):
            act = draw.choice(("start", "fork", "grow", "grow", "end"))
            if act == "start":
                length = draw.randint(1, 17)
                if pool.needed(length) <= pool.free:
                    texts.append((pool.take(pool.needed(length)), []))
                    write(memory, texts[-1], length, draw, 4)
            elif act == "fork" and texts and pool.free:
                blocks, tokens = draw.choice(texts)
                mine = pool.fork(blocks, len(tokens))
                last = len(tokens) // 4
                for at in range(len(tokens) % 4):
                    memory[mine[last], at] = memory[blocks[last], at]
                texts.append((mine, list(tokens)))
            elif act == "grow" and texts:
                text = draw.choice(texts)
                blocks, tokens = text
                if pool.needed(len(tokens) + 1) > len(blocks):
                    if not pool.free:
                        continue
                    blocks += pool.take(1)
                write(memory, text, 1, draw, 4)
            elif act == "end" and texts:
                pool.release(texts.pop(draw.randrange(len(texts)))[0])
            users = Counter(b for blocks, _ in texts for b in blocks)
            assert pool._users == [users[b] for b in range(40)]
            assert pool.free == 40 - len(users)
            ending = draw.randint(0, len(texts))
            left = {b for blocks, _ in texts[ending:] for b in blocks}
            freed = pool.freed_by(blocks for blocks, _ in texts[:ending])
            assert freed == len(users.keys() - left)
            for blocks, tokens in texts:
                found = [memory[blocks[t // 4], t % 4] for t in range(len(tokens))]
                assert found == tokens
        for blocks, _ in texts:
            pool.release(blocks)
        assert sorted(pool.take(40)) == list(range(40))


def write(
    memory: dict[tuple[int, int], int],
    text: tuple[list[int], list[int]],
    count: int,
    draw: random.Random,
    size: int,
) -> None:
    """Append random tokens to a sequence."""
    blocks, tokens = text
    for _ in range(count):
        tokens.append(draw.randrange(10**9))
        at = len(tokens) - 1
        memory[blocks[at // size], at % size] = tokens[-1]


def test_the_pool_rejects_unfit_calls() -> None:
    pool = BlockPool(2, 4)
    [block, _] = pool.take(2)
    with pytest.raises(ValueError, match="1 blocks are wanted, and 0 of 2 are free"):
        pool.take(1)
    pool.release([block])
    with pytest.raises(ValueError, match="released twice"):
        pool.release([block])
    with pytest.raises(ValueError, match="no tokens to share"):
        pool.share([block])


def make_requests(prompts: int, rollouts: int) -> list[Request]:
    """Prompts of different lengths, some of whole blocks, each continued `rollouts` times."""
    lengths = (5, 32, 21, 16, 40)
    return [
        Request(p * rollouts + g, tuple(draw_tokens(ODD.vocab_size, lengths[p], seed=p).tolist()))
        for p in range(prompts)
        for g in range(rollouts)
    ]


def gib(slots: int, blocks: int) -> float:
    """The memory of so many slots and blocks of ODD."""
    each = state_bytes(ODD, ODD.pattern, 1, 4)
    return ((slots + 2) * each.slot + blocks * SIZE * each.token) / GIB


def by_id(found: Sequence[Completion]) -> dict[int, Completion]:
    return {c.request.id: c for c in found}


def assert_same(found: Mapping[int, Completion], expected: Mapping[int, Completion]) -> None:
    """All fields of each completion, bit for bit."""
    for number, c in found.items():
        e = expected[number]
        for name in ("tokens", "written", "logprob", "routing"):
            assert torch.equal(getattr(c, name), getattr(e, name)), (number, name)
        assert (c.finish, c.turns) == (e.finish, e.turns)


def answers(c: Completion) -> list[int] | None:
    """Short and long replies, some of which take a while."""
    time.sleep(0.002 * (c.request.id % 2))
    return None if c.turns > 3 else [c.request.id % 7 + 1] * (25 if c.turns == 2 else 3)


# Replies make texts longer, so that two of each prompt already compete for the blocks.
@pytest.mark.parametrize("chunk", [0, 13])
@pytest.mark.parametrize(
    ("environment", "rollouts"),
    [(False, 4), (True, 2), pytest.param(True, 4, marks=pytest.mark.slow)],
)
def test_results_do_not_depend_on_the_number_of_blocks(
    world: World,
    chunks: list[CascadeModel],
    pools: list[BlockPool],
    environment: bool,
    rollouts: int,
    chunk: int,
) -> None:
    """From a pool that never runs out down to one of a single sequence; every token is processed
    once in all of them."""
    requests = make_requests(5, rollouts)
    sampling = Sampling(max_tokens=100, seed=3, stop_tokens=STOPS)
    respond = answers if environment else None
    whole = LiveEngine(world, chunks, slots=20, prefill_chunk=chunk, record_routing=True)
    expected = by_id(list(whole.run(requests, sampling, respond)))
    assert whole.counts.preemptions == 0
    assert len({len(c.tokens) for c in expected.values()}) > 5
    least = blocks_of(140, SIZE) + blocks_of(40, SIZE)
    preemptions = []
    for slots, blocks in ((20, least + 20), (20, least), (7, least + 4), (1, least)):
        engine = LiveEngine(
            world,
            chunks,
            slots=slots,
            prefill_chunk=chunk,
            record_routing=True,
            kv_gib=gib(slots, blocks),
        )
        found = by_id(list(engine.run(requests, sampling, respond)))
        assert found.keys() == expected.keys()
        assert_same(found, expected)
        counts = engine.counts
        assert counts.prefill_tokens == whole.counts.prefill_tokens
        assert counts.rows == whole.counts.rows
        assert counts.preemptions <= counts.offloads
        assert pools[-1].count == pools[-1].free == blocks
        preemptions.append(counts.preemptions)
    if environment:
        assert preemptions[1] > 0
    else:
        assert preemptions[0] < preemptions[1]
        assert preemptions[3] == 0
    assert engine.metrics()["preemptions"] == preemptions[-1]


def test_the_rollouts_of_a_prompt_share_its_blocks(
    world: World, chunks: list[CascadeModel], pools: list[BlockPool]
) -> None:
    """Ten texts of three full blocks and a fourth each run in ten blocks more than these three."""
    [request] = make_requests(1, 1)
    prompt = tuple(draw_tokens(ODD.vocab_size, 50, seed=1).tolist())
    requests = [Request(i, prompt) for i in range(10)]
    sampling = Sampling(max_tokens=14, seed=5)
    expected = by_id(list(LiveEngine(world, chunks, slots=1).run(requests, sampling)))
    engine = LiveEngine(world, chunks, slots=10, kv_gib=gib(10, 3 + 10))
    least: list[int] = []
    found = {}
    for c in engine.run(requests, sampling):
        least.append(pools[-1].free)
        found[c.request.id] = c
    assert engine.counts.preemptions == engine.counts.offloads == 0
    assert engine.counts.steps == 13
    assert {n: c.tokens.tolist() for n, c in found.items()} == {
        n: c.tokens.tolist() for n, c in expected.items()
    }
    assert request.id == 0


class Saving:
    """A model without states. saved: the slots of suspended sequences."""

    def __init__(self, slots: int) -> None:
        self.table = BlockTable(slots, 4, torch.device("cpu"))
        self.table.allocate(6, 8)
        self.saved: list[int] = []

    def save(self, slot: int, blocks: Sequence[int]) -> list[int]:
        self.saved.append(slot)
        return []

    def restore(self, saved: list[int], slot: int, blocks: Sequence[int]) -> None:
        assert saved == []


def test_nothing_is_suspended_in_vain() -> None:
    """Two waiting sequences have three blocks, which a running one uses too; two are free."""
    model, table, pool = Saving(4), SlotTable(4, 5, 64, torch.device("cpu")), BlockPool(6, 4)
    residency = Residency(cast(Any, model), table, pool, Counts())
    prompt = tuple(range(12))
    requests = [Request(i, prompt) for i in range(3)]
    running, *waiting = table.admit(requests, Sampling(max_tokens=20), object())
    residency.place(running, pool.take(4))
    for text in waiting:
        residency.place(text, pool.fork(running.blocks, 12))
        text.is_paused = True
    assert pool.free == 2
    residency.suspend_waiting(12, 1, is_kept=False)
    assert not residency.suspended
    residency.grow(running, 28)
    assert residency.suspended == [running]
    # They are the only users now, but seven blocks are one too many.
    running.length = 28
    assert residency.resume() == []
    assert residency.suspended == [running]
    running.length = 20
    assert residency.resume() == [running]
    assert all(text.slot < 0 for text in waiting)
    assert len(model.saved) == 3


class Slow:
    """An environment whose replies to even requests come once all odd ones have ended."""

    def __init__(self, odd: int) -> None:
        self.left, self.most = odd, 0

    def __call__(self, c: Completion) -> list[int] | None:
        if c.request.id % 2:
            self.left -= 1
            return None
        end = time.monotonic() + 8
        while self.left and time.monotonic() < end:
            time.sleep(0.001)
        return None if c.turns > 1 else [1, 2, 3]


def test_another_text_takes_the_place_of_one_that_waits(
    world: World, chunks: list[CascadeModel], pools: list[BlockPool]
) -> None:
    """With two slots and two episodes that wait until the others have ended."""
    requests = [
        Request(i, tuple(draw_tokens(ODD.vocab_size, 20, seed=i).tolist())) for i in range(8)
    ]
    every = Sampling(max_tokens=40, seed=3, stop_tokens=tuple((t,) for t in range(ODD.vocab_size)))
    results = []
    for slots in (2, 8):
        engine = LiveEngine(world, chunks, slots=slots, tool_calls=8, record_routing=True)
        slow = Slow(4)
        results.append(by_id(list(engine.run(requests, every, slow))))
        assert slow.left == 0
        assert bool(engine.counts.offloads) == (slots == 2)
        assert engine.counts.preemptions == 0
        assert pools[-1].free == pools[-1].count
    assert_same(*results)
    assert {c.turns for c in results[0].values()} == {1, 2}


class Pieces(RequestList):
    """Requests that are given out as slots are free; some are cancelled at a number of polls."""

    is_ordered = False

    def __init__(self, requests: Sequence[Request], cancelled: Mapping[int, Sequence[int]]) -> None:
        super().__init__(requests)
        self.left, self.cancelled, self.polls = list(self.requests), cancelled, 0

    def poll(self, free_slots: int, busy: int) -> Supply:
        self.polls += 1
        taken, self.left = self.left[: max(0, free_slots)], self.left[max(0, free_slots) :]
        return Supply(taken, self.cancelled.get(self.polls, ()), bool(self.left) or self.polls < 90)


@pytest.mark.parametrize("environment", [False, True])
def test_cancelled_requests_free_their_blocks(
    world: World, chunks: list[CascadeModel], pools: list[BlockPool], environment: bool
) -> None:
    """On the device, in host memory, while they wait, and with a stored prompt."""
    requests = make_requests(5, 4)
    sampling = Sampling(max_tokens=100, seed=3, stop_tokens=STOPS)
    reply = answers if environment else None
    alone = LiveEngine(world, chunks, slots=20, record_routing=True)
    expected = by_id(list(alone.run(requests, sampling, reply)))
    blocks = blocks_of(140, SIZE) + blocks_of(40, SIZE) + 3
    engine = LiveEngine(
        world, chunks, slots=6, record_routing=True, kv_gib=gib(6, blocks), prefill_chunk=0
    )
    for first in (1, 2, 5, 20, 40):
        cancelled: dict[int, Sequence[int]] = {
            first: [1, 2, 3],
            first + 2: [5, 6, 7],
            first + 9: [0, 8, 9, 10, 11, 18],
        }
        found = by_id(list(engine.run(Pieces(requests, cancelled), sampling, reply)))
        assert_same(found, expected)
        dropped = {n for ids in cancelled.values() for n in ids}
        assert expected.keys() - found.keys() <= dropped
        assert pools[-1].count == pools[-1].free == blocks


def test_sizes_are_those_of_the_tensors(world: World) -> None:
    """Bytes of a token and of a slot, by layer kind."""
    for shape in (ODD, EVEN, tiny()):
        model = make_runner(world, make_model(world, shape), slots=3, context=100)
        blocks = model.table.blocks + 1
        token = slot = 0
        for layer in model._pipeline.layers:
            for name in ("keys", "values"):
                if hasattr(layer, name):
                    token += getattr(layer, name).nbytes
            for name in ("conv", "ssm"):
                if hasattr(layer, name):
                    slot += getattr(layer, name).nbytes
        each = state_bytes(shape, shape.pattern, 1, 4)
        assert token == each.token * blocks * SIZE
        assert slot == each.slot * 4


def test_capacity_follows_from_memory() -> None:
    each = CacheBytes(token=100, slot=5000)
    load = Load(longest=160, prompt=40, requests=1000)
    memory = CacheMemory(budget=20 * (5000 + 80 * 100), each=each, size=16)
    assert memory.slots(load) == 20
    assert memory.blocks(load, 20) == (memory.budget - 22 * 5000) // 1600
    check_capacity(memory, load, 20, 13, memory.needed_bytes(load, 20))
    # No more than all sequences and a stored prompt can fill.
    assert memory.blocks(load, 2) == 2 * 10 + 3
    assert memory.blocks(Load(160, 40, 1), 20) == memory.blocks(Load(160, 40, 0), 20) == 10 + 3
    assert CacheMemory(10**12, each, 16).slots(load) == MOST_SLOTS
    assert CacheMemory(1, each, 16).slots(load) == 1
    # Layers of one kind alone.
    assert CacheMemory(100_000, CacheBytes(0, 5000), 16).slots(load) == 18
    assert CacheMemory(100_000, CacheBytes(0, 5000), 16).blocks(load, 3) == 3 * 10 + 3
    assert CacheMemory(100_000, CacheBytes(100, 0), 16).slots(load) == 12


def test_slots_follow_from_memory(world: World, chunks: list[CascadeModel]) -> None:
    requests, sampling = make_requests(5, 4), Sampling(max_tokens=56, seed=3, stop_tokens=STOPS)
    expected = by_id(list(LiveEngine(world, chunks, slots=4).run(requests, sampling)))
    each = state_bytes(ODD, ODD.pattern, 1, 4)
    half = 3 * SIZE * each.token + each.slot
    engine = LiveEngine(world, chunks, slots=0, kv_gib=6 * half / GIB)
    found = by_id(list(engine.run(requests, sampling)))
    assert engine.limits.slots == 6
    assert engine.metrics()["rollout_slots"] == 6
    assert all(torch.equal(found[n].logprob, c.logprob) for n, c in expected.items())
    # A later run has the same number.
    engine.release()
    list(engine.run(requests[:1], Sampling(max_tokens=8)))
    assert engine.limits.slots == 6


def test_the_last_block_of_a_place_reaches_the_device() -> None:
    """Two sequences may have a slot between two transfers, and a device may write duplicates in any
    order."""
    table = BlockTable(2, 16, torch.device("cpu"))
    table.allocate(20, 4)
    table.on_device = table.on_device.clone()
    table.assign(1, 0, [5, 6])
    table.assign(1, 0, [9])
    sent: list[torch.Tensor] = []

    def to_device(columns: list[torch.Tensor], _: torch.device) -> list[torch.Tensor]:
        sent.extend(columns)
        return columns

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "to_device", to_device)
        table.send()
    assert sorted(zip(*(t.tolist() for t in sent), strict=True)) == [(1, 0, 9), (1, 1, 6)]
    assert table.on_device[1].tolist() == [9, 6, 20, 20]


def test_a_sequence_that_never_fits_is_an_error(world: World, chunks: list[CascadeModel]) -> None:
    """At the start, and with a remedy that helps."""
    requests, sampling = make_requests(5, 1), Sampling(max_tokens=100, seed=3)
    with pytest.raises(CapacityError, match=r"has 11 blocks of 16 tokens.*needs 12: set") as found:
        LiveEngine(world, chunks, slots=2, kv_gib=gib(2, 11)).run(requests, sampling)
    word, *_ = str(found.value).split("kv_gib to ")[1].split()
    engine = LiveEngine(world, chunks, slots=2, kv_gib=float(word))
    assert len(list(engine.run(requests, sampling))) == 5
