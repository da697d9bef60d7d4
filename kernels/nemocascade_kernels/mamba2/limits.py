"""Sizes that the Triton kernels support, and their memory. Planners use this without Triton.

Shape letters: T tokens, h heads, p head dimension, g groups, n state, W convolution channels.
"""

from __future__ import annotations

from torch import Tensor

from nemocascade_kernels.backends import HALF_AND_SINGLE, takes
from nemocascade_kernels.mamba2.arguments import Sizes

#: Rows between two states that are kept.
CHUNK = 256
#: Spans of tiles whose sums are added before those of all spans.
SPANS = 512
#: Elements of a head's state that a program holds in registers.
LARGEST_STATE = 8192
_DTYPES = takes(*HALF_AND_SINGLE)


def size_limitation(head_dim: int, state: int) -> str | None:
    """The reason why Triton's kernels are unavailable for the sizes of a head, or None."""
    sizes = 16 <= head_dim <= 128 and 16 <= state <= 256 and head_dim * state <= LARGEST_STATE
    if sizes and not head_dim & (head_dim - 1) and not state & (state - 1):
        return None
    return (
        f"head_dim {head_dim} and state {state} must be powers of two from 16, at most 128 and "
        f"256, with a product of at most {LARGEST_STATE}"
    )


def triton_limitation(zxbcdt: Tensor, *states: Tensor) -> str | None:
    """The reason why Triton's kernels are unavailable for a call, or None.

    states: [0, h, p, n], if the call's sizes are known.
    """
    for state in states:
        if state.dim() == 4 and (reason := size_limitation(*state.shape[2:])):
            return reason
    return _DTYPES(zxbcdt, *states)


def workspace_bytes(rows: int, s: Sizes, element_size: int) -> int:
    """Largest temporary memory of the Triton backward, without the gradients, for documents that
    fill chunks.

    element_size: bytes of an element of zxbcdt.
    """
    shared = s.groups * s.state
    states = 4 * -(-rows // CHUNK) * s.inner * s.state
    # The convolution's output with dt and its sums; parts of the gradients of parameters.
    always = rows * (s.channels * element_size + 12 * s.heads)
    always += 4 * SPANS * (5 * s.channels + 3 * s.heads + s.inner)
    # Gradients of the states beside them, with that of C; then those of B and C, and sums by row.
    first = 2 * states + rows * (shared * element_size + 4 * s.heads)
    then = states + rows * (2 * shared * element_size + (2 + 4 + 2) * 4 * s.heads)
    return always + max(first, then)
