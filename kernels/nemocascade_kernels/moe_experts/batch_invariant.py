"""Batch-invariant matrix products on CPU: a row's result does not depend on the other rows.

CPU matrix libraries choose a kernel by the number of rows, and kernels differ in the order of
additions. A token's output would then change in its last bits when another token leaves or joins
its expert, and a packed document would depend on its neighbours. So a group's rows are covered with
calls of a few fixed sizes, for which a row's result is bit-identical at any position. These sizes
are found by trial, once for each shape, layout and thread count; every size in use has been tried.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

#: x [R, K], weight [K, N] -> [R, N]
Product = Callable[[Tensor, Tensor], Tensor]
#: Sizes tried. All are multiples of the smallest: a group gets at most 31 rows of padding.
_CANDIDATES = (32, 64, 96, 128, 160, 192, 224, 256, 384, 512, 1024)
#: Rows that a buffer must have beyond its last group's end.
SLACK = max(_CANDIDATES)
#: Fixed cost of a call, in rows: more in bfloat16, where oneDNN packs the weight in each call, and
#: less in float32.
_CALL_COST_ROWS = 16


def mm_rows(x: Tensor, weight: Tensor, out: Tensor, count: int) -> None:
    """`out[i] = x[i] @ weight` for i < count, batch-invariant.

    The calls cover up to `SLACK` additional rows. In `x` these are set to zero: oneDNN multiplies
    the row after an odd last one by zero and adds it, and NaN would survive that. In `out` they are
    overwritten, so groups are computed in increasing order.

    Args:
        x: [>= count + SLACK, K].
        weight: [K, N], a contiguous matrix or the transpose of one.
        out: [>= count + SLACK, N].
        count: number of rows.
    """
    parts = cover(count, sizes_for(weight))
    x[count : sum(parts)] = 0
    start = 0
    for size in parts:
        torch.mm(x[start : start + size], weight, out=out[start : start + size])
        start += size


def mm_rows_apart(x: Tensor, weight: Tensor, out: Tensor, start: int, count: int) -> None:
    """`mm_rows` for buffers without slack: nothing past the rows is read or written."""
    for size in cover(count, sizes_for(weight)):
        rows = min(size, count)
        if rows == size:
            torch.mm(x[start : start + size], weight, out=out[start : start + size])
        else:
            padded = x.new_zeros(size, x.shape[1])
            padded[:rows] = x[start : start + rows]
            out[start : start + rows] = torch.mm(padded, weight)[:rows]
        start += rows
        count -= rows


def sizes_for(weight: Tensor) -> tuple[int, ...]:
    """Sizes of the calls on this weight, smallest first."""
    depth, width = weight.shape
    transposed = not weight.is_contiguous()
    return _sizes(weight.dtype, depth, width, transposed, torch.get_num_threads())


@functools.lru_cache(maxsize=4096)
def cover(count: int, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Sizes, largest first, that sum to at least `count` at the least cost."""
    whole, rest = divmod(count, sizes[-1])
    return (sizes[-1],) * whole + _cover_rest(rest, sizes)[1]


@functools.lru_cache(maxsize=16384)
def _cover_rest(count: int, sizes: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """Cost and sizes of the cheapest cover of fewer rows than the largest size."""
    if count <= 0:
        return 0, ()
    count = -(-count // sizes[0]) * sizes[0]
    covers = []
    for size in sizes:
        cost, parts = _cover_rest(count - size, sizes)
        covers.append((size + _CALL_COST_ROWS + cost, (size, *parts)))
    cost, parts = min(covers)
    return cost, tuple(sorted(parts, reverse=True))


@functools.cache
def _sizes(
    dtype: torch.dtype, depth: int, width: int, transposed: bool, threads: int
) -> tuple[int, ...]:
    """Sizes for one weight."""
    del threads  # Part of the cache key: libraries divide the work by it.
    return best_sizes([trial(torch.mm, dtype, depth, width, transposed)])


def trial(
    product: Product, dtype: torch.dtype, depth: int, width: int, transposed: bool
) -> dict[int, Tensor]:
    """Sizes for which a row's result is bit-identical at any position, and the resulting rows."""
    shift = 17
    x, weight = _cancelling(max(_CANDIDATES) + shift, depth, width, dtype)
    if not transposed:
        weight = weight.contiguous()
    results: dict[int, Tensor] = {}
    for size in _CANDIDATES:
        result = product(x[:size], weight)
        moved = product(x[shift : shift + size], weight)
        if torch.equal(result[shift:], moved[:-shift]):
            results[size] = result
    return results


def best_sizes(trials: Sequence[dict[int, Tensor]]) -> tuple[int, ...]:
    """The cheapest sizes, for groups of common lengths, that agree with each other in all trials.

    Raises RuntimeError if there are none.
    """
    stable = [size for size in trials[0] if all(size in results for results in trials)]
    sets = {
        tuple(
            size
            for size in stable
            if size % smallest == 0
            and all(_agree(results[size], results[smallest]) for results in trials)
        )
        for smallest in stable
    }
    if not sets:
        shapes = [tuple(next(iter(results.values())).shape) for results in trials if results]
        raise RuntimeError(
            f"no number of rows gives reproducible rows for products like {shapes}: tried "
            f"{_CANDIDATES}"
        )
    return min(sorted(sets), key=_cost)


def _cancelling(rows: int, depth: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Make x [rows, depth] and a transposed weight [depth, width] whose product is only rounding.

    Each term of a sum occurs twice, with both signs, far apart. So another order of addition
    changes nearly every element, even in bfloat16, where ordinary sums would round it away.
    """
    generator = torch.Generator().manual_seed(0)
    half = depth // 2
    shuffled = torch.randperm(half, generator=generator)
    x = torch.ones(rows, depth, dtype=dtype)
    weight = torch.full((width, depth), 1e-6, dtype=dtype)
    x[:, :half] = torch.randn(rows, half, generator=generator).to(dtype)
    weight[:, :half] = torch.randn(width, half, generator=generator).to(dtype)
    x[:, half : 2 * half] = x[:, shuffled]
    weight[:, half : 2 * half] = -weight[:, shuffled]
    return x, weight.t()


def _agree(a: Tensor, b: Tensor) -> bool:
    rows = min(a.shape[0], b.shape[0])
    return torch.equal(a[:rows], b[:rows])


def _cost(sizes: Sequence[int]) -> int:
    covers = [cover(count, tuple(sizes)) for count in (8, 100, 300, 1000, 3000)]
    return sum(sum(parts) + _CALL_COST_ROWS * len(parts) for parts in covers)
