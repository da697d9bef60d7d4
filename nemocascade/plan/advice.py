"""Advice of `nemocascade plan`: the flags of the best layout, how far the recipe's own is from it,
and what limits it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from nemocascade.plan.job import Job
from nemocascade.plan.memory import GIB, available, worst_rank
from nemocascade.plan.rollout_step import RolloutStep, generation_parallel
from nemocascade.plan.search import AXES, FoundLayouts, PricedLayout, price, search
from nemocascade.plan.timing import LayerCosts

SAME = 1.01
"""Ratio of times below which two layouts count as equally fast."""
CLEAR = 1.1
"""Least ratio of times for which the advice is to round moments and gradients to bf16."""
NAMED = 3
"""Parts of a step that are named as its limits."""


def layout_flags(job: Job, own: Job, prefix: str = "") -> str:
    """The settings of a job's layout, to paste behind the recipe's. own: the recipe's job, of whose
    packs those of `job` may differ. prefix: of the names, `stages.sft.` in a cascade."""
    p = job.parallel
    parts = {f"parallel.{axis}": str(getattr(p, axis)) for axis in AXES}
    if p.pipeline_layout or own.parallel.pipeline_layout:
        parts["parallel.pipeline-layout"] = f"'{p.pipeline_layout}'"
    parts["engine.recompute"] = str(job.engine.recompute)
    if (kinds := job.engine.recompute_layers) or own.engine.recompute_layers:
        parts["engine.recompute-layers"] = f"'{kinds}'"
    if job.work is None and job.capacity != own.capacity:
        parts["data.capacity"] = str(job.capacity)
        parts["data.sequences-per-step"] = str(job.sequences_per_step)
    return " ".join(f"--{prefix}{name} {value}" for name, value in parts.items())


def step_flags(step: RolloutStep, own: Job, prefix: str = "") -> str:
    """The settings of a step's layouts of training and generation; see `layout_flags`."""
    rollouts = generation_parallel(step.job)
    parts = {f"parallel.{axis}": getattr(rollouts, axis) for axis in ("tp", "pp", "ep")}
    parts["offload"] = step.job.rollout.offload
    flags = " ".join(f"--{prefix}rollout.{name} {value}" for name, value in parts.items())
    return f"{layout_flags(step.job, own, prefix)} {flags}"


def layout_advice(
    job: Job, own: PricedLayout | None, found: FoundLayouts, prefix: str = ""
) -> dict[str, Any]:
    """Advice on the layout of training: `flags`, `speedup` (the own step's seconds by the best's;
    None if the own cannot run), `limits` and `excluded`, which are texts. Empty if nothing fits."""
    if not found.best:
        return {}
    best = found.best[0]
    memory, have = best.memory, available(job) / GIB
    name, largest = max(memory.table(), key=lambda part: part[1])
    limits = f"{_shares(best.time.table(), best.time.total)} of the step"
    limits += f"; memory {memory.total / GIB:.1f} of {have:.1f} GiB, most of it {name} "
    limits += f"({largest:.1f})"
    return {
        "flags": layout_flags(best.job, job, prefix),
        "speedup": own and own.time.total / best.time.total,
        "limits": limits,
        "excluded": _excluded(best, found.excluded),
    }


def step_advice(
    job: Job, own: RolloutStep | None, best: RolloutStep, prefix: str = ""
) -> dict[str, Any]:
    """Advice on the layouts of a step of rollouts and training; see `layout_advice`."""
    limits = f"{_shares(best.phases(), best.total)} of the step"
    terms = best.rollout.terms
    if terms.total:
        limits += f"; a decode step is {_shares(list(terms._asdict().items()), terms.total)}"
    return {
        "flags": step_flags(best, job, prefix),
        "speedup": own and own.total / best.total,
        "limits": limits,
        "excluded": "",
    }


def bf16_advice(
    job: Job,
    found: FoundLayouts,
    prefix: str = "",
    *,
    longest: int = 0,
    layers: LayerCosts | None = None,
) -> dict[str, Any]:
    """Advice to store AdamW's moments or gradients in bf16, if a layout is then clearly faster than
    the best with the job's own: `flags`, `speedup` (None if nothing fits without), and the worst
    rank's `memory_gib` and, with the job's own moments and gradients, `own_gib`. Empty otherwise.

    found: layouts with the job's own. longest, layers: of their search. For bf16 on GPUs.
    """
    choices = _rounded(job) if job.on_gpu and job.engine.precision == "bf16" else []
    if not choices:
        return {}
    own = found.best[0] if found.best else None
    below = own.time.total / CLEAR if own else math.inf
    # The messages of gradients alone may be worth it. Less memory helps layouts that did not fit.
    best = price(_with(own.job, choices[-1])) if own else None
    excluded = found.excluded
    if own is None or (excluded is not None and excluded.time.total < below):
        smaller = _with(job, choices[-1])
        more = search(smaller, count=1, longest=longest, below=below, layers=layers).best
        best = min([*more, *([best] if best else [])], key=lambda p: p.time.total, default=None)
    if best is None or best.time.total > below:
        return {}
    # One of the two may suffice.
    for choice in choices[:-1]:
        one = price(_with(best.job, {**_own(job), **choice}))
        if one.fits and one.time.total < best.time.total * SAME:
            best = one
            break
    before, after = _own(job), _own(best.job)
    changed = [f"--{prefix}{name} bf16" for name in before if before[name] != after[name]]
    return {
        "flags": " ".join([layout_flags(best.job, job, prefix), *changed]),
        "speedup": own and own.time.total / best.time.total,
        "memory_gib": best.memory.total / GIB,
        "own_gib": worst_rank(_with(best.job, _own(job))).total / GIB,
    }


def _rounded(job: Job) -> list[dict[str, str]]:
    """Settings that round the job's moments or gradients to bf16, each alone; all come last."""
    names = [name for name, value in _own(job).items() if value == "fp32"]
    # AdamW's betas may forbid it.
    if "optimizer.moments" in names and replace(job.optimizer, moments="bf16").problems():
        names.remove("optimizer.moments")
    found = [{name: "bf16"} for name in names]
    return [*found, dict.fromkeys(names, "bf16")] if len(found) > 1 else found


def _own(job: Job) -> dict[str, str]:
    """Precisions of the job's moments and gradients by their settings."""
    return {
        "optimizer.moments": job.optimizer.moments,
        "engine.gradients": job.engine.gradients,
    }


def _with(job: Job, precisions: dict[str, str]) -> Job:
    """The job with other precisions of moments and gradients, by their settings."""
    chosen: dict[str, Any] = {**_own(job), **precisions}
    return replace(
        job,
        optimizer=replace(job.optimizer, moments=chosen["optimizer.moments"]),
        engine=replace(job.engine, gradients=chosen["engine.gradients"]),
    )


def bf16_lines(advice: dict[str, Any]) -> list[str]:
    """Lines of a report on `bf16_advice`."""
    if not advice:
        return []
    speedup = advice["speedup"]
    gain = "a layout fits" if speedup is None else f"a layout is {speedup:.2f} times as fast"
    return [
        f"With moments or gradients in bf16, {gain}; they are rounded to 8 bits. Its worst rank "
        f"needs {advice['memory_gib']:.1f} GiB, and {advice['own_gib']:.1f} with the recipe's. "
        "To paste:",
        f"  {advice['flags']}",
    ]


def advice_lines(advice: dict[str, Any]) -> list[str]:
    """Lines of a report."""
    if not advice:
        return []
    speedup = advice["speedup"]
    if speedup is None:
        head = "The recipe's layout cannot run; the fastest one, to paste:"
    elif speedup < SAME:
        head = "The recipe's layout is as fast as the fastest one:"
    else:
        head = f"The fastest layout is {speedup:.2f} times as fast as the recipe's; to paste:"
    lines = [head, f"  {advice['flags']}", f"It is limited by: {advice['limits']}."]
    return lines + ([advice["excluded"]] if advice["excluded"] else [])


def _shares(parts: list[tuple[str, float]], total: float) -> str:
    """The largest parts of a total, in percent."""
    largest = sorted(parts, key=lambda part: -part[1])[:NAMED]
    return ", ".join(f"{name} {value / total:.0%}" for name, value in largest if value)


def _excluded(best: PricedLayout, excluded: PricedLayout | None) -> str:
    """The fastest layout that does not fit, if it would be faster than the best one."""
    if excluded is None or excluded.time.total * SAME > best.time.total:
        return ""
    gain = best.time.total / excluded.time.total
    return (
        f"Memory excludes {excluded.describe()}, which is {gain:.2f} times as fast and needs "
        f"{excluded.memory.total / GIB:.1f} GiB."
    )
