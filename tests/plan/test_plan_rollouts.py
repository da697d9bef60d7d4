"""The planner's model of rollouts: memory, decode time, events, and steps of tiny runs."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import pytest

from nemocascade.megatron.generation.kv_cache import MOST_SLOTS, state_bytes
from nemocascade.plan import rollout_step
from nemocascade.plan.errors import PlanError
from nemocascade.plan.generation import DecodeTimeModel, StepTerms, cache_bytes
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import Job, job_of_recipe
from nemocascade.plan.lengths import Lengths, find_lengths
from nemocascade.plan.measured import read_run
from nemocascade.plan.memory import (
    Memory,
    available,
    resident_slots,
    state_bytes_on_host,
    with_slots,
    worst_rank,
)
from nemocascade.plan.replicas import DecodeGroup
from nemocascade.plan.rollout_events import RolloutEvents, Rollouts, RolloutTime
from nemocascade.plan.rollout_report import rollout_lines, step_lines
from nemocascade.plan.rollout_step import (
    RolloutStep,
    best_generation,
    expected_step,
    generation_jobs,
    generation_parallel,
    step_of,
)
from nemocascade.plan.search import faults, legal_layouts
from nemocascade.plan.settings import PlanSettings
from nemocascade.plan.summary import planned_job
from nemocascade.plan.workload import EpisodeCosts, RolloutAssumptions
from nemocascade.recipe import (
    CascadeRecipe,
    MopdRecipe,
    ParallelConfig,
    PolicyRecipe,
    RolloutParallelConfig,
    StageRecipe,
    load_any_recipe,
    nemotron3_nano_30b,
    parallel,
    tiny_policy,
)
from nemocascade.recipe.rules import number_problems
from nemocascade.stages.simulation import draw_rollouts, simulate_rollouts, simulated_step

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
RUNS = Path(__file__).parent / "tiny_runs"
IF = RolloutAssumptions(response_lengths="lognormal:8000:1.0")


def nano(name: str, ranks: int, assumed: RolloutAssumptions = IF) -> Job:
    recipe = load_any_recipe(RECIPES / "nemotron3_nano_30b" / f"{name}.py")
    assert not isinstance(recipe, CascadeRecipe)
    gpu = find_gpu("h200")
    return job_of_recipe(recipe, gpu, ranks, preset="nemotron3_nano_30b", assumed=assumed)


class Listed:
    """Requests that one replica takes as slots are free."""

    def __init__(self, count: int) -> None:
        self.left = list(range(count))
        self.reported: list[int] = []

    def poll(self, free_slots: int, busy: int) -> Any:
        self.taken, self.left = self.left[:free_slots], self.left[free_slots:]
        return type("Supply", (), {"taken": self.taken, "cancelled": ()})

    def check(self) -> None:
        pass

    def report(self, number: int, reward: float | None) -> None:
        self.reported.append(number)


class OneSecond:
    """A decode step takes a second, and a prefilled token a hundredth."""

    members = 1

    def step(self, rows: float, shared: float, cached: float) -> StepTerms:
        return StepTerms(host=1.0)

    def prefill(self, tokens: float) -> float:
        return tokens / 100


def play(
    lengths: Sequence[int], costs: EpisodeCosts, *, slots: int = 2, copies: int = 1
) -> RolloutTime:
    queue, group = Listed(len(lengths)), DecodeGroup(OneSecond(), slots)
    rollouts = Rollouts(copies, 100, lengths, [0.0] * len(lengths))
    time = RolloutEvents(rollouts, costs, [queue], [group]).run()
    assert sorted(queue.reported) == list(range(len(lengths)))
    assert abs(group.replicas[0].cached) < 1e-6
    assert group.replicas[0].occupied == group.replicas[0].rows == 0
    return time


def test_slots_are_refilled_and_prompts_prefilled_once() -> None:
    """By hand: two slots, lengths 3, 5, 4, prompts of one second each, or one for all copies."""
    apart = play([3, 5, 4], EpisodeCosts())
    # 2 s of prefill, 3 steps, 1 s of prefill while the second waits, 4 steps.
    assert apart.generation_s == 2 + 3 + 1 + 4
    assert apart.prefill_s == 3
    assert apart.tokens == 12
    assert play([3, 5, 4], EpisodeCosts(), copies=3).generation_s == 1 + 3 + 4


def test_verdicts_wait_for_cores_and_share_them() -> None:
    costs = EpisodeCosts(verify_s=12.0, cores=2)
    # Both texts end at 4 s; a core each. With three texts the last waits for the first.
    assert play([2, 2], costs).verify_s == 12
    assert play([2, 2, 2], costs, slots=3).verify_s == 24
    # Tests of one program run side by side,
    assert play([2], replace(costs, side=4)).verify_s == 6
    # and on the cores that another program leaves: no core is ever idle.
    assert play([2, 2, 2], replace(costs, cores=3, side=3), slots=3).verify_s == 12


def test_a_tool_leaves_the_slot_to_others() -> None:
    """Two episodes of two turns: while one calls, the other decodes."""
    costs = EpisodeCosts(turn=10, tool_share=0.2, most_turns=4, tool_s=100.0)
    alone = play([20], costs)
    # 1 s of prefill, 8 steps, the call, the result's prefill, the last turn.
    assert alone.generation_s == pytest.approx(1 + 8 + 100 + 0.02 + 10)
    both = play([20, 20], costs)
    assert both.generation_s < 1.2 * alone.generation_s
    assert both.tokens == 2 * 18


def test_memory_counts_tokens_and_states() -> None:
    """Nano: 6 attention layers of 2 heads of 128, 23 Mamba-2 layers of 64 x 64 x 128 states."""
    model = nemotron3_nano_30b()
    token = cache_bytes(model, model.pattern, 1, 2, sequences=0, tokens=1)
    assert token == 6 * 2 * 2 * 128 * 2
    state = cache_bytes(model, model.pattern, 1, 2, sequences=1, tokens=0)
    assert state == 23 * (64 * 64 * 128 * 4 + 3 * (4096 + 2 * 8 * 128) * 2)
    assert cache_bytes(model, model.pattern, 2, 2, sequences=1, tokens=1) == (token + state) / 2
    # More ranks than heads share a head.
    assert cache_bytes(model, model.pattern, 8, 2, sequences=0, tokens=1) == token / 2


def test_slots_that_follow_from_memory_are_those_that_fit() -> None:
    recipe = load_any_recipe(RECIPES / "nemotron3_nano_30b" / "if_rl.py")
    assert isinstance(recipe, PolicyRecipe)
    rollout = replace(recipe.rollout, slots=0, parallel=RolloutParallelConfig(tp=1, pp=1, ep=8))
    job = job_of_recipe(
        replace(recipe, rollout=rollout),
        find_gpu("h200"),
        64,
        preset="nemotron3_nano_30b",
        assumed=IF,
    )
    assert job.work is not None
    assert job.rollout.slots == -(-job.work.rollouts // 64) <= MOST_SLOTS
    fitting = with_slots(replace(job, rollout=replace(job.rollout, kv_gib=4.0)))
    # Half of the longest sequence, and its states, for each: no fewer than need the most.
    assert 0 < fitting.rollout.slots < job.rollout.slots
    assert resident_slots(fitting) == fitting.rollout.slots
    assert fitting.rollout.sequences == min(job.work.rollouts, 64 * fitting.rollout.slots)
    best = next(iter(generation_jobs(job)))
    assert 0 < best.rollout.slots <= MOST_SLOTS


def test_the_pool_takes_what_its_setting_allows() -> None:
    """The blocks that the engine allocates, beside the states of all slots. Too small a pool for
    all sequences costs time, and too small a pool for one is rejected."""
    job = nano("if_rl", 128)
    free = available(job) - (worst_rank(job).rollout - worst_rank(job).cache)

    def memory(**settings: Any) -> Memory:
        return worst_rank(with_settings(**settings))

    def with_settings(**settings: Any) -> Job:
        return replace(job, rollout=replace(job.rollout, **settings))

    many = {"length": 2_000_000, "live": 0.0}
    every = memory(**many, kv_memory_fraction=0.5)
    half = memory(**many, kv_memory_fraction=0.25)
    assert every.blocks is not None
    assert every.blocks.needed < every.blocks.pool < every.blocks.live
    assert every.cache - half.cache == pytest.approx(free / 4, rel=1e-3)
    own, width = generation_parallel(job), 2
    each = state_bytes(job.model, job.model.pattern, own.tp, width)
    # Besides the states of all slots, little more than the longest sequence and a prompt.
    few = with_settings(kv_gib=((job.rollout.slots + 2) * each.slot + 120_000 * each.token) / 2**30)
    assert faults(few) == []
    assert 1 <= resident_slots(few) < few.rollout.slots == resident_slots(job)
    slow, fast = expected_step(few), expected_step(job)
    assert slow.rollout.generation_s > fast.rollout.generation_s
    assert f"holds {resident_slots(few)} of {few.rollout.slots}" in "".join(step_lines(slow))
    assert "holds" not in "".join(step_lines(fast))
    [fault] = faults(with_settings(kv_gib=0.01))
    assert "--rollout.kv-gib" in fault


def test_named_rollouts_take_the_rest_from_the_recipe() -> None:
    settings = PlanSettings(
        recipe="", gpu="h200", gpus=64, model="nemotron3_nano_30b", rollout_sequences=512
    )
    recipes = [
        load_any_recipe(RECIPES / "nemotron3_nano_30b" / f"{n}.py") for n in ("if_rl", "sft")
    ]
    if_rl, sft = cast(list[StageRecipe], recipes)
    assert isinstance(if_rl, PolicyRecipe)
    rollout, own = planned_job(if_rl, settings).rollout, if_rl.rollout
    assert rollout.length == own.max_prompt_tokens + own.max_response_tokens
    replicas = own.parallel.layout(if_rl.parallel).data_parallel(64)
    assert rollout.sequences == 512
    assert rollout.slots == 512 // replicas
    short = planned_job(if_rl, replace(settings, rollout_sequences=0, rollout_length=4096)).rollout
    assert (short.length, short.live) == (4096, 0.0)
    with pytest.raises(PlanError, match="--rollout-length 0 must both be above 0"):
        planned_job(sft, settings)


def test_phases_add_what_stands() -> None:
    memory = worst_rank(nano("if_rl", 128))
    standing = memory.parameters + memory.gradients + memory.optimizer + memory.buffers
    standing += memory.other
    assert memory.training == standing + memory.activations + memory.peak
    assert memory.rollout == standing + memory.weights + memory.cache > standing
    assert memory.total == max(memory.training, memory.rollout)
    assert memory.weights > 0
    job = nano("if_rl", 128)
    away = worst_rank(replace(job, rollout=replace(job.rollout, offload=True)))
    assert away.rollout == memory.rollout - memory.gradients - memory.optimizer
    assert away.training == memory.training


def test_decode_time_follows_bytes_launches_and_ranks() -> None:
    job = nano("if_rl", 128)
    alone = DecodeTimeModel(job, ParallelConfig())
    one, many = alone.step(1, 1, 1000), alone.step(64, 64, 64_000)
    # One row reads 3.2 B active parameters; the embedding is not read.
    assert one.weights * 4080e9 == pytest.approx(2 * 3.2e9, rel=0.1)
    assert many.weights < 10 * one.weights
    assert many.cache == 64 * one.cache
    assert many.launches == one.launches
    eager = DecodeTimeModel(replace(job, gpu=find_gpu("cpu")), ParallelConfig())
    assert eager.step(1, 1, 1).launches > 5 * one.launches
    shared = DecodeTimeModel(job, ParallelConfig(ep=8))
    assert shared.members == 8
    # Rows of eight replicas read each expert once.
    assert shared.step(8, 64, 8000).weights < alone.step(8, 8, 8000).weights
    assert shared.step(8, 64, 8000).collectives > alone.step(8, 8, 8000).collectives == 0
    assert alone.prefill(16_000) > 1.9 * alone.prefill(8000)


def test_lengths_are_read_and_rejected(tmp_path: Path) -> None:
    lengths = find_lengths("lognormal:8000:1.0", 49_152)
    assert lengths.evenly(1001)[500] == 8000
    assert max(lengths.evenly(2048)) == 49_152
    assert 11_000 < lengths.mean < 13_000
    assert lengths.token_mean() > lengths.mean
    assert find_lengths("", 6000).median == 1000
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"response_tokens_deciles": [0, 10, *range(20, 110, 10)]}) + "\n")
    assert find_lengths(str(path), 60).evenly(2) == [24, 60]
    assert Lengths(60, points=(0.0, 100.0)).evenly(1) == [50]
    for bad in ("lognormal:8000", "lognormal:x:1", "lognormal:0:1", "lognormal:nan:1", "none"):
        with pytest.raises(PlanError, match="lognormal:MEDIAN:DEVIATION"):
            find_lengths(bad, 100)


@pytest.mark.parametrize(("name", "ranks"), [("if_rl", 256), ("swe_agentic_rl", 64)])
def test_the_expected_step_is_near_simulated_ones(name: str, ranks: int) -> None:
    job = nano(name, ranks)
    simulated = [simulated_s(name, ranks, seed) for seed in (1, 2)]
    assert simulated[0] != simulated[1]
    assert fmean(simulated) == pytest.approx(expected_step(job).total, rel=0.1)


@functools.cache
def simulated_s(name: str, ranks: int, seed: int) -> float:
    job = nano(name, ranks)
    return step_of(job, simulate_rollouts(job, seed)).total


def test_a_seed_simulates_the_same_step() -> None:
    job = nano("if_rl", 64)
    assert simulate_rollouts(job, 1) == simulate_rollouts(job, 1)


def test_if_at_256_gpus_takes_at_most_270_s() -> None:
    """Simulated, with dynamic filtering at a share of 0.6, on the recipe's own layouts."""
    assert fmean(simulated_s("if_rl", 256, seed) for seed in (1, 2, 3)) <= 270


def test_a_search_checks_each_layout_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the layout of generation again for each one of training."""
    job, checked = nano("if_rl", 64), []

    def counted(settings: Any, name: str) -> list[str]:
        checked.append(settings)
        return number_problems(settings, name)

    monkeypatch.setattr(parallel, "number_problems", counted)
    legal = {found.parallel for found in legal_layouts(job)}
    assert len(set(checked)) > len(legal) > 50
    assert len(checked) - len(set(checked)) < 10


def test_the_best_generation_fits_and_offloads_where_it_must() -> None:
    job = nano("if_rl", 128)
    step = best_generation(job)
    assert step is not None
    assert not step.job.rollout.offload
    # Whole weights, 59 GiB, beside weights and gradients of 24 GiB, fit without the latter.
    small = replace(job, gpu=replace(job.gpu, memory_gib=92.0))
    found = {
        generation_parallel(each).ep: each.rollout.offload
        for each in generation_jobs(small.with_layout(job.parallel, recompute=True))
        if generation_parallel(each).tp == generation_parallel(each).pp == 1
    }
    assert found[1]
    assert not found[8]


def test_no_generation_is_faster_than_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most layouts are ruled out by the replicas of the longest text, and need no simulation."""
    job = nano("if_rl", 128)
    assert job.work is not None
    job = replace(job, work=replace(job.work, wanted=16))
    steps = [expected_step(found) for found in generation_jobs(job)]
    priced: list[Job] = []

    def counted(found: Job) -> RolloutStep:
        priced.append(found)
        return expected_step(found)

    monkeypatch.setattr(rollout_step, "expected_step", counted)
    best = best_generation(job)
    assert best is not None
    assert best.total == min(step.total for step in steps)
    assert 1 <= len(priced) <= len(steps) // 4


def test_a_drawing_stops_what_cannot_train() -> None:
    """Simulated rollouts with a filter generate more than without, and less than all candidates."""
    job = nano("if_rl", 64)
    assert job.work is not None
    all_of = draw_rollouts(job.work, 1)
    plain = replace(job, work=replace(job.work, most=0))
    with_filter, without = simulate_rollouts(job, 1), simulate_rollouts(plain, 1)
    assert without.tokens < with_filter.tokens < 0.7 * sum(all_of.lengths)
    assert with_filter.seconds < 1.4 * without.seconds


def test_the_table_of_steps_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(RECIPES.parent / "tools"))
    step_table = importlib.import_module("step_table")
    lines = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text().splitlines()
    for name, ranks in (("if_rl", 256), ("mopd", 64), ("code_rl", 1024), ("swe_agentic_rl", 64)):
        assert step_table.row(name, ranks) in lines


def shares(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Measured shares of a step's time."""
    total = {key: sum(row[key] for row in rows) for key in rows[0] if key.endswith("_s")}
    waits = total["idle_time_s"] + total["verify_wait_s"]
    return {
        "generation": (total["generation_time_s"] - total["idle_time_s"]) / total["step_time_s"],
        "verification": waits / total["step_time_s"],
        "training": total["train_time_s"] / total["step_time_s"],
    }


@pytest.mark.parametrize("name", ["if_rl", "code_rl", "multi_domain_rl"])
def test_shares_of_later_steps_follow_from_the_first(name: str, tmp_path: Path) -> None:
    """Recorded tiny runs on two CPU cores: costs of the first five steps, and lengths and the share
    of informative groups of the last five, give their shares of time within 20 %."""
    rows = [json.loads(line) for line in (RUNS / f"{name}.jsonl").read_text().splitlines()]
    first, last = tmp_path / "first.jsonl", tmp_path / "last.jsonl"
    first.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    last.write_text("".join(json.dumps(row) + "\n" for row in rows[5:]))
    assumed = RolloutAssumptions(
        response_lengths=str(last),
        informative_share=fmean(r["groups"] for r in rows[5:])
        / fmean(r["groups_drawn"] for r in rows[5:]),
    )
    recipe = load_any_recipe(RECIPES / "tiny" / f"{name}.py")
    assert not isinstance(recipe, CascadeRecipe)
    job = job_of_recipe(recipe, find_gpu("cpu"), 1, model=tiny_policy(), assumed=assumed)
    assert job.work is not None
    run = read_run(str(first), job.work, 1, job.round_tokens, lengths=False, share=False)
    steps = [simulated_step(job, run, seed) for seed in (1, 2, 3)]
    total = sum(step.total for step in steps)
    found = {
        "generation": sum(step.rollout.generation_s for step in steps) / total,
        "verification": sum(step.rollout.verify_s for step in steps) / total,
        "training": sum(step.training for step in steps) / total,
    }
    for phase, share in shares(rows[5:]).items():
        assert found[phase] == pytest.approx(share, rel=0.2, abs=0.02), phase


def test_dropped_sequences_are_prefilled_and_not_trained(tmp_path: Path) -> None:
    """Prompts of 60 tokens, responses of 40, and a filter that drops half of all sequences."""
    row = {
        "response_tokens": 40.0,
        "response_tokens_deciles": [40.0] * 11,
        "groups": 16,
        "groups_drawn": 24,
        "groups_ahead": 0,
        "tokens": 16 * 8 * 100 // 2,
        "decode_steps": 40.0,
        "decode_rows": 7680.0,
        "decode_time_s": 0.4,
        "idle_time_s": 0.0,
        "prefill_tokens": 24 * 60,
        "prefill_time_s": 0.6,
        "generation_time_s": 1.0,
        "verify_wait_s": 0.0,
        "verify_time_s": 0.01,
        "verdicts": 192.0,
        "verifier_slots": 2,
        "train_time_s": 0.32,
        "step_time_s": 1.4,
    }
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, **row}) + "\n" for n in (2, 3, 4)))
    recipe = load_any_recipe(RECIPES / "tiny" / "multi_domain_rl.py")
    assert not isinstance(recipe, CascadeRecipe)
    job = job_of_recipe(recipe, find_gpu("cpu"), 1, model=tiny_policy())
    assert job.work is not None
    work = replace(job.work, wanted=16, copies=8, most=0)
    run = read_run(str(path), work, 1, job.round_tokens)
    assert run.work.prompt == 60
    assert run.kept == 0.5
    assert run.costs.prefill(60) == pytest.approx(0.6 / 24)
    step = simulated_step(replace(job, work=work), run, 1)
    # Four rounds of 2,048 rows hold 6,400 tokens; steps of other sizes need half of one more.
    assert run.train_s == pytest.approx(0.32 / 4)
    assert step.training == pytest.approx(0.08 * (6400 / 2048 + 0.5), rel=0.02)
    assert step.rollout.prefill_s == pytest.approx(16 * 0.6 / 24)


def test_a_run_without_measurements_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n')
    work = nano("if_rl", 128).work
    assert work is not None
    with pytest.raises(PlanError, match=r"rollout\.engine live"):
        read_run(str(path), work, 1, 2048)


def test_an_exact_divergence_is_planned() -> None:
    """Bytes by hand: the states of generated tokens, two heads of three, and both logits."""
    sampled = nano("mopd", 128)
    assert sampled.work is not None
    exact = replace(sampled, work=replace(sampled.work, exact=True))
    shape, tp = exact.model, exact.parallel.tp
    assert (exact.exact_teachers, sampled.exact_teachers) == (3, 0)
    rows = 128 * 4 * sampled.work.lengths.mean / exact.parallel.data_parallel(128)
    assert state_bytes_on_host(exact) == pytest.approx(2 * rows * shape.hidden_size)
    assert state_bytes_on_host(sampled) == 0
    heads = 3 * shape.vocab_size // tp * shape.hidden_size * 2
    before, after = worst_rank(sampled), worst_rank(exact)
    assert after.training - before.training >= heads
    assert after.rollout == before.rollout
    lines = "\n".join(rollout_lines(exact, None, ()))
    assert (
        "GiB of host memory on each rank of the last stage, the heads of 3 on its device" in lines
    )
    assert "hidden states" not in "\n".join(rollout_lines(sampled, None, ()))
    recipe = load_any_recipe(RECIPES / "nemotron3_nano_30b" / "mopd.py")
    assert isinstance(recipe, MopdRecipe)
    named = replace(recipe, mopd=replace(recipe.mopd, divergence="reverse_kl"))
    job = job_of_recipe(named, find_gpu("h200"), 128, preset="nemotron3_nano_30b", assumed=IF)
    assert job.exact_teachers == 3
