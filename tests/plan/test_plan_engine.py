"""The planner knows the engine's settings: exchange of experts, recomputed kinds of layers, overlap
of the gather and the precision of gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemocascade.plan.expert_rows import expert_rows
from nemocascade.plan.gpus import GPUS
from nemocascade.plan.job import Job
from nemocascade.plan.memory import worst_rank
from nemocascade.plan.timing import StepModel
from nemocascade.recipe import (
    EngineConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    nemotron3_nano_30b,
)


def job_of(parallel: ParallelConfig, **engine: Any) -> Job:
    return Job(
        model=nemotron3_nano_30b(),
        parallel=parallel,
        engine=EngineConfig(**engine),
        moe=MoeTrainingConfig(),
        optimizer=OptimizerConfig(),
        capacity=32_768,
        sequences_per_step=256,
        gpu=GPUS["h100"],
        world_size=256,
    )


@pytest.mark.parametrize(
    ("ep", "direct", "hierarchical"),
    [(8, 0.0, 0.0), (16, 3.0, 0.99), (32, 4.5, 2.49), (64, 5.25, 3.91)],
)
def test_rows_between_nodes(ep: int, direct: float, hierarchical: float) -> None:
    """A token with 6 of 128 experts sends a row for each expert elsewhere, or for each node."""
    model, parallel = nemotron3_nano_30b(), ParallelConfig(ep=ep)
    one, two = (expert_rows(model, parallel, 8, how) for how in ("direct", "auto"))
    assert one.network == pytest.approx(direct, abs=0.005)
    assert two.network == pytest.approx(hierarchical, abs=0.005)
    assert two == expert_rows(model, parallel, 8, "hierarchical")
    assert two.two_hops is (ep > 8)
    # The second hop is that of a node's experts alone.
    assert two.link == pytest.approx(6 * 7 / 8)


def test_nodes_that_are_not_filled_exchange_directly() -> None:
    rows = expert_rows(nemotron3_nano_30b(), ParallelConfig(ep=16), 12, "auto")
    assert not rows.two_hops
    assert rows.network == pytest.approx(6 * 4 / 16)


def test_two_hops_are_priced() -> None:
    def seconds(ep: int, exchange: str) -> float:
        return StepModel(job_of(ParallelConfig(ep=ep), expert_exchange=exchange)).layer("E").expert

    assert seconds(8, "auto") == seconds(8, "direct") > 0
    for ep in (16, 32, 64):
        assert seconds(ep, "auto") == seconds(ep, "hierarchical") < 0.9 * seconds(ep, "direct")
        assert seconds(ep, "auto") > seconds(8, "auto")


def test_recomputed_kinds_of_layers() -> None:
    parallel = ParallelConfig(tp=2, ep=8)
    kept, some, every = (
        job_of(parallel, **settings)
        for settings in ({}, {"recompute_layers": "ME"}, {"recompute": True})
    )
    memory = [worst_rank(job).activations for job in (kept, some, every)]
    assert memory[0] > 4 * memory[1] > 4 * memory[2]
    seconds = [StepModel(job).step().compute for job in (kept, some, every)]
    assert seconds[0] < seconds[1] < seconds[2] < 1.4 * seconds[0]
    assert StepModel(some).layer("*") == StepModel(kept).layer("*")
    assert StepModel(some).layer("E") == StepModel(every).layer("E")


def test_gather_and_gradients() -> None:
    parallel = ParallelConfig(ep=8)
    plain = job_of(parallel)
    # One short micro-batch: its backward hides little.
    short = replace(plain, capacity=4096)
    overlapped = replace(short.engine, overlap_parameter_gather=True)
    assert StepModel(replace(short, engine=overlapped)).step().data < StepModel(short).step().data
    exposed = StepModel(plain).step().data
    half = job_of(parallel, gradients="bf16")
    assert worst_rank(half).gradients == pytest.approx(worst_rank(plain).gradients / 2, rel=0.01)
    assert StepModel(half).step().data < exposed


def test_the_shared_expert_hides_exchanges() -> None:
    """With it off, or by DeepEP's kernels, all of an exchange is exposed."""
    for ep in (8, 16):
        hidden, off, deepep = (
            StepModel(job_of(ParallelConfig(ep=ep), **settings)).layer("E")
            for settings in (
                {"overlap_shared_expert": "auto"},
                {},
                {"overlap_shared_expert": "auto", "expert_exchange": "deepep"},
            )
        )
        assert 0 < hidden.expert < off.expert
        assert hidden.compute == off.compute
        if ep == 8:  # but for one latency less
            assert deepep.expert == pytest.approx(off.expert, rel=1e-3)
    # The shared expert's activations live through the backward of the experts.
    memory = [
        worst_rank(job_of(ParallelConfig(ep=8), overlap_shared_expert=how)).peak
        for how in ("on", "off")
    ]
    assert memory[0] > memory[1]


def test_overlapped_tensor_parallelism() -> None:
    plain, overlapped = (
        StepModel(job_of(ParallelConfig(tp=4, ep=8), overlap_tensor_parallel=on))
        for on in (False, True)
    )
    for symbol in "M*E":
        before, after = plain.layer(symbol), overlapped.layer(symbol)
        assert 0.19 * before.tensor < after.tensor < 0.9 * before.tensor
        assert after.compute == before.compute


def test_bf16_moments_are_half_of_the_moments() -> None:
    """With the trained copy, 8 of 12 bytes a parameter are left."""
    job = job_of(ParallelConfig(ep=8))
    half = replace(job, optimizer=replace(job.optimizer, moments="bf16"))
    before, after = worst_rank(job).optimizer, worst_rank(half).optimizer
    assert after == pytest.approx(before * 8 / 12, rel=1e-3)
    assert StepModel(half).step().optimizer < StepModel(job).step().optimizer


@pytest.mark.parametrize(
    ("parallel", "settings", "message"),
    [
        ({}, {"overlap_shared_expert": "on"}, r"rows stay on their rank with ep(1) x etp(1)"),
        ({"ep": 8}, {"overlap_shared_expert": "on", "expert_exchange": "deepep"}, "run alone"),
        ({"ep": 8}, {"overlap_tensor_parallel": True}, "nothing is gathered with parallel.tp(1)"),
    ],
)
def test_overlaps_without_effect_are_rejected(
    parallel: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    job = job_of(ParallelConfig(**parallel), **settings)
    [problem] = job.problems()
    assert message in problem
    assert "set --engine.overlap-" in problem
    fitting = job_of(ParallelConfig(tp=2, ep=8), **(settings | {"expert_exchange": "auto"}))
    assert fitting.problems() == []


def test_no_shared_expert() -> None:
    engine, model = EngineConfig(overlap_shared_expert="on"), nemotron3_nano_30b()
    [problem] = engine.layout_problems(ParallelConfig(ep=2), replace(model, shared_expert_width=0))
    assert "the model has no shared expert" in problem


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"overlap_tensor_parallel": True, "device": "cpu"}, "its user buffers are on GPUs"),
        (
            {"overlap_tensor_parallel": True, "transformer_engine": "off"},
            "engine.transformer_engine(off), for they are its linears",
        ),
        ({"overlap_tensor_parallel": True, "linears": "fp8"}, "blockwise FP8 has no user buffers"),
        ({"overlap_tensor_parallel": True, "precision": "fp32"}, "user buffers are in bf16"),
        ({"recompute_layers": "MXE"}, "has 'X', which is not a kind of layer"),
        ({"recompute": True, "recompute_layers": "E"}, "has no effect, for engine.recompute"),
        ({"precision": "fp32", "gradients": "bf16"}, "needs bf16 weights"),
        ({"precision": "fp32", "expert_exchange": "deepep"}, "moves bf16 rows"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], message: str) -> None:
    [problem] = EngineConfig(**settings).problems()
    assert message in problem
    assert "set --" in problem or "use symbols" in problem
    assert job_of(ParallelConfig()).engine.problems() == []


def test_a_recipe_keeps_its_recomputed_layers() -> None:
    job = job_of(ParallelConfig(ep=8), recompute_layers="ME")
    moved = job.with_layout(job.parallel, recompute=False, recompute_layers="E")
    assert moved.engine.recomputed == "E"
    assert moved.engine == replace(job.engine, recompute_layers="E")
