"""Product of bfloat16 matrices with accumulation in a float32 sum (csrc/common/blas.cpp).

torch's own product rounds to bfloat16, and needs a second operation for the sum.
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
