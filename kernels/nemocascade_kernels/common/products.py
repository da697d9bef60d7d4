"""Products of matrices that are accumulated in a float32 sum.

A plain product of bfloat16 matrices rounds to bfloat16, and needs a second operation for the sum.
On a GPU torch has an operator for both at once, on a CPU csrc/common/blas.cpp.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nemocascade_kernels import native

OPERATORS = ("has_product", "add_product_")


@functools.cache
def adds_products(dtype: torch.dtype) -> bool:
    """True if `add_product` is available for matrices of this dtype."""
    return (
        dtype == torch.bfloat16
        and native.lacks(*OPERATORS) is None
        and bool(native.op("has_product")())
    )


def add_product(total: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Compute `total += left.T @ right`, or `=` if `first`: bfloat16 into float32, in one GEMM.

    total: [M, N] float32, contiguous. left: [R, M] and right: [R, N] bfloat16.
    """
    native.op("add_product_")(total, left, right, not first)


def accumulate_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute `total += left.T @ right`, in one GEMM where an operator for the dtypes exists.

    total: [M, N], float32 or the matrices' dtype. left: [R, M] and right: [R, N], of one dtype.
    """
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    elif left.is_cuda:
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    elif adds_products(left.dtype) and total.is_contiguous():
        add_product(total, left, right, first=False)
    else:
        total.add_(torch.mm(left.t(), right))
