# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Products of tiles in Triton kernels, on hardware and in Triton's interpreter."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from nemocascade_kernels.backends import interpreting


@functools.cache
def arch_of(device: torch.device) -> int:
    """Compute capability, 90 for sm_90; that of Hopper in the interpreter."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def precision(dtype: torch.dtype) -> str:
    """`PRECISION` of `dot` for matrices of a dtype."""
    if dtype == torch.bfloat16 and interpreting():
        return "widened"
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Matrix product with tl.dot's PRECISION, or of inputs "widened" to float32.

    Without widening, Triton's interpreter multiplies the bits of bfloat16.
    """
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)
