"""The packing planner: which documents share a packed sequence, and in which order those are run.

**Packing.** Documents are packed in bins of `capacity` tokens. First-fit-decreasing fills bins well
and balances them badly: the longest documents end up together. Attention's work grows with the sum
of squared lengths, so one bin may cost several times another, and ranks that run bins side by
side wait for the slowest. The planner therefore

1. sorts the documents by length (equals in random order, from the seed) and counts the bins that
   first-fit-decreasing needs, as a bound;
2. opens the least number of bins that can hold all, and computes the level `S`: the sum of squared
   lengths that all bins would have, were it spread evenly. A document with a square above `S` gets
   its own bin, and `S` is that of the other bins;
3. *spreads* the long documents, longest first: each goes to the bin with the greatest
   `(S - sum of squares) / (space left)`. That is the length-weighted mean length that would bring
   the bin to `S` as it fills up, so the bin that lags most gets the longest document;
4. *closes* the bins with the rest (an eighth of the tokens, and at least four documents a bin) by
   first-fit-decreasing, except that no remainder is left that is shorter than every document;
5. keeps the result of plain first-fit-decreasing where balance would cost more than one bin in
   a thousand, or more than one bin of a hundred and more.

Which documents share a bin depends on the lengths, the capacity and the seed: not on the model,
not on the number of ranks.

**Order.** Bins are sorted by work, `linear * sum(length) + quadratic * sum(length^2)`, and cut
into groups of `group` bins; the groups are then shuffled by the seed. Consecutive bins inside a
group have nearly equal work, so *any* number of data-parallel ranks that divides `group` is
balanced, with one and the same order. `group` is a setting of the data for that reason: with 16, a
run gives the same sequence of bins on 1, 2, 4, 8 or 16 ranks. The bins left over when the groups
are full are the cheapest ones and come last.

**Bias.** Bins of a group are alike in work, so an optimizer step that holds one group sees
documents that are less mixed than in random order: the heaviest groups are those with the longest
documents. Over an epoch each document is still seen once. The spreading counters most of it: nearly
all bins have level `S`, with documents of all lengths. Let `group` be a small part of a step's bins
(16 of 64, say) to keep steps mixed.

**Determinism.** Everything is integer arithmetic, except for quotients and costs in float64 that
are rounded once for each operation. Plans are equal bit for bit on any machine, and equal to those
of the definition in plain Python, `tests/helpers/packing_reference.py`.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

OverLong = Literal["truncate", "drop", "refuse"]
Int64Array = NDArray[np.int64]

#: Sums of squares in one bin stay below 2^53, where float64 is exact.
MAX_CAPACITY = 1 << 24

LIBRARY = Path(__file__).resolve().parent.parent / "_native.so"


@dataclass(frozen=True)
class WorkModel:
    """Work of a packed sequence: `linear * sum(length) + quadratic * sum(length^2)`.

    The unit is free; only the ratio of the two decides. The default is Nemotron-3-Nano's.
    """

    linear: float = 1.0
    quadratic: float = 7.7e-6

    def __post_init__(self) -> None:
        if not (self.linear >= 0 and self.quadratic >= 0 and self.linear + self.quadratic > 0):
            raise ValueError(
                f"WorkModel(linear={self.linear}, quadratic={self.quadratic}): both must be at "
                "least 0 and one of them greater: work grows with length"
            )

    @classmethod
    def of_transformer(
        cls, active_parameters: float, attention_layers: int, attention_width: int
    ) -> WorkModel:
        """FLOPs of a training step, forward and backward (three times the forward).

        A token costs `2 * active_parameters` in the matrices. Causal attention over a document
        of `l` tokens costs `2 * l^2 * attention_width` in each attention layer: two products
        of `2 * l^2 * attention_width`, of which the mask leaves half. Scans and convolutions
        of state-space layers are linear and small beside the matrices.

        active_parameters: parameters that a token passes through.
        attention_width: query heads times head dimension.
        """
        return cls(
            linear=6.0 * active_parameters,
            quadratic=6.0 * attention_layers * attention_width,
        )


@dataclass(frozen=True)
class PackingPlan:
    """Bins in the order in which they are to be run. B bins hold D documents."""

    capacity: int
    documents: Int64Array
    """[D] Indices into the lengths that were planned, bin after bin, longest first in each."""

    bin_offsets: Int64Array
    """[B + 1] Bin `b` holds `documents[bin_offsets[b] : bin_offsets[b + 1]]`."""

    fills: Int64Array
    """[B] Tokens in each bin."""

    costs: NDArray[np.float64]
    """[B] Work of each bin, in the unit of the work model."""

    truncated: Int64Array
    """Documents, ascending, of which only the first `capacity` tokens are packed."""

    dropped: Int64Array
    """Documents, ascending, that were longer than `capacity` and are in no bin."""

    def __len__(self) -> int:
        return self.fills.size

    def bin(self, index: int) -> Int64Array:
        """Documents of one bin. A view."""
        if not 0 <= index < len(self):
            raise IndexError(f"bin {index} is not one of the plan's {len(self)} bins")
        return self.documents[self.bin_offsets[index] : self.bin_offsets[index + 1]]

    @property
    def fill(self) -> float:
        """Tokens over the capacity of all bins: 1 is perfect. 1 for an empty plan."""
        return float(self.fills.sum() / (self.capacity * len(self))) if len(self) else 1.0

    def lockstep_cost(self, ranks: int) -> float:
        """Time of `ranks` ranks that run the bins side by side, over the ideal: 1 is perfect.

        `sum_k ranks * max(costs of bins k*ranks .. (k+1)*ranks - 1) / sum(costs)`: in each round
        all wait for the slowest. A last round with too few bins counts in full.
        """
        if ranks < 1:
            raise ValueError(f"ranks({ranks}) must be at least 1")
        return lockstep_cost(self.costs, ranks)

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"packed {self.documents.size:,} documents in {len(self):,} sequences of "
            f"{self.capacity:,} tokens, {self.fill:.3%} full; truncated {self.truncated.size:,}, "
            f"dropped {self.dropped.size:,}"
        )


def lockstep_cost(costs: NDArray[np.float64], ranks: int) -> float:
    """`PackingPlan.lockstep_cost` for costs `[B]` in any order. 1 where there is no work."""
    total = float(costs.sum())
    if total == 0:
        return 1.0
    padded = np.zeros(-(-costs.size // ranks) * ranks)
    padded[: costs.size] = costs
    return ranks * float(padded.reshape(-1, ranks).max(axis=1).sum()) / total


def plan_packing(
    lengths: Sequence[int] | Int64Array,
    capacity: int,
    *,
    group: int,
    work: WorkModel,
    seed: int,
    over_long: OverLong,
) -> PackingPlan:
    """Plan the packing of documents; the module's text says how.

    lengths: tokens of each document, at least 1.
    capacity: tokens of a packed sequence, up to 2^24.
    group: bins whose work is made nearly equal; numbers of ranks that divide it are balanced.
    work: the work model that the order balances.
    seed: 0 .. 2^63 - 1. Decides the order of groups, and which of equally long documents goes
        where.
    over_long: a document longer than `capacity` is cut to it, left out, or an error.

    Raises `ValueError` for a value against these rules, and where `over_long` refuses; `OSError`
    where the native library was not built.
    """
    checked = _check(lengths, capacity, group, seed)
    long_documents = np.flatnonzero(checked > capacity)
    nothing = np.empty(0, np.int64)
    truncated, dropped, kept = nothing, nothing, None
    if long_documents.size:
        if over_long == "refuse":
            first = int(long_documents[0])
            raise ValueError(
                f"document {first} has {checked[first]} tokens, and capacity is {capacity} "
                f"({long_documents.size} of {checked.size} documents are longer): raise capacity, "
                "or set over_long to 'truncate' or 'drop'"
            )
        if over_long == "truncate":
            truncated = long_documents
            checked = np.minimum(checked, capacity)
        elif over_long == "drop":
            dropped = long_documents
            kept = np.flatnonzero(checked <= capacity)
            checked = checked[kept]
        else:
            raise ValueError(f"over_long={over_long!r} must be 'truncate', 'drop' or 'refuse'")
    documents, bin_offsets, fills, squares = _native(checked, capacity, group, work, seed)
    return PackingPlan(
        capacity=capacity,
        documents=documents if kept is None else kept[documents],
        bin_offsets=bin_offsets,
        fills=fills,
        costs=work.linear * fills.astype(np.float64) + work.quadratic * squares.astype(np.float64),
        truncated=truncated,
        dropped=dropped,
    )


def _check(lengths: Sequence[int] | Int64Array, capacity: int, group: int, seed: int) -> Int64Array:
    problems = []
    if not 1 <= operator.index(capacity) <= MAX_CAPACITY:
        problems.append(f"capacity({capacity}) must lie in 1..{MAX_CAPACITY}")
    if operator.index(group) < 1:
        problems.append(f"group({group}) must be at least 1")
    if not 0 <= operator.index(seed) < 1 << 63:
        problems.append(f"seed({seed}) must lie in 0..2^63-1")
    array = np.asarray(lengths)
    if array.size == 0:
        array = array.astype(np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        problems.append(
            f"lengths must be integers in one dimension, not {array.dtype}{array.shape}"
        )
    elif array.size and array.min() < 1:
        first = int(np.flatnonzero(array < 1)[0])
        problems.append(f"document {first} has {array[first]} tokens, it must have at least 1")
    if problems:
        raise ValueError("plan_packing: " + "; ".join(problems))
    return np.ascontiguousarray(array, dtype=np.int64)


def _native(
    lengths: Int64Array, capacity: int, group: int, work: WorkModel, seed: int
) -> tuple[Int64Array, ...]:
    _load_library()
    results = torch.ops.nemocascade.plan_packing(
        torch.from_numpy(lengths), capacity, group, work.linear, work.quadratic, seed
    )
    return tuple(result.numpy() for result in results)


@functools.cache
def _load_library() -> None:
    if not LIBRARY.exists():
        raise OSError(
            f"the native library {LIBRARY} was not built: run `make setup`, "
            "or `python setup.py build_ext --inplace` in an environment that has torch"
        )
    torch.ops.load_library(LIBRARY)
