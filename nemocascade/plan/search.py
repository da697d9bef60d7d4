"""Search over the legal layouts of a job: the fastest ones, and the nearest one that fits."""

from __future__ import annotations

import functools
import heapq
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from nemocascade.plan.job import Job
from nemocascade.plan.memory import Memory, fits, shortage, worst_rank
from nemocascade.plan.timing import LayerCosts, StepModel, StepTime
from nemocascade.recipe import ModelConfig, ParallelConfig

AXES = ("tp", "cp", "pp", "vpp", "ep", "etp")
"""Axes of a layout as they are shown; the data-parallel size follows."""
CONTEXT_SIZES = (1, 2, 4, 8, 16)
"""Context-parallel sizes of a search."""


@dataclass(frozen=True)
class PricedLayout:
    """A layout with its predicted memory and time."""

    job: Job
    memory: Memory
    time: StepTime

    @property
    def fits(self) -> bool:
        return fits(self.job, self.memory)

    @property
    def tokens_per_s_per_gpu(self) -> float:
        return self.time.tokens / self.time.total / self.job.world_size

    def describe(self) -> str:
        """The layout as command-line settings."""
        p, e = self.job.parallel, self.job.engine
        parts = [f"{name} {getattr(p, name)}" for name in AXES]
        parts.append(f"dp {p.data_parallel(self.job.world_size)}")
        parts.append(f"capacity {self.job.capacity}")
        parts.append(e.recomputed_text)
        return " ".join(parts)


def price(job: Job) -> PricedLayout:
    """Predict memory and time of a job with a legal layout."""
    return PricedLayout(job, worst_rank(job), StepModel(job).step())


def legal_layouts(
    job: Job, *, longest: int = 0, context: Sequence[int] = CONTEXT_SIZES
) -> Iterator[Job]:
    """Every layout that `ParallelConfig.problems` accepts, with and without recomputation; tp up to
    64, cp among `context`, etp up to 8, and vpp up to 4 if it does not split the layers evenly.

    longest: tokens of the longest document. Micro-batches are halved, and their number doubled, as
    long as that document fits; 0 = fixed capacity.
    """
    for found in _without_recomputation(job, longest, context):
        yield found
        yield _recomputed(found)


def _without_recomputation(job: Job, longest: int, context: Sequence[int]) -> Iterator[Job]:
    """The half of `legal_layouts` that recomputes nothing."""
    capacities = [job.capacity]
    while longest and capacities[-1] % 2 == 0 and capacities[-1] // 2 >= longest:
        capacities.append(capacities[-1] // 2)
    for capacity in capacities:
        sequences = job.sequences_per_step * job.capacity // capacity
        work = replace(job, capacity=capacity, sequences_per_step=sequences)
        work = work.with_layout(job.parallel, recompute=False)
        for p in _layouts(job.model, job.world_size, context):
            found = work.with_layout(p, recompute=False)
            if not found.problems():
                yield found


def _recomputed(job: Job) -> Job:
    """A job that recomputes all of its layers."""
    return job.with_layout(job.parallel, recompute=True)


def _layouts(model: ModelConfig, world: int, context: Sequence[int]) -> Iterator[ParallelConfig]:
    """Layouts whose axes divide the world."""
    has_experts = "E" in model.pattern
    for tp, cp in itertools.product(_divisors(world, 64), context):
        if world // tp % cp:
            continue
        for pp in _divisors(world // tp // cp, model.num_layers):
            for vpp in _interleavings(model, pp):
                layout = _pipeline_layout(model, pp, vpp)
                for ep in _divisors(world // pp, model.num_experts) if has_experts else (1,):
                    for etp in _divisors(world // pp // ep, 8) if has_experts else (1,):
                        yield ParallelConfig(tp, pp, vpp, ep, etp, cp, layout)


@dataclass(frozen=True)
class FoundLayouts:
    """Result of a search. best: the fastest layouts that fit, fastest first. excluded: the fastest
    one that does not fit; None if all that are fast enough to be compared do."""

    best: list[PricedLayout]
    excluded: PricedLayout | None


def search(
    job: Job,
    *,
    count: int = 10,
    longest: int = 0,
    context: Sequence[int] = CONTEXT_SIZES,
    below: float = math.inf,
    layers: LayerCosts | None = None,
) -> FoundLayouts:
    """Search the legal layouts for at most `count` that fit and are fastest.

    below: seconds of a step that are too slow to be looked at. layers: see `StepModel`.
    """
    best: list[PricedLayout] = []
    excluded: PricedLayout | None = None
    layers = {} if layers is None else layers
    order = itertools.count()

    def entry(found: Job) -> tuple[float, int, StepModel]:
        model = StepModel(found, layers=layers)
        return model.bound(), next(order), model

    # Those that may be fastest come first, so that few need their memory.
    waiting = [entry(found) for found in _without_recomputation(job, longest, context)]
    heapq.heapify(waiting)
    while waiting:
        bound, _, model = heapq.heappop(waiting)
        if bound > below or (len(best) == count and bound > best[-1].time.total):
            break
        if not model.job.engine.recompute:
            # Recomputation takes time: it needs no look before the same layout without it.
            heapq.heappush(waiting, entry(_recomputed(model.job)))
        memory = worst_rank(model.job)
        if fits(model.job, memory):
            best.append(PricedLayout(model.job, memory, model.step()))
            best.sort(key=lambda plan: (plan.time.total, plan.memory.total))
            del best[count:]
        elif excluded is None or bound < excluded.time.total:
            slower = PricedLayout(model.job, memory, model.step())
            excluded = min(excluded or slower, slower, key=lambda plan: plan.time.total)
    return FoundLayouts(best, excluded)


def best_plans(
    job: Job, *, count: int = 10, longest: int = 0, context: Sequence[int] = CONTEXT_SIZES
) -> list[PricedLayout]:
    """The fastest layouts that fit, at most `count`, fastest first."""
    return search(job, count=count, longest=longest, context=context).best


def least_memory(job: Job, *, longest: int = 0) -> PricedLayout | None:
    """The legal layout that needs the least memory; None if no layout is legal."""
    sizes = ((worst_rank(found).total, found) for found in legal_layouts(job, longest=longest))
    best = min(sizes, key=lambda pair: pair[0], default=None)
    return None if best is None else price(best[1])


def nearest_fitting(job: Job) -> PricedLayout | None:
    """The fitting layout that is closest to the job's own: smallest change of the axes in powers of
    two, then speed. None if nothing fits."""

    def distance(found: Job) -> float:
        mine, other = job.parallel, found.parallel
        axes = sum(
            abs(math.log2(getattr(other, name) / max(1, getattr(mine, name)))) for name in AXES
        )
        again = 0.5 if found.engine.recompute != job.engine.recompute else 0.0
        return axes + again

    layers: LayerCosts = {}
    near = sorted(
        legal_layouts(job),
        key=lambda found: (distance(found), StepModel(found, layers=layers).bound()),
    )
    return next((plan for plan in map(price, near) if plan.fits), None)


def faults(job: Job) -> list[str]:
    """Reasons why the job's own layout cannot run, each with its remedy; [] if it can."""
    problems = job.problems()
    if problems:
        return problems
    plan = price(job)
    short = shortage(job, plan.memory)
    return (
        [f"the worst rank (stage {plan.memory.place.pp}) {short}: use a layout below"]
        if short
        else []
    )


def _divisors(number: int, largest: int) -> list[int]:
    return [d for d in range(1, min(number, largest) + 1) if number % d == 0]


def _interleavings(model: ModelConfig, pp: int) -> list[int]:
    """Candidate chunk counts of a stage: 1 to 4, and those that split the layers evenly."""
    if pp == 1:
        return [1]
    most = model.num_layers // pp
    return [v for v in range(1, most + 1) if v <= 4 or model.num_layers % (pp * v) == 0]


def _pipeline_layout(model: ModelConfig, pp: int, vpp: int) -> str:
    """Pipeline layout with nearly equal work; empty if the layers split evenly."""
    chunks = pp * vpp
    if model.num_layers % chunks == 0:
        return ""
    return balanced_layout(model.pattern, chunks)


@functools.cache
def balanced_layout(pattern: str, chunks: int) -> str:
    """The pattern split into `chunks` so that the heaviest chunk is as light as possible.

    A MoE layer weighs three, other layers two: their shares of time in a hybrid model. The last
    chunk carries the LM head, which weighs four.
    """
    weight = {"E": 3, "M": 2, "*": 2, "-": 2}
    sums = [0]
    for symbol in pattern:
        sums.append(sums[-1] + weight[symbol])
    count = len(pattern)
    # best[k][i]: weight of the heaviest of k chunks that hold the first i layers.
    best = [[math.inf] * (count + 1) for _ in range(chunks + 1)]
    cut = [[0] * (count + 1) for _ in range(chunks + 1)]
    best[0][0] = 0
    for k in range(1, chunks + 1):
        head = 4 if k == chunks else 0
        for i in range(k, count + 1):
            for j in range(k - 1, i):
                heaviest = max(best[k - 1][j], sums[i] - sums[j] + head)
                if heaviest < best[k][i]:
                    best[k][i], cut[k][i] = heaviest, j
    ends = [count]
    for k in range(chunks, 0, -1):
        ends.append(cut[k][ends[-1]])
    ends.reverse()
    return "|".join(pattern[a:b] for a, b in itertools.pairwise(ends))
