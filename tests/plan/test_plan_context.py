"""Context parallelism in the planner: memory, time, search, preflight, and packs of 1M tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemocascade.megatron.context import ContextShard, SegmentRows
from nemocascade.plan.activations import Activations
from nemocascade.plan.findings import Preflight
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import Job, job_of_recipe
from nemocascade.plan.memory import every_rank, stage_memory, worst_rank
from nemocascade.plan.parameters import RankCoordinates
from nemocascade.plan.preflight import offline
from nemocascade.plan.search import best_plans, faults, legal_layouts, nearest_fitting, price
from nemocascade.plan.segments import crossed_segments
from nemocascade.plan.settings import PlanSettings
from nemocascade.plan.summary import plan_recipe
from nemocascade.plan.timing import StepModel
from nemocascade.recipe import GrpoRecipe, ParallelConfig, SftRecipe, load_recipe
from nemocascade.types import PackedBatch

NANO = Path(__file__).resolve().parents[2] / "recipes" / "nemotron3_nano_30b"
LINK, NETWORK = 360e9, 40e9
"""Bytes a second of an H200 within and between nodes."""


def sft(world: int, capacity: int = 262_144, **axes: Any) -> Job:
    recipe = load_recipe(NANO / "sft.py", SftRecipe)
    data = replace(recipe.data, capacity=capacity)
    recipe = replace(recipe, data=data, parallel=ParallelConfig(**axes))
    job = job_of_recipe(recipe, find_gpu("h200"), world)
    return replace(job, engine=replace(job.engine, recompute=False))


def test_a_rank_keeps_its_share_of_the_tokens() -> None:
    """Documents within segments: every term shrinks by cp. A document of the whole pack: a rank
    keeps the keys before its segments, and the states that enter them."""
    whole, shared = (Activations(replace(sft(8, cp=cp), document=16_384)) for cp in (1, 8))
    for symbol in "M*E":
        one, eight = whole.full_layer(symbol), shared.full_layer(symbol)
        assert {name: value * 8 for name, value in eight.items()} == pytest.approx(one)
    crossed = Activations(sft(8, cp=8))
    rows, segment = 32_768, 16_384
    assert crossed.full_layer("E") == shared.full_layer("E")
    # Segments r and 15 - r attend to r + 1 and 16 - r segments of 2 key/value heads.
    keys = 17 * segment * 2 * 2 * 128 * 2
    assert crossed.full_layer("*")["attention q k v"] == rows * 32 * 128 * 2 + keys
    mamba = crossed.full_layer("M")
    # States of 16 segments, 15 sums of earlier ones, 2 that enter.
    states = (16 + 15 + 2) * 64 * 64 * 128 * 4
    assert mamba["Mamba borders"] == states
    assert "Mamba scan" not in mamba


@pytest.mark.parametrize("document", [1, 7, 128, 256, 384, 1000, 2048, 4096])
@pytest.mark.parametrize("cp", [2, 8])
def test_crossed_segments_are_those_of_the_engine(document: int, cp: int) -> None:
    """The arithmetic against the shards that ranks get of such a pack."""
    capacity = 4096
    starts = torch.arange(0, capacity, document)
    zeros = torch.zeros(capacity, dtype=torch.int64)
    batch = PackedBatch(
        tokens=zeros,
        targets=zeros,
        positions=zeros,
        token_weight=zeros.float(),
        cu_seqlens=torch.cat([starts, torch.tensor([capacity])]).int(),
        num_tokens=capacity,
    )
    shards = [ContextShard(batch.shard(r, cp), torch.device("cpu")) for r in range(cp)]
    found = crossed_segments(capacity, document, cp)

    def most(of_part: Callable[[SegmentRows], int]) -> int:
        return max(sum(map(of_part, shard.parts)) for shard in shards)

    segment = capacity // 2 // cp
    assert found.exchanges == shards[0].exchanges
    assert found.keys == most(lambda p: segment + p.before)
    assert found.entering == most(lambda p: p.before > 0)
    assert found.entered == most(lambda p: p.bounds[1] * (p.before > 0))
    assert found.longest == max(shards[0].span(number) for number in range(2 * cp))
    assert found.left == most(lambda p: (p.last_rows.stop - p.last_rows.start) * p.continues)


def test_optimizer_state_is_sharded_over_replicas_and_context() -> None:
    """Context-parallel ranks hold the same weights, each with its own shard of the optimizer."""
    by_data, by_context = (sft(64, tp=2, ep=8, cp=cp) for cp in (1, 8))
    assert by_data.state(RankCoordinates(0, 0, 0)) == by_context.state(RankCoordinates(0, 0, 0))
    assert len({m.optimizer for m in every_rank(by_context)}) > 1
    assert max(m.total for m in every_rank(by_context)) == worst_rank(by_context).total


def test_the_exchange_takes_its_bytes_over_its_link() -> None:
    """Keys and values of the pack, states and halo rows of its segments: a gather forward, and a
    reduce-scatter in backward; in a node up to tp x cp = 8, on the network above."""
    keys = 2 * 262_144 * 2 * 128 * 2
    border = 64 * 64 * 128 * 4 + 3 * 6144 * 2
    for cp, speed in ((8, LINK), (16, NETWORK)):
        # The gradients of keys are summed in float32.
        gathered = 6 * 3 * keys + 23 * 2 * 2 * cp * border
        cost = StepModel(sft(64, cp=cp)).stage(0)
        assert cost.context == pytest.approx(gathered * (cp - 1) / cp / speed)
    assert StepModel(sft(64, cp=8, tp=2)).context_speed == NETWORK
    assert StepModel(sft(64)).stage(0).context == 0
    assert StepModel(replace(sft(64, cp=8), document=16_384)).stage(0).context == 0


def test_recomputation_gathers_once_more() -> None:
    kept = sft(64, cp=8)
    again = replace(kept, engine=replace(kept.engine, recompute=True))
    keys, border = 2 * 262_144 * 2 * 128 * 2, 64 * 64 * 128 * 4 + 3 * 6144 * 2
    more = StepModel(again).stage(0).context - StepModel(kept).stage(0).context
    assert more == pytest.approx((6 * keys + 23 * 16 * border) * 7 / 8 / LINK)


def test_continued_documents_are_computed_again_by_the_mixer_or_by_the_layer() -> None:
    """The layer's recomputation replaces that of the mixer, which moves no products."""
    kept = sft(64, cp=8)
    again = replace(kept, engine=replace(kept.engine, recompute=True))
    costs = [StepModel(job).layer("M").compute for job in (kept, again)]
    rows, memory = 32_768, find_gpu("h200").memory_gb_s * 1e9
    flops = StepModel(kept).layer("M").compute  # of all
    entering, leaving = (n * rows * 6144 * 2 / memory for n in (80.0, 70.0))
    base = 24.0 * rows * 2688 * 2 / memory
    products = flops - 4 * (entering + leaving + base)
    assert products > 0
    assert costs[1] == pytest.approx(4 * (entering + leaving + base) + leaving + products * 4 / 3)


def test_more_than_16_ranks_move_states_in_rounds() -> None:
    """A scan of 64 segments takes 7 rounds of 2 states; 32 segments are gathered."""
    job = sft(256, cp=32)
    state = 64 * 64 * 128 * 4
    keys, halo = 2 * 262_144 * 2 * 128 * 2, 3 * 6144 * 2
    gathered = 6 * 3 * keys + 23 * 2 * (14 * state + 64 * halo)
    assert StepModel(job).stage(0).context == pytest.approx(gathered * 31 / 32 / NETWORK)
    assert Activations(job).full_layer("M")["Mamba borders"] == (4 * 7 + 2) * state
    half = Activations(sft(256, cp=16)).full_layer("M")["Mamba borders"]
    assert half == (32 + 31 + 2) * state


def test_work_is_shared_equally() -> None:
    """The zigzag balances attention, so a layer takes 1 / cp of the time, whatever its kind. Mamba
    layers move more where documents cross segments."""
    for document in (16_384, 262_144):
        jobs = (replace(sft(64, cp=cp), document=document) for cp in (1, 8))
        one, eight = (StepModel(job) for job in jobs)
        for symbol in "*E":
            assert eight.layer(symbol).compute == pytest.approx(one.layer(symbol).compute / 8)
        assert eight.head().compute == pytest.approx(one.head().compute / 8)
        crossed = eight.layer("M").compute * 8 / one.layer("M").compute
        assert crossed == pytest.approx(1.0) if document == 16_384 else 1.5 < crossed < 4.0


def test_a_search_finds_context_parallel_layouts() -> None:
    job = sft(64)
    found = list(legal_layouts(job))
    assert {j.parallel.cp for j in found} == {1, 2, 4, 8, 16}
    assert all(j.problems() == [] for j in found)
    assert {j.parallel.cp for j in legal_layouts(job, context=(1,))} == {1}
    best, without = (best_plans(job, count=3, context=c) for c in ((1, 2, 4, 8, 16), (1,)))
    assert best[0].job.parallel.cp > 1
    assert best[0].tokens_per_s_per_gpu > without[0].tokens_per_s_per_gpu
    # Exact: pricing everything gives the same.
    small = replace(job, world_size=16)
    every = [price(j) for j in legal_layouts(small, context=(8,))]
    assert best_plans(small, count=1, context=(8,))[0].time.total == min(
        plan.time.total for plan in every if plan.fits
    )


def test_rules_of_the_cut_are_named_and_the_nearest_keeps_cp() -> None:
    """A capacity that 2 x cp x tp does not divide, and a layout that needs too much memory."""
    [fault] = faults(sft(64, 262_144 + 8, tp=2, cp=8, ep=8))
    assert "is not a multiple of 2 x cp(8) x tp(2) = 32: set the capacity to" in fault
    job = sft(64, cp=4, ep=2)
    [fault] = faults(job)
    assert "GiB" in fault
    nearest = nearest_fitting(job)
    assert nearest is not None
    assert nearest.job.parallel.cp > 1


def test_generation_takes_context_ranks_as_replicas() -> None:
    """Slots are of a data-parallel rank; cp ranks generate too, so each holds as many."""
    recipe = load_recipe(NANO / "if_rl.py", GrpoRecipe)
    jobs = [
        job_of_recipe(
            replace(recipe, parallel=ParallelConfig(tp=2, ep=8, cp=cp)),
            find_gpu("h200"),
            64,
            preset="nemotron3_nano_30b",
        )
        for cp in (1, 4)
    ]
    for job in jobs:
        assert job.work is not None
        assert job.rollout.sequences == min(32 * 128, job.work.rollouts)
    one, four = (stage_memory(j, RankCoordinates(0, 0, 0)) for j in jobs)
    assert one.rollout == four.rollout > 0
    assert [j.parallel.data_parallel(64) for j in jobs] == [32, 8]


MILLION = 1_048_576


def million(**changes: Any) -> SftRecipe:
    """`sft.py --data.capacity 1048576 --parallel.cp 8 --engine.recompute True`."""
    recipe = load_recipe(NANO / "sft.py", SftRecipe)
    data = replace(recipe.data, capacity=MILLION, path=("synthetic:arithmetic",))
    return replace(
        recipe,
        init_from="base",
        data=replace(data, non_thinking_path=()),
        parallel=replace(recipe.parallel, cp=8),
        engine=replace(recipe.engine, recompute=True),
        **changes,
    )


def test_a_million_tokens_are_planned() -> None:
    settings = PlanSettings(recipe="sft.py", gpus=32, best=1, json=True)
    report: dict[str, Any] = json.loads(plan_recipe(million(), settings))
    assert report["problems"] == []
    own = report["own"]
    assert own["fits"]
    assert own["parallel"]["cp"] == 8
    # The queries of a layer have 2^32 elements: a count in 32 bits would show.
    speed = own["time_s"]["total"] * own["tokens_per_s_per_gpu"] * 32
    assert speed == pytest.approx(64 * MILLION)
    # Each of two segments has 2^16 tokens, in bf16 of 2,688 columns on each of two tp ranks.
    assert own["memory_gib"]["activations"] == pytest.approx(2**17 * 2688 * 53 / 2**30, rel=0.05)


def test_a_million_tokens_pass_preflight(tmp_path: Path) -> None:
    """Only the disk of this machine may be too small."""
    recipe = million(run_dir=str(tmp_path))
    found = Preflight()
    offline(recipe, job_of(recipe), 32, found, dry_run=True, ahead=True)
    assert [p for p in found.problems if "free some space" not in p] == []
    seen = {f.check: f.measured for f in found.findings}
    assert seen["dry run"].startswith("32 ranks of ")
    kept = replace(recipe, engine=replace(recipe.engine, recompute=False))
    found = Preflight()
    offline(kept, job_of(kept), 32, found, dry_run=False, ahead=True)
    assert any("the nearest layout that fits is tp 2 cp 8" in p for p in found.problems)
    broken = replace(recipe, data=replace(recipe.data, capacity=MILLION + 16))
    found = Preflight()
    offline(broken, None, 32, found, dry_run=False, ahead=True)
    assert any("not a multiple of 2 x cp(8)" in p for p in found.problems)


def job_of(recipe: SftRecipe) -> Job:
    return job_of_recipe(recipe, find_gpu("h200"), 32)
