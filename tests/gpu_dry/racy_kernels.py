# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False
"""Small kernels with and without a data race; as a script, what `unordered` says of each.

    python -m gpu_dry.racy_kernels            # these kernels
    python -m gpu_dry.racy_kernels package    # those of nemocascade_kernels

It prints a JSON object: the findings by the name of the kernel.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import triton
import triton.language as tl
from gpu_dry.races import unordered
from nemocascade_kernels import compile as ahead

BLOCK = 1024


@triton.jit
def row_then_target(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """RACE: one element of a row is read by all warps after the last barrier, and overwritten."""
    row_ptr = x_ptr + tl.program_id(0) * stride
    at = tl.arange(0, B)
    total = tl.sum(tl.load(row_ptr + at, mask=at < size, other=0.0), axis=0)
    chosen = tl.load(row_ptr + tl.load(target_ptr))
    for start in range(0, size, B):
        x = tl.load(row_ptr + start + at, mask=start + at < size, other=0.0)
        tl.store(row_ptr + start + at, x * chosen / total, mask=start + at < size)


@triton.jit
def target_then_row(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """The reduction's barriers follow the read."""
    row_ptr = x_ptr + tl.program_id(0) * stride
    at = tl.arange(0, B)
    chosen = tl.load(row_ptr + tl.load(target_ptr))
    total = tl.sum(tl.load(row_ptr + at, mask=at < size, other=0.0), axis=0)
    for start in range(0, size, B):
        x = tl.load(row_ptr + start + at, mask=start + at < size, other=0.0)
        tl.store(row_ptr + start + at, x * chosen / total, mask=start + at < size)


@triton.jit
def barrier_between(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    chosen = tl.load(x_ptr + tl.load(target_ptr))
    tl.debug_barrier()
    tl.store(x_ptr + tl.arange(0, B), chosen)


@triton.jit
def barrier_on_one_path(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """RACE: the path without the barrier counts."""
    chosen = tl.load(x_ptr + tl.load(target_ptr))
    if size > 7:
        tl.debug_barrier()
    tl.store(x_ptr + tl.arange(0, B), chosen)


@triton.jit
def in_place(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(x_ptr + at, tl.load(x_ptr + at, mask=at < size) + 1, mask=at < size)


@triton.jit
def rows_in_place(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """Rows of a width that only the caller knows."""
    rows, columns = tl.arange(0, B // 64)[:, None], tl.arange(0, 64)[None, :]
    for start in range(0, size, 64):
        pointers = x_ptr + rows * stride + start + columns
        tl.store(pointers, tl.load(pointers) + 1)


@triton.jit
def two_passes(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """Each thread overwrites in the second loop what it has read itself in the first."""
    at = tl.arange(0, B)
    total = tl.zeros([B], tl.float32)
    for start in range(0, size, B):
        total += tl.load(x_ptr + start + at)
    for start in range(0, size, B):
        tl.store(x_ptr + start + at, total)


@triton.jit
def own_indices(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    indices = tl.load(target_ptr + tl.arange(0, B))
    tl.store(x_ptr + indices, tl.load(x_ptr + indices) + 1)


@triton.jit
def foreign_indices(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """RACE: the elements read are anyone's."""
    indices = tl.load(target_ptr + tl.arange(0, B))
    tl.store(x_ptr + tl.arange(0, B), tl.load(x_ptr + indices))


@triton.jit
def shifted(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """RACE: a warp's last thread reads what the next warp overwrites."""
    at = tl.arange(0, B)
    tl.store(x_ptr + at, tl.load(x_ptr + at + 1))


@triton.jit
def reversed_rows(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """RACE: rows of a width that only the caller knows."""
    rows, columns = tl.arange(0, B // 64)[:, None], tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + (B // 64 - 1 - rows) * stride + columns)
    tl.store(x_ptr + rows * stride + columns, x)


@triton.jit
def write_then_read(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """RACE: the sums of all threads are read before they are surely written."""
    at = tl.arange(0, B)
    tl.store(x_ptr + at, at.to(tl.float32))
    tl.store(x_ptr + size + at, tl.load(x_ptr + (B - 1 - at)))


@triton.jit
def next_iteration(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """RACE: an iteration reads what other threads wrote in the one before."""
    at = tl.arange(0, B)
    for start in range(0, size, B):
        x = tl.load(x_ptr + start + at)
        tl.debug_barrier()
        tl.store(x_ptr + start + B + (B - 1 - at), x)


@triton.jit
def ordered_iterations(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    at = tl.arange(0, B)
    for start in range(0, size, B):
        x = tl.load(x_ptr + start + at)
        tl.debug_barrier()
        tl.store(x_ptr + start + B + (B - 1 - at), x)
        tl.debug_barrier()


@triton.jit
def columns_of_iterations(x_ptr, target_ptr, size, stride, B: tl.constexpr):
    """Threads overwrite columns that others have read: of one iteration, after its barrier. The
    next one has other columns."""
    rows, columns = tl.arange(0, B // 64)[:, None], tl.arange(0, 64)[None, :]
    for start in range(0, size, 64):
        pointers = x_ptr + rows * stride + start
        x = tl.load(pointers + 63 - columns)
        tl.debug_barrier()
        tl.store(pointers + columns, x)


KERNELS = (
    row_then_target, target_then_row, barrier_between, barrier_on_one_path, in_place, rows_in_place,
    two_passes, own_indices, foreign_indices, shifted, reversed_rows, write_then_read,
    next_iteration, ordered_iterations, columns_of_iterations,
)  # fmt: skip


def entry(kernel: Any, num_warps: int) -> ahead.AotKernel:
    signature = {"x_ptr": "*fp32:16", "target_ptr": "*i64:16", "size": "i32", "stride": "i32"}
    return ahead.AotKernel(kernel, signature, {"B": BLOCK}, num_warps=num_warps)


def findings(which: str) -> dict[str, list[str]]:
    """Results of `unordered` by name: of these kernels ("own", with 4 warps and 1), or of the
    package's: one launch of each ("sample"), or all ("package")."""
    if which == "own":
        kernels = [("4 warps", entry(kernel, 4)) for kernel in KERNELS]
        kernels += [("1 warp", entry(row_then_target, 1))]
    else:
        chosen = ahead.sample_of if which == "sample" else list
        kernels = [(op, k) for op in ahead.triton_ops() for k in chosen(ahead.kernels_of(op, 90))]
    found: dict[str, list[str]] = {}
    for op, kernel in kernels:
        # Launches of one label differ in types or tiles.
        races = found.setdefault(f"{op}/{kernel.name}", [])
        races += unordered(ahead.compiled(op, kernel, 90).asm["ptx"])
    return found


if __name__ == "__main__":
    print(json.dumps(findings(sys.argv[1])))
