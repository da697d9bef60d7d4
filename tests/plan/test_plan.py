"""The planner counts state to the byte, lists legal layouts only, and reports what does not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.fake_megatron import OnMeta, fake_megatron_world

from nemocascade.megatron.adapter import train_adapters_only
from nemocascade.megatron.checkpoint.state import _main_parameters, _stepping
from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.fake import build_on_meta, fake_world
from nemocascade.megatron.groups import group_ranks
from nemocascade.megatron.model import build_model
from nemocascade.megatron.optimizer import Optimizer, wrap_ddp
from nemocascade.megatron.parameters import count_parameters
from nemocascade.megatron.workspace import MixerBackend, planned_mixer
from nemocascade.plan.activations import Activations
from nemocascade.plan.gpus import GPUS, find_gpu
from nemocascade.plan.job import Job, RolloutLoad, job_of_recipe
from nemocascade.plan.memory import GIB, every_rank, worst_rank
from nemocascade.plan.parameters import (
    StateBytes,
    chunk_parameters,
    place_of,
    stage_chunks,
    state_bytes,
)
from nemocascade.plan.search import (
    balanced_layout,
    best_plans,
    faults,
    legal_layouts,
    nearest_fitting,
    price,
)
from nemocascade.plan.settings import PlanSettings
from nemocascade.plan.summary import plan_recipe, planned_job
from nemocascade.plan.tables import memory_rows, rows
from nemocascade.plan.timing import StepModel
from nemocascade.recipe import (
    EngineConfig,
    LoraConfig,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutParallelConfig,
    SftRecipe,
    load_recipe,
    nemotron3_nano_30b,
    tiny,
)
from nemocascade.runtime.world import World

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
LARGE = RECIPES / "nemotron3_nano_30b" / "sft.py"
SMALL = replace(tiny(), vocab_size=512, hidden_size=64)
MIXED = replace(SMALL, pattern="ME*-ME*-", activation="swiglu", qk_norm=True, mlp_width=96)
# Name -> world, parallel sizes, model, precision, distributed, freeze_router.
STATES: dict[str, tuple[int, dict[str, Any], ModelConfig, str, bool, bool]] = {
    "one": (1, {}, SMALL, "fp32", True, False),
    "DP3": (3, {}, SMALL, "bf16", True, False),
    "TP2 EP2 DP2": (4, {"tp": 2, "ep": 2}, SMALL, "bf16", True, False),
    "PP2 VPP2 EP2": (4, {"pp": 2, "vpp": 2, "ep": 2}, MIXED, "bf16", True, True),
    "PP4 tied": (8, {"pp": 4}, replace(MIXED, tie_embeddings=True), "fp32", True, False),
    "CP4": (4, {"cp": 4}, SMALL, "bf16", True, False),
    "TP2 CP2 EP2 DP2": (8, {"tp": 2, "cp": 2, "ep": 2}, SMALL, "bf16", True, False),
    "CP2 PP2 ETP2": (8, {"cp": 2, "pp": 2, "etp": 2}, MIXED, "fp32", True, False),
    "EP2 ETP2": (8, {"tp": 2, "ep": 2, "etp": 2}, MIXED, "bf16", True, False),
    "plain optimizer": (4, {"tp": 2, "ep": 2}, SMALL, "bf16", False, False),
    "bf16 gradients": (4, {"tp": 2, "ep": 2}, SMALL, "bf16", True, False),
    "TP2 PP2 ETP2, LoRA": (8, {"tp": 2, "pp": 2, "etp": 2}, MIXED, "bf16", True, False),
    "EP2, LoRA": (2, {"ep": 2}, SMALL, "fp32", False, False),
    "odd replicas": (6, {"pp": 2, "ep": 3}, replace(SMALL, num_experts=9), "bf16", True, False),
}


def built_state(
    world: World,
    shape: ModelConfig,
    engine: EngineConfig,
    moe: MoeTrainingConfig,
    settings: OptimizerConfig,
    lora: LoraConfig | None = None,
) -> StateBytes:
    """Build what a rank builds, on the meta device, and count."""
    config = make_config(shape, world.parallel, engine, moe, seed=0, lora=lora)
    with torch.device("meta"):
        modules = build_model(world, config, Accelerators())
    if lora is not None:
        train_adapters_only(modules)
    with OnMeta():
        chunks = wrap_ddp(
            world,
            config,
            modules,
            distributed=settings.distributed,
            gradients=engine.gradients,
        )
        optimizer = Optimizer(settings, chunks, world, config, Accelerators())
    buffers = [b for c in chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    frozen = [p for m in modules for p in m.parameters() if not p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in frozen)
    if settings.distributed:
        weights += sum(b.param_data.numel() * b.param_data.element_size() for b in buffers)
    else:
        trained = [p for m in modules for p in m.parameters() if p.requires_grad]
        weights += sum(p.numel() * p.element_size() for p in trained)
    states = 0
    for inner in _stepping(optimizer):
        for owner, main, _, _ in _main_parameters(inner):
            copy = main.numel() * main.element_size() if main.dtype != owner.dtype else 0
            states += copy + 2 * 4 * main.numel()
    return StateBytes(
        parameters=weights,
        gradients=sum(b.grad_data.numel() * b.grad_data.element_size() for b in buffers),
        optimizer=states,
        buffers=sum(b.numel() * b.element_size() for m in modules for b in m.buffers()),
    )


@pytest.mark.parametrize("name", STATES)
def test_state_equals_a_meta_build_of_every_rank(name: str) -> None:
    size, sizes, shape, precision, distributed, frozen = STATES[name]
    parallel = ParallelConfig(**sizes)
    gradients: Any = "bf16" if name == "bf16 gradients" else "fp32"
    engine = EngineConfig(precision=precision, gradients=gradients)  # type: ignore[arg-type]
    moe = MoeTrainingConfig(freeze_router=frozen)
    settings = OptimizerConfig(distributed=distributed)
    lora = None
    if "LoRA" in name:
        targets = ("linear_qkv", "linear_proj", "in_proj", "out_proj", "shared_experts", "experts")
        lora = LoraConfig(rank=3, targets=(*targets, "mlp") if "-" in shape.pattern else targets)
    for rank in range(size):
        with fake_megatron_world(rank, size, parallel) as world:
            expected = built_state(world, shape, engine, moe, settings, lora)
        found = state_bytes(
            shape,
            parallel,
            size,
            place_of(rank, parallel, size),
            precision=precision,
            moe=moe,
            optimizer=settings,
            on_gpu=False,
            gradients_in=gradients,
            lora=lora,
        )
        assert found == expected, f"rank {rank}"


@pytest.mark.parametrize(
    "sizes",
    [
        {"tp": 8, "pp": 2, "ep": 8},
        {"tp": 2, "pp": 4, "vpp": 13, "ep": 4, "etp": 2},
        {"tp": 2, "cp": 8, "ep": 8},
    ],
)
def test_parameters_of_the_30b_model_are_those_that_are_built(sizes: dict[str, Any]) -> None:
    """By name, size and order, on a rank of every stage of 256."""
    shape, parallel, moe = nemotron3_nano_30b(), ParallelConfig(**sizes), MoeTrainingConfig()
    for stage in range(parallel.pp):
        rank = stage * (256 // parallel.pp) + 5
        with fake_world(rank, 256, parallel) as world:
            chunks = build_on_meta(world, shape, EngineConfig(), moe)
        patterns = stage_chunks(shape, parallel, stage)
        for index, (chunk, pattern) in enumerate(zip(chunks, patterns, strict=True)):
            listed = chunk_parameters(
                shape,
                parallel,
                moe,
                pattern,
                first=stage == 0 and index == 0,
                last=stage == parallel.pp - 1 and index == parallel.vpp - 1,
            )
            built = [(name, p.numel()) for name, p in chunk.named_parameters()]
            assert [(p.name, p.numel) for p in listed] == built


def test_groups_are_megatrons_own() -> None:
    """The fake world computes its groups itself; they are those that Megatron makes."""
    for cp in (1, 2):
        parallel = ParallelConfig(tp=2, pp=2, ep=4, cp=cp)
        for rank in (0, 5, 11, 15):
            ranks = group_ranks(rank, 16, parallel)
            with fake_megatron_world(rank, 16, parallel) as world:
                for name, expected in ranks.items():
                    group = getattr(world.groups, name)
                    if name not in ("embd", "pos_embd") and group is not None:
                        assert torch.distributed.get_process_group_ranks(group) == expected, name


def job_of(world: int, gpu: str = "h200", **changes: Any) -> Job:
    return replace(job_of_recipe(load_recipe(LARGE, SftRecipe), find_gpu(gpu), world), **changes)


def test_the_recipes_own_layout_runs_on_256() -> None:
    job = job_of(256)
    assert faults(job) == []
    ranks = every_rank(job)
    assert len(ranks) == 256
    # The planner looks at one rank of each stage; no other one needs more.
    assert max(r.total for r in ranks) == worst_rank(job).total


def test_only_legal_layouts_that_fit_are_proposed() -> None:
    job = job_of(64)
    plans = best_plans(job, count=10)
    assert len(plans) == 10
    times = [plan.time.total for plan in plans]
    assert times == sorted(times)
    for plan in plans:
        assert plan.job.problems() == []
        assert plan.fits
    every = list(legal_layouts(job))
    assert len({(j.parallel, j.engine.recompute) for j in every}) == len(every)
    for kept, recomputed in zip(every[::2], every[1::2], strict=True):
        assert recomputed.parallel == kept.parallel
        assert StepModel(recomputed).bound() >= StepModel(kept).bound()
    assert {(1, 1), (2, 1), (1, 2)} <= {(j.parallel.tp, j.parallel.pp) for j in every}


@pytest.mark.parametrize("count", [20, 10_000])
def test_the_search_finds_the_fastest_of_all_layouts(count: int) -> None:
    job = replace(job_of(8), capacity=4096)
    every = [price(found) for found in legal_layouts(job, context=(1,))]
    fitting = [plan for plan in every if plan.fits]
    times = sorted(plan.time.total for plan in fitting)
    assert 20 < len(times) < len(every)
    assert {plan.job.engine.recompute for plan in fitting} == {False, True}
    found = best_plans(job, count=count, context=(1,))
    assert [plan.time.total for plan in found] == times[:count]


def test_an_illegal_layout_is_explained_and_the_nearest_found() -> None:
    job = job_of(8)
    assert any("does not divide" in fault for fault in faults(job))
    nearest = nearest_fitting(job)
    assert nearest is not None
    assert nearest.fits
    assert nearest.job.problems() == []


def test_an_oversized_layout_is_explained() -> None:
    job = job_of(64, parallel=ParallelConfig(), engine=EngineConfig())
    [fault] = faults(job)
    assert "needs" in fault
    assert "GiB" in fault
    assert nearest_fitting(job) is not None


def test_a_generation_layout_that_cannot_be_is_explained() -> None:
    job = job_of(8, parallel=ParallelConfig(ep=8), capacity=32_768, sequences_per_step=8)
    assert job.problems() == []
    for pp in (3, 2**32):
        own = RolloutParallelConfig(pp=pp)
        load = RolloutLoad(sequences=8, length=1024, parallel=own)
        [problem, *_] = replace(job, rollout=load).problems()
        assert problem.startswith("rollout.parallel: ")
        assert "pipeline-layout" not in problem  # generation has no such setting


def test_packs_beyond_the_scans_offsets_are_explained() -> None:
    job = replace(job_of(64, capacity=2**31 - 256), mixer="fla")
    [problem] = job.with_layout(ParallelConfig(), recompute=True).problems()
    assert "for a single head" in problem
    assert "--engine.fla off" in problem
    assert replace(job, parallel=ParallelConfig(), mixer="triton").problems() == []


def test_the_planned_mixer_follows_settings_and_sizes() -> None:
    model, odd = nemotron3_nano_30b(), replace(nemotron3_nano_30b(), mamba_head_dim=48)
    settings = (EngineConfig(), EngineConfig(fla="on"), EngineConfig(fla="off"))
    assert [planned_mixer(model, engine) for engine in settings] == ["triton", "fla", "triton"]
    assert [planned_mixer(odd, engine) for engine in settings] == ["fla", "fla", "torch"]
    recipe = load_recipe(LARGE, SftRecipe)
    kept = {}
    for mixer in get_args(MixerBackend):
        job = planned_job(recipe, PlanSettings(recipe=str(LARGE), mamba2=mixer))
        kept[mixer] = set(Activations(replace(job, parallel=ParallelConfig())).full_layer("M"))
    assert planned_job(recipe, PlanSettings(recipe=str(LARGE))).mixer == "triton"
    assert kept["triton"] == kept["fla"] - {"Mamba scan"}
    assert kept["torch"] - kept["triton"] == {"Mamba states"}


def test_shorter_packs_are_tried_where_documents_allow() -> None:
    job = job_of(64, capacity=32768, sequences_per_step=64)
    found = {(j.capacity, j.sequences_per_step) for j in legal_layouts(job, longest=8192)}
    assert found == {(32768, 64), (16384, 128), (8192, 256)}
    assert {j.capacity for j in legal_layouts(job)} == {32768}


def test_memory_moves_the_right_way() -> None:
    base = job_of(256, engine=EngineConfig(recompute=True))
    total = worst_rank(base).total
    assert worst_rank(replace(base, teachers=1)).total > total
    assert worst_rank(replace(base, imbalance=3.0)).total > total
    kept = replace(base, engine=replace(base.engine, recompute=False))
    assert worst_rank(kept).total > 2 * total
    rollout = replace(base, rollout=RolloutLoad(sequences=4096, length=262_144))
    assert worst_rank(rollout).cache > 0
    # A replica on one rank: all weights, bf16, beside the caches of 4096 / 256 sequences.
    alone = RolloutParallelConfig(tp=1, pp=1, ep=1)
    small = RolloutLoad(sequences=256, length=64, parallel=alone)
    copied = worst_rank(replace(base, rollout=small))
    weights = 2 * count_parameters(nemotron3_nano_30b()).total
    assert weights < copied.weights + copied.cache < 1.1 * weights
    away = worst_rank(replace(base, rollout=replace(small, offload=True)))
    assert away.offloaded == away.gradients + away.optimizer > 0
    assert away.rollout < copied.rollout
    assert away.training == copied.training
    assert (
        price(replace(base, capacity=131_072)).memory.activations < price(base).memory.activations
    )


def test_time_moves_the_right_way() -> None:
    base = job_of(256)
    own = StepModel(base).step()
    assert own.total > own.compute > 0
    deeper = replace(base, parallel=ParallelConfig(tp=8, pp=4, ep=8))
    assert StepModel(deeper).step().bubble > own.bubble
    short = StepModel(replace(base, document=4096)).step()
    assert short.flops < own.flops
    assert short.total < own.total


def test_fp8_products() -> None:
    """They save time with many rows an expert and cost some with few, whose weights are quantised
    all the same; and only Hopper has them."""
    base = replace(job_of(256), engine=EngineConfig(recompute=True))

    def seconds(job: Job, **engine: Any) -> float:
        return StepModel(replace(job, engine=replace(job.engine, **engine))).layer("E").compute

    assert 0.6 < seconds(base, experts="fp8") / seconds(base) < 0.95
    assert seconds(base, linears="fp8") < seconds(base)
    short = replace(base, capacity=1024, document=1024)
    assert seconds(short, experts="fp8") > seconds(short)
    job = replace(base, engine=replace(base.engine, experts="fp8"))
    assert not job.problems()
    (problem,) = replace(job, gpu=GPUS["a100-80gb"]).problems()
    assert "engine.experts(fp8) needs Hopper GPUs, and the job has a100-80gb: set" in problem


def test_pieces_of_a_pipeline_are_balanced() -> None:
    pattern = nemotron3_nano_30b().pattern
    layout = balanced_layout(pattern, 8)
    chunks = layout.split("|")
    assert "".join(chunks) == pattern
    assert len(chunks) == 8
    weights = [sum(3 if s == "E" else 2 for s in chunk) for chunk in chunks]
    weights[-1] += 4
    assert max(weights) - min(weights) <= 5


def test_accelerators_can_be_added(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    values = {**vars(GPUS["h100"]), "name": "mine", "memory_gib": 40.0}
    path.write_text(json.dumps(values))
    assert find_gpu(str(path)).memory_gib == 40.0
    del values["memory_gib"]
    path.write_text(json.dumps({**values, "speed": 1}))
    with pytest.raises(ValueError, match="memory_gib, speed"):
        find_gpu(str(path))
    with pytest.raises(ValueError, match="h200"):
        find_gpu("h2000")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    recipe = load_recipe(LARGE, SftRecipe)
    recipe = replace(recipe, data=replace(recipe.data, capacity=32768))
    settings = PlanSettings(recipe=str(LARGE), gpus=64, best=3, json=True)
    found: dict[str, Any] = json.loads(plan_recipe(recipe, settings))
    return found


def test_the_report_says_what_a_machine_needs(report: dict[str, Any]) -> None:
    assert report["gpus"] == 64
    assert report["problems"] == []
    assert len(report["best"]) == 3
    for plan in (report["own"], *report["best"]):
        assert plan["capacity"] == 32768
        parts = {k: v for k, v in plan["memory_gib"].items() if k != "total"}
        assert sum(parts.values()) == pytest.approx(plan["memory_gib"]["total"])


def test_the_report_is_readable_and_names_what_does_not_fit() -> None:
    settings = PlanSettings(recipe=str(LARGE), gpus=1, gpu="h100")
    text = plan_recipe(load_recipe(LARGE, SftRecipe), settings)
    assert "cannot run" in text
    assert "No layout fits; the least needs" in text
    assert worst_rank(job_of(256)).parameters / GIB < 10


@pytest.mark.parametrize(
    ("gpu", "ranks"),
    [
        ("h200", (8, 16)),
        ("h100", (8,)),
        pytest.param("h200", (64, 256, 1024), marks=pytest.mark.slow),
        pytest.param("h100", (16, 64, 256, 1024), marks=pytest.mark.slow),
    ],
)
def test_the_documentation_holds_the_planners_numbers(gpu: str, ranks: tuple[int, ...]) -> None:
    text = (RECIPES.parent / "docs" / "parallelism.md").read_text(encoding="utf-8")
    # The tables have the same rows where nothing fits.
    table = text.partition(f"\n{gpu.upper()}:\n")[2].partition("00:\n")[0]
    missing = [line for line in rows(gpu, ranks) if line not in table]
    assert not missing, "run python -m nemocascade.plan.tables h200 h100 and fix the page"


def test_the_documentation_holds_the_memory_of_layouts() -> None:
    text = (RECIPES.parent / "docs" / "parallelism.md").read_text(encoding="utf-8")
    assert [line for line in memory_rows() if f"{line}\n" not in text] == []
