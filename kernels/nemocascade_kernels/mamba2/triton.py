"""The mixer in Triton, forward and backward; `triton_launch` starts the kernels.

Forward: `mix_kernel` (convolution, time steps), `states_kernel` and `carry_kernel` (the state
before each chunk), `scan_kernel` (scan, gate and norm). Backward runs the first three again, since
only the inputs are kept; then `gate_gradient_kernel`, `shared_gradient_kernel` (C),
`states_kernel` and `carry_kernel` for the states' gradients, `shared_gradient_kernel` (B),
`x_gradient_kernel`, `mix_gradient_kernel`. The host reads nothing back. Every sum has a fixed
order, so results are deterministic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States
from nemocascade_kernels.mamba2.triton_launch import Call


def mix(
    i: Inputs,
    packed: PackedSeq,
    s: Sizes,
    initial: States | None,
    documents: tuple[int, ...] | None,
    *,
    final: bool,
) -> tuple[Tensor, Tensor | None]:
    """Output [T, h p] in zxbcdt's dtype and, if `final`, the states after the documents
    [D, h, p, n] float32, with gradients of all inputs."""
    out, ssm = MixerWithStates.apply(
        packed, s, documents, True, final, *i, *(initial or (None, None))
    )
    return out, ssm


def final_states(i: Inputs, packed: PackedSeq, s: Sizes, initial: States | None) -> Tensor:
    """The states after the documents [D, h, p, n] float32 alone, with gradients of all inputs that
    they depend on."""
    states: Tensor = MixerWithStates.apply(
        packed, s, None, False, True, *i, *(initial or (None, None))
    )[1]
    return states


class MixerWithStates(torch.autograd.Function):
    """Autograd of the mixer with its states; only inputs are kept for backward."""

    @staticmethod
    def forward(
        ctx: Any,
        packed: PackedSeq,
        sizes: Sizes,
        documents: tuple[int, ...] | None,
        output: bool,
        final: bool,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.arguments = packed, sizes, documents
        call = Call(tensors, packed, sizes, documents)
        mixed = call.mix()
        states, ssm = call.states(mixed, final)
        return call.scan(mixed, states) if output else None, ssm

    @staticmethod
    def backward(ctx: Any, d_out: Tensor | None, d_final: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        call = Call(tensors, *ctx.arguments)
        gradients = call.backward(
            *(None if d is None else d.contiguous() for d in (d_out, d_final))
        )
        pairs = zip(gradients, tensors, strict=True)
        found = (None if g is None else g.to(t.dtype) for g, t in pairs)
        return None, None, None, None, None, *found
