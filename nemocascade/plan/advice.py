"""Advice of `nemocascade plan`: the flags of the best layout, how far the recipe's own is from it,
and what limits it."""

from __future__ import annotations

from typing import Any

from nemocascade.plan.job import Job
from nemocascade.plan.memory import GIB, available
from nemocascade.plan.rollout_step import RolloutStep, generation_parallel
from nemocascade.plan.search import AXES, FoundLayouts, PricedLayout

SAME = 1.01
"""Ratio of times below which two layouts count as equally fast."""
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
