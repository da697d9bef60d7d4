"""Packing planner: which documents share a packed sequence, and the order of the sequences.

**Packing.** Documents are packed into bins of `capacity` tokens. First-fit-decreasing fills bins
well but balances them badly: the longest documents end up together. Attention's work grows with
the sum of squared lengths, so one bin may cost several times another. Ranks that run bins in
parallel then wait for the slowest. The planner therefore

1. sorts the documents by length (equal lengths in random order, from the seed) and counts the bins
   that first-fit-decreasing needs, as a bound;
2. opens the smallest number of bins that can hold all documents, and computes the level `S`: each
   bin's share of the sum of squared lengths, if spread evenly. A document whose square exceeds `S`
   gets its own bin, and `S` is computed over the other bins;
3. *spreads* the long documents, longest first: each goes to the bin with the greatest
   `(S - sum of squares) / (space left)`. That is the length-weighted mean length that would bring
   the bin to `S` as it fills up, so the bin furthest below gets the longest document;
4. *closes* the bins with the rest (an eighth of the tokens, and at least four documents a bin) by
   first-fit-decreasing, but never leaves a remainder shorter than every document;
5. where that needs more extra bins than one in a thousand beside plain first-fit-decreasing (from a
   hundred bins on, one is always allowed), closes them with twice, and then four times as much, and
   otherwise keeps the result of first-fit-decreasing.

The packing depends on the lengths, the capacity and the seed. It does not depend on the model or
the number of ranks.

**Order.** Bins are sorted by work, `linear * sum(length) + quadratic * sum(length^2)`, and cut
into groups of `group` bins; the groups are then shuffled by the seed. Consecutive bins inside a
group have nearly equal work. *Any* number of data-parallel ranks that divides `group` is therefore
balanced, in one and the same order: with `group` 16, a run sees the same sequence of bins on 1, 2,
4, 8 or 16 ranks. The bins that do not fill a group are the cheapest ones and come last.

**Bias.** Bins of a group have similar work, so a step that holds one group sees less mixed
documents than in random order: the heaviest groups have the longest documents. Each document is
still seen once per epoch. Spreading removes most of the bias: nearly all bins have level `S`, with
documents of all lengths. To keep steps mixed, set `group` to a small fraction of a step's bins (16
of 64, say).

**Determinism.** Everything is integer arithmetic, except quotients and costs in float64, rounded
once per operation. Plans are bit-identical on any machine, and identical to those of the reference
implementation in plain Python, `tests/helpers/packing_reference.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from nemocascade.runtime import native

OverLong = Literal["truncate", "drop", "refuse"]
Int64Array = NDArray[np.int64]

#: Sums of squares in one bin stay below 2^53, where float64 is exact.
MAX_CAPACITY = 1 << 24


@dataclass(frozen=True)
class WorkModel:
    """Work of a packed sequence: `linear * sum(length) + quadratic * sum(length^2)`.

    Only the ratio of the two matters, so the unit is free. The default fits Nemotron-3-Nano.
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
        """Build the model from FLOPs of a training step (three times the forward).

        A token costs `2 * active_parameters` in the matrices. Causal attention over a document of
        `l` tokens costs `2 * l^2 * attention_width` per attention layer: two products of
        `2 * l^2 * attention_width`, half of which is masked. Scans and convolutions of state-space
        layers are linear and small compared with the matrices.

        active_parameters: parameters that one token uses.
        attention_width: query heads times head dimension.
        """
        return cls(
            linear=6.0 * active_parameters,
            quadratic=6.0 * attention_layers * attention_width,
        )


@dataclass(frozen=True)
class PackingPlan:
    """Bins in execution order. B bins hold D documents."""

    capacity: int
    documents: Int64Array
    """[D] Indices into the planned lengths, bin after bin, longest first within each bin."""

    bin_offsets: Int64Array
    """[B + 1] Bin `b` holds `documents[bin_offsets[b] : bin_offsets[b + 1]]`."""

    fills: Int64Array
    """[B] Tokens in each bin."""

    costs: NDArray[np.float64]
    """[B] Work of each bin, in the unit of the work model."""

    truncated: Int64Array
    """Documents, ascending, truncated to their first `capacity` tokens."""

    dropped: Int64Array
    """Documents, ascending, dropped because they were longer than `capacity`, or because nothing of
    their first `capacity` tokens is trained."""

    def __len__(self) -> int:
        return self.fills.size

    def bin(self, index: int) -> Int64Array:
        """Documents of one bin, as a view."""
        if not 0 <= index < len(self):
            raise IndexError(f"bin {index} is not one of the plan's {len(self)} bins")
        return self.documents[self.bin_offsets[index] : self.bin_offsets[index + 1]]

    @property
    def fill(self) -> float:
        """Tokens divided by the capacity of all bins: 1 is perfect. 1 for an empty plan."""
        return float(self.fills.sum() / (self.capacity * len(self))) if len(self) else 1.0

    def describe(self) -> str:
        """One line for the log."""
        return (
            f"packed {self.documents.size:,} documents in {len(self):,} sequences of "
            f"{self.capacity:,} tokens, {self.fill:.3%} full; truncated {self.truncated.size:,}, "
            f"dropped {self.dropped.size:,}"
        )


def plan_packing(
    lengths: Sequence[int] | Int64Array,
    capacity: int,
    *,
    group: int,
    work: WorkModel,
    seed: int,
    over_long: OverLong,
) -> PackingPlan:
    """Plan the packing of documents, as described in the module docstring.

    lengths: [D] tokens of each document, at least 1.
    capacity: tokens of a packed sequence, up to 2^24.
    group: bins of nearly equal work; numbers of ranks that divide it are balanced.
    work: work model that the order balances.
    seed: 0 .. 2^63 - 1. Decides the order of groups and the order of equally long documents.
    over_long: truncate or drop a document longer than `capacity`, or raise an error.

    Raises `ValueError` for a value against these rules and for a document longer than `capacity`
    under "refuse". Raises `OSError` if the native library was not built.
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
        problems.append(f"capacity({capacity}) must be in 1..{MAX_CAPACITY}")
    if operator.index(group) < 1:
        problems.append(f"group({group}) must be at least 1")
    if not 0 <= operator.index(seed) < 1 << 63:
        problems.append(f"seed({seed}) must be in 0..2^63-1")
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
    results = native.operators().plan_packing(
        torch.from_numpy(lengths), capacity, group, work.linear, work.quadratic, seed
    )
    return tuple(result.numpy() for result in results)
