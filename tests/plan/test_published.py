"""The planner beside published runs, and the tables of docs/ that tools make of it."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemocascade.plan.advice import bf16_advice, bf16_lines
from nemocascade.plan.generation import GRAPH_KERNEL_S, NODE_LATENCY_S, DecodeTimeModel
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.host_time import (
    DISPATCH_OPERATORS,
    EXCHANGES,
    OPERATOR_S,
    OPERATORS,
    RECOMPUTED,
)
from nemocascade.plan.job import Job
from nemocascade.plan.memory import GIB, available, fits, worst_rank
from nemocascade.plan.search import FoundLayouts, price, search
from nemocascade.plan.timing import StepModel
from nemocascade.recipe import (
    EngineConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    nemotron3_nano_30b,
)

ROOT = Path(__file__).resolve().parents[2]
HEAD = ("linear_head", "linear_policy_loss", "pipeline_parallel", "model.py", "schedule.py")
HEAD_FILES = ("evaluation.py", "products.py")


def tool(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module(name)


def test_predictions_are_in_range_save_for_known_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A miss that has come into the range is not a miss any more, and loses its reason."""
    published = tool("published_table", monkeypatch)
    least, most = published.RANGE
    assert len(published.RUNS) >= 12
    for run in published.RUNS:
        speed, _ = run.predicted()
        inside = least <= speed / run.published <= most
        assert inside == (not run.miss), f"{run.name}: {speed:.0f} / {run.published:.0f}"
        assert run.source.startswith("https://"), run.name
    assert sum(bool(run.miss) for run in published.RUNS) <= len(published.RUNS) / 3


def test_eight_gpus_need_no_sharded_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Micro-batches of one sequence fit with bf16 moments and gradients at the published speed, and
    those of four do not: docs/decisions.md says so."""
    run = tool("published_table", monkeypatch).RUNS[0]
    engine = replace(run.job.engine, recompute=False, gradients="bf16")
    four = replace(run.job, engine=engine, optimizer=OptimizerConfig(moments="bf16"))
    one = replace(four, capacity=run.sequence, sequences_per_step=run.batch)
    assert fits(one, worst_rank(one))
    assert not fits(four, worst_rank(four))
    whole = replace(one, optimizer=OptimizerConfig())
    assert not fits(whole, worst_rank(whole))
    step = StepModel(one, pack_imbalance=1.0).step()
    assert step.tokens / step.total / run.gpus > 0.97 * run.published


def test_the_plan_of_eight_gpus_advises_moments_and_gradients_in_bf16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tool("published_table", monkeypatch).RUNS[0]
    job = replace(
        run.job, engine=EngineConfig(), capacity=run.sequence, sequences_per_step=run.batch
    )

    def advised(job: Job) -> dict[str, Any]:
        return bf16_advice(job, search(job, count=1))

    found = search(job, count=1)
    advice = bf16_advice(job, found)
    speed = found.best[0].tokens_per_s_per_gpu / run.published
    assert speed < 0.25
    assert 0.9 < speed * advice["speedup"] < 1.1
    assert "--parallel.ep 8 " in advice["flags"]
    assert advice["flags"].endswith(
        "--engine.recompute False --optimizer.moments bf16 --engine.gradients bf16"
    )
    assert advice["memory_gib"] < available(job) / GIB < advice["own_gib"]
    text = "\n".join(bf16_lines(advice))
    assert f"{advice['speedup']:.2f} times as fast" in text
    assert f"{advice['memory_gib']:.1f} GiB, and {advice['own_gib']:.1f} with the recipe's" in text
    # AdamW's betas may forbid moments in bf16.
    advice = advised(replace(job, optimizer=replace(job.optimizer, beta2=0.999)))
    assert advice["flags"].endswith(" False --engine.gradients bf16")
    # Nothing is rounded where that gains little.
    assert advised(replace(job, gpu=find_gpu("h200"))) == {}
    fp32 = replace(job, engine=EngineConfig(precision="fp32"))
    assert bf16_advice(fp32, FoundLayouts([], None)) == {}
    # Moments alone suffice where the layout then fits.
    large = replace(job, gpu=replace(job.gpu, memory_gib=89.0))
    slow, fast = (price(large.with_layout(large.parallel, recompute=r)) for r in (True, False))
    assert (slow.fits, fast.fits) == (True, False)
    engine = replace(fast.job.engine, gradients="bf16")
    small = replace(fast.job, engine=engine, optimizer=OptimizerConfig(moments="bf16"))
    again = FoundLayouts([price(small)], None)
    monkeypatch.setattr("nemocascade.plan.advice.search", lambda *_, **__: again)
    advice = bf16_advice(large, FoundLayouts([slow], fast))
    assert advice["flags"].endswith(" False --optimizer.moments bf16")


def test_bf16_may_be_all_that_lets_a_job_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tool("published_table", monkeypatch).RUNS[0]
    job = replace(run.job, capacity=run.sequence, sequences_per_step=run.batch)
    small = replace(job, gpu=replace(job.gpu, memory_gib=64.0))
    advice = bf16_advice(small, search(small, count=1))
    assert advice["speedup"] is None
    assert "a layout fits" in bf16_lines(advice)[0]


@pytest.mark.parametrize("name", ["published_table", "exchange_table"])
def test_the_tables_of_the_documents_are_those_of_their_tools(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tool(name, monkeypatch)
    assert module.main(["--check"]) == 0, f"run python tools/{name}.py"


def operators_of(case: str) -> tuple[int, int]:
    """Operators of a micro-batch of the dry run outside of the LM head, and all."""
    budgets = json.loads((ROOT / "tests" / "gpu_dry" / "budgets.json").read_text())
    counted = budgets["cases"][case]["parts"]["micro-batch"]["operator"]
    rest = {
        file: number
        for file, number in counted.items()
        if not any(part in file for part in HEAD) and not file.endswith(HEAD_FILES)
    }
    return sum(rest.values()), sum(counted.values())


@pytest.mark.parametrize(("symbol", "case"), [("M", "mamba"), ("*", "attention"), ("E", "moe")])
def test_operators_are_those_of_the_dry_run(symbol: str, case: str) -> None:
    assert OPERATORS[symbol] == pytest.approx(operators_of(f"nano-{case}")[0], rel=0.05)


def test_further_operators_are_those_of_the_dry_run() -> None:
    own, all_of = operators_of("nano-moe")
    again = operators_of("nano-moe-recompute")[1] - all_of
    assert pytest.approx(again / own, abs=0.03) == RECOMPUTED
    more = operators_of("sft-ep2")[1] - operators_of("sft")[1]
    assert pytest.approx(more, rel=0.05) == DISPATCH_OPERATORS
    budgets = json.loads((ROOT / "tests" / "gpu_dry" / "budgets.json").read_text())
    found = budgets["cases"]["sft-ep2"]["parts"]["micro-batch"]["collective"]
    assert found["alltoall_base tp_ep"] == EXCHANGES["direct"]


def graph_of(case: str) -> tuple[int, int]:
    """Kernels and collectives of the dry run's captured decode step."""
    budgets = json.loads((ROOT / "tests" / "gpu_dry" / "budgets.json").read_text())
    graph = budgets["cases"][case]["parts"]["graph"]
    kernels = sum(sum(graph[kind].values()) for kind in ("launch", "operator"))
    return kernels, sum(graph.get("collective", {}).values())


@pytest.mark.parametrize(
    ("case", "pattern", "parallel"),
    [
        ("rollout", "M*E-", ParallelConfig()),
        ("rollout-tp2", "M*E-", ParallelConfig(tp=2)),
        ("rollout-ep2", "M*E-", ParallelConfig(ep=2)),
        ("rollout-tp2_ep2", "M*E-", ParallelConfig(tp=2, ep=2)),
        ("nano-rollout", "M*E", ParallelConfig()),
        ("nano-rollout-tp8", "M*E", ParallelConfig(tp=8, ep=8)),
    ],
)
def test_a_decode_step_is_the_captured_one_of_the_dry_run(
    case: str, pattern: str, parallel: ParallelConfig
) -> None:
    """`tests/gpu_dry/test_gpu_dry.py` compares the kernels of each kind of layer."""
    small = replace(job(512), model=replace(nemotron3_nano_30b(), pattern=pattern))
    step = DecodeTimeModel(replace(small, world_size=8), parallel).step(0, 0, 0)
    kernels, collectives = graph_of(case)
    assert step.launches / GRAPH_KERNEL_S == pytest.approx(kernels)
    assert step.collectives / NODE_LATENCY_S == pytest.approx(collectives)


def job(capacity: int, **engine: Any) -> Job:
    return Job(
        model=nemotron3_nano_30b(),
        parallel=ParallelConfig(ep=8),
        engine=EngineConfig(**engine),
        moe=MoeTrainingConfig(),
        optimizer=OptimizerConfig(),
        capacity=capacity,
        sequences_per_step=64,
        gpu=find_gpu("h100"),
        world_size=64,
    )


def test_the_host_bounds_small_micro_batches_alone() -> None:
    small, large = StepModel(job(512)), StepModel(job(16_384))
    assert large.step().host == 0
    # A micro-batch takes as long as its launches, whatever its tokens.
    launches = 23 * (OPERATORS["M"] + OPERATORS["E"] + DISPATCH_OPERATORS) + 6 * OPERATORS["*"]
    assert small.slowest.total == pytest.approx(OPERATOR_S * launches)
    assert StepModel(job(256)).slowest.total == pytest.approx(small.slowest.total)


def test_exchanges_have_a_latency() -> None:
    """Without rows there would be nothing to move; two hops have more exchanges and waits."""
    few = StepModel(job(64)).layer("E").expert
    assert few > 5 * 12e-6 + 20e-6
    assert StepModel(job(64, recompute=True)).layer("E").expert > few
