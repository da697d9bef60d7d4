"""Estimated lockstep cost of context parallelism, static and dynamic, on `bench_packing`'s lengths.

    python benchmarks/data/bench_context.py --documents 200000

Nothing is timed. Work is that of Nemotron-3-Nano; what a border costs is the planner's estimate.
A cost is the time of all ranks divided by that of the documents' work alone.

- static: every pack of 256K tokens is cut over 8 ranks, in rounds of 16 packs side by side;
- dynamic: packs of 32K rows a rank on 1, 2, 4 or 8 ranks, the smallest that hold their documents.
  128 ranks run packs of similar time side by side.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from benchmarks.data.bench_packing import (  # noqa: E402
    CAPACITY,
    DISTRIBUTIONS,
    NANO,
    STEP_BINS,
    Floats,
    Ints,
)
from benchmarks.data.lockstep import lockstep_cost  # noqa: E402
from nemocascade.data.packing import plan_packing  # noqa: E402
from nemocascade.plan.tables import nano  # noqa: E402
from nemocascade.plan.timing import StepModel  # noqa: E402
from nemocascade.recipe import ParallelConfig  # noqa: E402

CP, DP = 8, 16
ROWS = CAPACITY // CP


def border_work() -> float:
    """Work of a token, in units of its linear work, that a document across segments adds."""
    job = replace(nano("h200", CP * DP, CAPACITY), parallel=ParallelConfig(cp=CP))
    within, across = (
        StepModel(replace(job, document=length)).layer("M").compute
        for length in (ROWS // 2, CAPACITY)
    )
    rows = StepModel(replace(job, document=ROWS // 2)).stage(0).compute
    return (across - within) * job.model.pattern.count("M") / rows


def rank_work(lengths: Ints, capacity: int, cp: int, border: float) -> Floats:
    """Work [cp] of the ranks of a pack; rank r holds segments r and 2 cp - 1 - r."""
    ends = lengths.cumsum()
    starts, done = ends - lengths, np.concatenate([[0.0], np.square(lengths, dtype=float).cumsum()])
    edges = np.minimum(np.linspace(0, capacity, 2 * cp + 1), ends[-1])
    document = np.minimum(np.searchsorted(starts, edges, side="right") - 1, lengths.size - 1)
    attention = np.diff(done[document] + np.square(edges - starts[document]))
    crossed = ~np.isin(edges, np.concatenate([starts, ends]))
    work = NANO.linear * capacity / (2 * cp) + NANO.quadratic * attention
    # Rows of a document that continues in a segment pay half, and those of one that goes on.
    low, high = edges[:-1], edges[1:]
    entered = np.where(crossed[:-1], np.minimum(ends[document[:-1]], high) - low, 0.0)
    left = np.where(crossed[1:], high - np.maximum(starts[document[1:]], low), 0.0)
    if cp > 1:
        work = work + border * NANO.linear * (entered + left) / 2
    found: Floats = (work + work[::-1])[:cp]
    return found


def packs(lengths: Ints, cp: int, border: float) -> tuple[Floats, Floats]:
    """For each pack on `cp` ranks of ROWS rows: work of its slowest rank, and the mean."""
    plan = plan_packing(lengths, ROWS * cp, group=DP, work=NANO, seed=0, over_long="refuse")
    bins = np.split(lengths[plan.documents], plan.bin_offsets[1:-1])
    work = np.stack([rank_work(b, ROWS * cp, cp, border) for b in bins])
    return work.max(axis=1), work.mean(axis=1)


def dynamic_cost(lengths: Ints, border: float, ideal: float) -> float:
    """Lockstep cost of packs on as few ranks as hold them."""
    sizes, costs, least = [], [], 0
    for cp in (1, 2, 4, 8):
        chosen = lengths[(lengths > least) & (lengths <= ROWS * cp)]
        least = ROWS * cp
        if chosen.size:
            slowest, _ = packs(chosen, cp, border)
            costs.append(slowest)
            sizes.append(np.full(slowest.size, cp))
    size, cost = np.concatenate(sizes), np.concatenate(costs)
    order = np.random.default_rng(0).permutation(size.size)
    step = size[order].cumsum() // (STEP_BINS * CP)
    total = 0.0
    for number in range(int(step[-1]) + 1):
        own = order[step == number]
        own = own[np.argsort(-cost[own])]
        rounds = size[own].cumsum() // (DP * CP)
        total += sum(float(cost[own[rounds == r]].max()) for r in np.unique(rounds))
    return total * DP * CP / ideal


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--documents", type=int, default=200_000, help="lengths of a set")
    options = parser.parse_args(arguments)
    border = border_work()
    print(f"estimated; a border adds {border:.0%} to the linear work of its document's rows")
    print(
        f"{'':14s} {'tokens > 32K':>12s} {'ranks':>6s} {'packs':>6s} {'border':>6s} {'static':>6s}",
        end="",
    )
    print(f" {'dynamic':>7s} {'static, no border':>17s} {'dynamic, no border':>18s}")
    for distribution in DISTRIBUTIONS:
        drawn = distribution(options.documents, np.random.default_rng(0))
        lengths = np.clip(drawn, 16, CAPACITY).astype(np.int64)
        squares = np.square(lengths, dtype=float).sum()
        ideal = float(NANO.linear * lengths.sum() + NANO.quadratic * squares)
        found = []
        for added in (border, 0.0):
            slowest, mean = packs(lengths, CP, added)
            between = lockstep_cost(slowest, DP)
            ranks, static = slowest.sum() / mean.sum(), between * slowest.sum() * CP / ideal
            found.append((ranks, between, static, dynamic_cost(lengths, added, ideal)))
        (ranks, between, static, dynamic), (_, _, plain, free) = found
        long = lengths[lengths > ROWS].sum() / lengths.sum()
        print(
            f"{distribution.__name__:14s} {long:12.0%} {ranks:6.3f} {between:6.3f} "
            f"{static / plain:6.3f} {static:6.3f} {dynamic:7.3f} {plain:17.3f} {free:18.3f}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
