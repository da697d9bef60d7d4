"""Tables of docs/parallelism.md: `python -m nemocascade.plan.tables [gpu ...]`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import Job
from nemocascade.plan.memory import GIB, worst_rank
from nemocascade.plan.search import AXES, PricedLayout, best_plans, least_memory
from nemocascade.plan.summary import HEADER, RULE, row
from nemocascade.recipe import (
    EngineConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    nemotron3_nano_30b,
)

RANKS = (8, 16, 64, 256, 1024)
CAPACITIES = (4096, 32_768, 262_144, 1_048_576)
TOKENS_PER_STEP = 64 * 262_144
# Layouts of the table of memory, on 64 ranks with packs of 32K tokens; True: with recomputation.
LAYOUTS = (
    (ParallelConfig(), False),
    (ParallelConfig(ep=8), False),
    (ParallelConfig(ep=8), True),
    (ParallelConfig(tp=2, ep=8), False),
    (ParallelConfig(tp=4, ep=8), False),
    (ParallelConfig(cp=4, ep=8), False),
    (ParallelConfig(pp=4, ep=8), False),
)


def nano(gpu: str, ranks: int, capacity: int) -> Job:
    """Job of Nemotron-3-Nano-30B-A3B: 16.8 M tokens a step, one document a pack."""
    return Job(
        model=nemotron3_nano_30b(),
        parallel=ParallelConfig(),
        engine=EngineConfig(precision="bf16"),
        moe=MoeTrainingConfig(),
        optimizer=OptimizerConfig(),
        capacity=capacity,
        sequences_per_step=TOKENS_PER_STEP // capacity,
        gpu=find_gpu(gpu),
        world_size=ranks,
    )


def rows(gpu: str, ranks: Sequence[int] = RANKS) -> Iterator[str]:
    """Table rows: the fastest layout for each number of ranks and each capacity, beside the fastest
    without context parallelism."""
    for count in ranks:
        for capacity in CAPACITIES:
            job = nano(gpu, count, capacity)
            best = best_plans(job, count=1)
            if best:
                yield f"| {count} {row(best[0])} {_without(job, best[0])} |"
                continue
            least = least_memory(job)
            need = "" if least is None else f": the least needs {least.memory.total / GIB:.0f} GiB"
            yield f"| {count} | {capacity:,} does not fit{need} |"


def memory_rows() -> Iterator[str]:
    """Rows of the table of memory: GiB of the worst rank by purpose."""
    for parallel, recompute in LAYOUTS:
        job = nano("h200", 64, 32_768).with_layout(parallel, recompute=recompute)
        memory = worst_rank(job)
        name = _axes(parallel) or f"dp {job.world_size}"
        sizes = (memory.parameters, memory.gradients, memory.optimizer, memory.activations)
        cells = [name + ", recompute" * recompute, *(f"{size / GIB:.1f}" for size in sizes)]
        yield f"| {' | '.join(cells)} | {memory.total / GIB:.0f} |"


def _axes(parallel: ParallelConfig) -> str:
    """The axes with more than one rank."""
    sizes = [(axis, getattr(parallel, axis)) for axis in AXES]
    return " ".join(f"{axis} {size}" for axis, size in sizes if size > 1)


def _without(job: Job, best: PricedLayout) -> str:
    """Speed and axes of the fastest layout with cp 1."""
    if best.job.parallel.cp == 1:
        return "the same"
    found = best_plans(job, count=1, context=(1,))
    if not found:
        return "does not fit"
    [plan] = found
    return f"{plan.tokens_per_s_per_gpu:,.0f}: {_axes(plan.job.parallel)}"


def table(gpu: str) -> str:
    """Complete table in Markdown."""
    return "\n".join([f"| ranks {HEADER} without cp |", f"|---{RULE}---|", *rows(gpu)])


if __name__ == "__main__":
    print("\n".join(memory_rows()), end="\n\n")
    for name in sys.argv[1:] or ["h200"]:
        print(f"{name}\n\n{table(name)}\n")
