"""Report of the step of an RL or MOPD recipe: its phases, what bounds it, its layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nemocascade.plan.job import Job
from nemocascade.plan.memory import GIB, resident_slots, state_bytes_on_host, worst_rank
from nemocascade.plan.rollout_step import RolloutStep, generation_parallel
from nemocascade.plan.workload import StepWork


def rollout_lines(job: Job, own: RolloutStep | None, best: Sequence[RolloutStep]) -> list[str]:
    """Lines of a report. own: the step on the recipe's layouts. best: on others, fastest first."""
    assert job.work is not None
    lines = [work_line(job.work)]
    if job.exact_teachers:
        lines.append(
            f"Teachers' hidden states: {state_bytes_on_host(job) / GIB:.1f} GiB of host memory on "
            f"each rank of the last stage, the heads of {job.exact_teachers} on its device"
        )
    if own is not None:
        lines += ["The expected step on the recipe's layouts:", *step_lines(own)]
    if best:
        lines += ["The fastest step over both layouts:", *step_lines(best[0])]
    return lines


def work_line(work: StepWork) -> str:
    """The assumptions about a step's rollouts."""
    drawn = f"{work.wanted} x {work.copies} rollouts"
    if work.most:
        drawn += f" of informative prompts, a share of {work.share:.2g}"
    costs = work.costs
    turns = f", turns of {costs.turn:,} tokens and {costs.tool_s:g} s a call" if costs.turn else ""
    return (
        f"Assumed: {drawn}; prompts of {work.prompt:,} tokens; responses {work.lengths.describe()}"
        f"{turns}; verdicts of {costs.verify_s:.3g} core s on {costs.cores} cores a rank"
    )


def step_lines(step: RolloutStep) -> list[str]:
    """The layouts of a step, its phases, and what bounds it."""
    own, job, rollout = generation_parallel(step.job), step.job, step.rollout
    replicas = max(1, own.data_parallel(job.world_size))
    lines = [
        f"  training {_layout(step)}; generation tp {own.tp} pp {own.pp} ep {own.ep}, "
        f"{replicas} replicas of {job.rollout.slots} slots"
        + (", training offloaded" if job.rollout.offload else ""),
        "  | phase | s | share |",
        "  |---|---|---|",
    ]
    if (resident := resident_slots(job)) < job.rollout.slots:
        lines.insert(
            1,
            f"  The KV cache holds {resident} of {job.rollout.slots} sequences at their average "
            "length, and the others wait in host memory: set --rollout.kv-gib higher, or "
            f"--rollout.slots {resident}",
        )
    lines += [f"  | {n} | {s:.1f} | {s / step.total:.1%} |" for n, s in step.phases()]
    lines.append(f"  | all | {step.total:.1f} | |")
    if rollout.steps:
        ms = 1e3 * rollout.terms.total / rollout.steps
        terms = sorted(rollout.terms._asdict().items(), key=lambda each: -each[1])
        shares = ", ".join(f"{n} {v / rollout.terms.total:.0%}" for n, v in terms if v)
        lines.append(
            f"  The last replica decodes {rollout.steps:,} steps of {ms:.2f} ms ({shares}) and "
            f"prefills for {rollout.prefill_s:.1f} s; replicas are idle for {rollout.idle:.0%}."
        )
    return lines


def step_json(step: RolloutStep) -> dict[str, Any]:
    """A step as JSON values."""
    own, rollout = generation_parallel(step.job), step.rollout
    memory = worst_rank(step.job)
    return {
        "parallel": dataclasses.asdict(step.job.parallel),
        "recompute": step.job.engine.recompute,
        "recompute_layers": step.job.engine.recompute_layers,
        "rollout_parallel": {axis: getattr(own, axis) for axis in ("tp", "pp", "ep")},
        "offload": step.job.rollout.offload,
        "phases_gib": dict(memory.phases()),
        "memory_gib": memory.total / GIB,
        "step_s": step.total,
        "phases_s": dict(step.phases()),
        "replicas_idle": rollout.idle,
        "decode_steps": rollout.steps,
        "decode_terms_s": rollout.terms._asdict(),
    }


def _layout(step: RolloutStep) -> str:
    p = step.job.parallel
    sizes = " ".join(
        f"{axis} {getattr(p, axis)}" for axis in ("tp", "cp", "pp", "vpp", "ep", "etp")
    )
    engine = step.job.engine
    return sizes + (f" {engine.recomputed_text}" if engine.recomputed else "")
