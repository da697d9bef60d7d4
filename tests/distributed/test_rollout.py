"""Generation on every parallel layout gives the same tokens as one process.

The quick tests omit layouts whose axes others have too, and interpret few decode steps of few
rows; the slow ones take all of it.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
from helpers.pairs import SMALL, WHOLE, by_size
from helpers.ranks import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}),
    "EP2": (2, {"ep": 2}),
    "ETP2": (2, {"etp": 2}),
    "DP2": (2, {}),
    "CP2 EP2": (2, {"cp": 2, "ep": 2}),
    "TP2 EP2 on 2": (2, {"tp": 2, "ep": 2}),
    "TP2 EP2": (4, {"tp": 2, "ep": 2}),
    "PP2 EP2": (4, {"pp": 2, "ep": 2}),
}
TOLERANCE = 1e-4  # of a log-probability
# At the end of a run's name: prompts and answers are read five tokens at a time.
PIECES = ", in pieces"
# The KV cache has blocks for one text and a few more, which preempt each other.
FEW = ", few blocks"
# Decode steps are captured.
GRAPHS = ", captured"
# Steps are those of a GPU, interpreted.
FUSED = ", fused"
ONLY_WHOLE = ("TP2", "PP2 EP2")
CAPTURED = {SMALL: ("PP2", "EP2", "TP2 EP2"), WHOLE: ("TP2", "PP2", "EP2", "TP2 EP2")}
# An interpreted step takes a second for each row.
INTERPRETED = {
    SMALL: ("one", "PP2", "TP2 EP2 on 2"),
    WHOLE: ("one", "TP2", "PP2", "EP2", "TP2 EP2"),
}
# Requests of an interpreted run, which are not all of one rank, and its tokens.
FUSED_RUN = {SMALL: ((1, 4, 8), 3), WHOLE: (range(9), 4)}

Found = dict[str, list[Any]]


def generate_each(layouts: dict[str, dict[str, Any]], size: str) -> dict[str, dict[str, Found]]:
    """Texts that each layout generates, by request, with an environment and without."""
    return {name: generate(name, parallel, size) for name, parallel in layouts.items()}


def generate(layout: str, parallel: dict[str, Any], size: str) -> dict[str, Found]:
    """Tokens, log-probabilities and turns of this rank's requests."""
    from helpers.cuda_graphs import install
    from helpers.rollout import EVEN, draw_tokens, make_model
    from nemocascade_kernels.backends import VARIABLE

    from nemocascade.megatron.world import generation_world, start_world
    from nemocascade.recipe import EngineConfig, ParallelConfig
    from nemocascade.rollout.engine import Completion, Request, Sampling
    from nemocascade.rollout.live import LiveEngine

    settings = EngineConfig(precision="fp32")
    world = start_world(ParallelConfig(**parallel), settings)
    chunks = make_model(world, EVEN)
    requests = [
        Request(3 * p + g, tuple(draw_tokens(EVEN.vocab_size, 4 + 5 * p, seed=p).tolist()))
        for p in range(3)
        for g in range(3)
    ]
    # Uneven shares, so that a rank goes along with another that still has work.
    mine = requests
    rollouts = generation_world(world, ParallelConfig(**{**parallel, "cp": 1}), settings)
    if rollouts.dp_size > 1:
        mine = [requests[:7], requests[7:]][rollouts.dp_rank]
    stop = tuple((t,) for t in range(0, EVEN.vocab_size, 9))
    runs = {
        "plain": (Sampling(max_tokens=12, seed=3, stop_tokens=stop), None),
        "truncated": (Sampling(temperature=0.8, top_k=50, top_p=0.9, max_tokens=8, seed=5), None),
        "environment": (Sampling(max_tokens=40, seed=4, stop_tokens=stop), respond_after(2)),
    }
    runs |= {f"{name}{PIECES}": run for name, run in runs.items() if name != "truncated"}
    runs |= {f"{name}{FEW}": runs[name] for name in ("plain", "environment")}
    interpreted, tokens = FUSED_RUN[size]
    if layout in INTERPRETED[size]:
        runs[f"plain{FUSED}"] = Sampling(max_tokens=tokens, seed=3), None
    if layout in CAPTURED[size]:
        runs[f"environment{GRAPHS}"] = runs["environment"]
    engines = {
        GRAPHS: with_graphs(LiveEngine(rollouts, chunks, slots=4)),
        PIECES: LiveEngine(rollouts, chunks, slots=4, prefill_chunk=5, record_routing=True),
        FEW: LiveEngine(rollouts, chunks, slots=4, kv_gib=gib_of(rollouts, slots=4, blocks=5)),
        FUSED: LiveEngine(rollouts, chunks, slots=len(interpreted)),
        "": LiveEngine(rollouts, chunks, slots=4),
    }
    results: dict[str, Found] = {}
    asked: list[int] = []
    captures = install(setattr)
    for name, (sampling, answer) in runs.items():
        respond = None if answer is None else counted(answer, asked)
        engine = next(e for end, e in engines.items() if name.endswith(end))
        is_fused = name.endswith(FUSED)
        asked_for = [r for r in mine if r.id in interpreted] if is_fused else mine
        os.environ[VARIABLE] = "decode_step=triton" if is_fused else ""
        found: Found = {}
        for c in engine.run(asked_for, sampling, respond):
            assert isinstance(c, Completion)
            routed = None if c.routing is None else c.routing.flatten(1).tolist()
            found[str(c.request.id)] = [c.response, c.logprob.tolist(), c.turns, routed]
        results[name] = found
        if name.endswith(GRAPHS):
            assert captures.captured
    world.barrier()
    preempted = engines[FEW].metrics()["preemptions"]
    assert preempted > 0 or len(mine) < 3, "the pool was never too small"
    assert asked, "every rank answers a share of the calls"
    return results


def gib_of(world: Any, slots: int, blocks: int) -> float:
    """The memory of so many slots and blocks on this rank."""
    from helpers.rollout import EVEN

    from nemocascade.megatron.generation.kv_cache import block_size, state_bytes

    stages = world.parallel.layout(EVEN.pattern).split("|")
    layers = "".join(stages[world.pp_rank :: world.parallel.pp])
    each = state_bytes(EVEN, layers, world.parallel.tp, 4)
    return float((slots + 2) * each.slot + blocks * block_size("cpu") * each.token) / 2**30


def counted(answer: Any, asked: list[int]) -> Any:
    def respond(c: Any) -> list[int] | None:
        asked.append(c.request.id)
        found: list[int] | None = answer(c)
        return found

    return respond


def with_graphs(engine: Any) -> Any:
    """The engine with captured decode steps, which a CPU has not."""
    from nemocascade.rollout.engine import Sampling

    assert not list(engine.run([], Sampling()))
    engine._model._graphs = engine._model._new_graphs()
    return engine


def respond_after(turns: int) -> Any:
    """An environment that answers so many times, shortly and at length."""

    def respond(c: Any) -> list[int] | None:
        if c.turns > turns:
            return None
        return [(c.request.id * 7 + i) % 200 + 1 for i in range(2 if c.turns == 1 else 9)]

    return respond


@functools.cache
def results_of(size: str) -> dict[str, dict[str, Found]]:
    """The requests of all ranks together, by layout, after a check that ranks of one data-parallel
    group agree."""
    found: dict[str, dict[str, Found]] = {}
    for ranks in (1, 2, 4):
        layouts = {
            name: p
            for name, (n, p) in LAYOUTS.items()
            if n == ranks and (size == WHOLE or name not in ONLY_WHOLE)
        }
        layouts |= {"one": {}} if ranks == 1 else {}
        arguments = {"layouts": layouts, "size": size}
        of_rank = run_ranks(generate_each, ranks, arguments, timeout_s=500)
        for name in layouts:
            whole: dict[str, Found] = {}
            for result in of_rank:
                for run, texts in result[name].items():
                    known = whole.setdefault(run, {})
                    assert all(known.get(i, text) == text for i, text in texts.items()), name
                    known |= texts
            found[name] = whole
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Found]]:
    return results_of(SMALL)


@by_size([name for name in LAYOUTS if name not in ONLY_WHOLE], LAYOUTS)
def test_layout_generates_the_same(name: str, size: str) -> None:
    results = results_of(size)
    for run, expected in results["one"].items():
        if run.endswith(FUSED) and name not in INTERPRETED[size]:
            continue
        found = results[name][run]
        assert found.keys() == expected.keys()
        for request, (tokens, logprobs, turns, routed) in expected.items():
            assert found[request][0] == tokens, (run, request)
            assert found[request][2] == turns
            assert (routed is None) == (not run.endswith(PIECES))
            assert routed is None or found[request][3] == routed
            errors = [abs(a - b) for a, b in zip(found[request][1], logprobs, strict=True)]
            assert max(errors) < TOLERANCE


@by_size(CAPTURED[SMALL], CAPTURED[WHOLE])
def test_captured_steps_generate_the_same(name: str, size: str) -> None:
    """Ranks that exchange rows capture together, or the run would not end."""
    results = results_of(size)
    for request, (tokens, logprobs, turns, _) in results["one"]["environment"].items():
        found = results[name][f"environment{GRAPHS}"][request]
        assert (found[0], found[2]) == (tokens, turns)
        errors = [abs(a - b) for a, b in zip(found[1], logprobs, strict=True)]
        assert max(errors) < TOLERANCE


def test_few_blocks_change_no_bit(results: dict[str, dict[str, Found]]) -> None:
    """On one process; `test_layout_generates_the_same` holds the layouts to it."""
    for run in ("plain", "environment"):
        assert results["one"][f"{run}{FEW}"] == results["one"][run]


def test_pieces_give_the_texts_of_the_whole(results: dict[str, dict[str, Found]]) -> None:
    """On one process; `test_layout_generates_the_same` holds the layouts to it."""
    for run in ("plain", "environment"):
        for request, (tokens, logprobs, turns, _) in results["one"][run].items():
            found = results["one"][f"{run}{PIECES}"][request]
            assert (found[0], found[2]) == (tokens, turns)
            errors = [abs(a - b) for a, b in zip(found[1], logprobs, strict=True)]
            assert max(errors) < TOLERANCE


def test_the_texts_differ_and_stop_early(results: dict[str, dict[str, Found]]) -> None:
    """The matrix would hold for a model that always writes the same."""
    one = results["one"]
    assert len({tuple(t[0]) for t in one["plain"].values()}) == 9
    assert len({len(t[0]) for t in one["plain"].values()}) > 2
    assert {t[2] for t in one["environment"].values()} > {1} or min(
        t[2] for t in one["environment"].values()
    ) > 1


def shared_replies() -> list[Any]:
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, ParallelConfig
    from nemocascade.rollout.replies import _shared

    group = start_world(ParallelConfig(tp=2), EngineConfig(precision="fp32")).groups.mp
    mine = [[(4, [5, 6, 7]), (1, None)], [(2, []), (3, [8])]][group.rank()]
    failure = ["", "slot 5: OSError: kein Gerät"][group.rank()]
    nothing: list[Any] = []
    return [_shared(group, mine, failure), _shared(group, nothing, "")]


def test_replies_of_the_ranks_of_a_replica_meet() -> None:
    replies = [[1, None], [2, []], [3, [8]], [4, [5, 6, 7]]]
    for found, nothing in run_ranks(shared_replies, 2, {}):
        assert found == [replies, ["slot 5: OSError: kein Gerät"]]
        assert nothing == [[], []]
