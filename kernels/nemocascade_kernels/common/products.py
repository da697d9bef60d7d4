"""Matrix products that have several ways on a CPU.

Sums: products of bfloat16 matrices that are added in float32. torch's own product rounds to
bfloat16. On a GPU torch has an operator for both at once. On a CPU there are up to three ways, none
of which rounds the sum:

========== ========================================================================
``onednn`` tiles by oneDNN's kernel, which torch exports (csrc/common/tile_product.h)
``mkl``    MKL's product, if torch was built with MKL (csrc/common/blas.h)
``float``  the matrices in float32, a block at a time
========== ========================================================================

Products: those of bfloat16 matrices into bfloat16, by ``torch`` or by ``float``.

Which is fastest depends on the processor: on one without AMX, MKL's sums took 3.6 times oneDNN's
time; on one without AVX-512, torch's products 5 times that of float32. `choice` measures the ways
once on a machine (`fastest`). The variable NEMOCASCADE_BF16_PRODUCTS names others, separated by
commas: "mkl,torch". Ways differ in their last bits, so a job must use one on all ranks: `use`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.common import fastest
from nemocascade_kernels.common.fastest import MeasuredChoice

#: The ways of each kind, in order of preference.
WAYS = {"sums": ("onednn", "mkl", "float"), "products": ("torch", "float")}
VARIABLE = "NEMOCASCADE_BF16_PRODUCTS"
#: Sizes of the measured sum: rows, and both sides. The product has its shape and depth.
_TRIAL = (1024, 2048, 512)
#: Rows and columns of a block that is copied to float32.
_BLOCK = 2048
_used: dict[str, MeasuredChoice] = {}


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Compute `total += left.T @ right`, or `=` if `first`: bfloat16 into float32, on a CPU.

    total: [M, N] float32, contiguous. left: [R, M] and right: [R, N] bfloat16, contiguous rows.
    """
    _SUMS[choice("sums").way](total, left, right, not first)


def multiply(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return `left @ right`: [M, K] times [K, N], all of one dtype. out: [M, N], for the result."""
    if left.dtype != torch.bfloat16 or left.device.type != "cpu":
        return torch.mm(left, right, out=out)
    if out is None:
        out = left.new_empty(left.shape[0], right.shape[1])
    _PRODUCTS[choice("products").way](left, right, out)
    return out


def accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute `total += left.T @ right`, without rounding the product to the matrices' dtype where
    total is float32.

    total: [M, N], float32 or the matrices' dtype. left: [R, M] and right: [R, N], of one dtype.
    """
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    elif left.is_cuda:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    elif adds_products(total, left.dtype):
        add_product(total, _with_rows(left), _with_rows(right), first=False)
    else:
        total.add_(torch.mm(left.t(), right))


def adds_products(total: Tensor, dtype: torch.dtype) -> bool:
    """True if `add_product` can add products of matrices of this dtype to `total`."""
    return (
        dtype == torch.bfloat16
        and total.dtype == torch.float32
        and total.device.type == "cpu"
        and total.is_contiguous()
    )


def choice(kind: str) -> MeasuredChoice:
    """The way of "sums" or "products" in this process: that of `use`, of the variable, or of the
    measurement.

    Raises ValueError if the variable names a way that there is not, or not on this machine.
    """
    if kind not in _used:
        named = named_way(kind)
        _used[kind] = _measured(kind) if named is None else MeasuredChoice(named, {}, VARIABLE)
    return _used[kind]


def use(kind: str, way: str, source: str, seconds: Mapping[str, float | None]) -> None:
    """Use a way in this process from now on. source: where the choice is from. seconds: of each
    way, if they were measured."""
    _used[kind] = MeasuredChoice(way, seconds, source)


def named_way(kind: str) -> str | None:
    """The way that the variable names for a kind, or None. Raises ValueError as `choice` does."""
    named = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    known = sorted({way for ways in WAYS.values() for way in ways})
    if unknown := [name for name in named if name not in known]:
        raise ValueError(f"{VARIABLE}: {unknown[0]!r} is no way of bf16 products: name {known}")
    way = next((name for name in named if name in WAYS[kind]), None)
    if way is not None and (reason := limitation(kind, way)) is not None:
        raise ValueError(
            f"{VARIABLE}: {way!r} is unavailable, {reason}: name one of {available(kind)}"
        )
    return way


def available(kind: str) -> tuple[str, ...]:
    """The ways of a kind that work on this machine."""
    return tuple(way for way in WAYS[kind] if limitation(kind, way) is None)


@functools.cache
def limitation(kind: str, way: str) -> str | None:
    """The reason why a way is unavailable on this machine, or None."""
    if (kind, way) not in _OPERATORS:
        return None
    exported, operator = _OPERATORS[kind, way]
    if (reason := native.missing(exported, operator)) is not None:
        return reason
    if not native.op(exported)():
        return "this torch does not export it"
    try:
        _trial_call(kind, way, (2, 8, 8))()
    except Exception as error:  # torch passes on a library's error without its text
        return f"{way} fails on this processor: {' '.join(str(error).split())[:120]}"
    return None


@functools.cache
def _measured(kind: str) -> MeasuredChoice:
    ways = available(kind)
    if len(ways) == 1:
        return MeasuredChoice(ways[0], {}, "the only one on this machine")
    calls = {way: _trial_call(kind, way, _TRIAL) for way in ways}
    return fastest.choose(f"bf16_{kind}", calls)


def _trial_call(kind: str, way: str, sizes: tuple[int, int, int]) -> Callable[[], object]:
    rows, m, n = sizes
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(rows, k, generator=generator).bfloat16() for k in (m, n))
    if kind == "products":
        out = torch.empty(rows, n, dtype=torch.bfloat16)
        return functools.partial(_PRODUCTS[way], left, right[:1].expand(m, n).contiguous(), out)
    return functools.partial(_SUMS[way], torch.zeros(m, n), left, right, True)


def _float_sum(total: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    rows, columns = left.shape
    for i in range(0, max(rows, 1), _BLOCK):
        part, wide = left[i : i + _BLOCK], right[i : i + _BLOCK].float()
        for j in range(0, columns, _BLOCK):
            narrow = part[:, j : j + _BLOCK].float()
            total[j : j + _BLOCK].addmm_(narrow.t(), wide, beta=int(add or i > 0))


def _float_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    depth, columns = right.shape
    for j in range(0, columns, _BLOCK):
        block = out[:, j : j + _BLOCK]
        total = torch.zeros(block.shape)
        for i in range(0, depth, _BLOCK):
            total.addmm_(
                left[:, i : i + _BLOCK].float(), right[i : i + _BLOCK, j : j + _BLOCK].float()
            )
        block.copy_(total)


def _torch_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    torch.mm(left, right, out=out)


def _native_product(operator: str, total: Tensor, left: Tensor, right: Tensor, add: bool) -> None:
    native.op(operator)(total, left, right, add)


#: Operators of a way: is it exported, and the product.
_OPERATORS = {
    ("sums", "onednn"): ("has_tile_product", "add_tiles_"),
    ("sums", "mkl"): ("has_product", "add_product_"),
}
_SUMS: dict[str, Callable[[Tensor, Tensor, Tensor, bool], None]] = {
    "float": _float_sum,
    **{way: functools.partial(_native_product, op) for (_, way), (_, op) in _OPERATORS.items()},
}
_PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "torch": _torch_product,
    "float": _float_product,
}


def _with_rows(matrix: Tensor) -> Tensor:
    if matrix.stride(1) == 1:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)
