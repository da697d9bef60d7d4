"""A check of an implementation of the mixer on this machine, for the sizes of a run's model.

It runs the kernels with the configurations that the run will use, and compiles or tunes them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States
from nemocascade_kernels.mamba2.op import OP, Mixer, with_gradient

# Largest errors, of the largest value. The kernels multiply in TF32, or round to bfloat16 between
# their steps; the sums over all rows collect those errors.
_TOLERANCES = {torch.float32: 2e-2, torch.bfloat16: 0.1}
_SUMS = ("conv_weight", "dt_bias", "A")


def check_shape(
    backend: str, device: torch.device, s: Sizes, *, window: int, rows: int, dtype: torch.dtype
) -> None:
    """Compare `backend` with torch's operators on a pack of `rows` rows, forward and backward:
    on new documents, then on documents of which some continue from initial states.

    window: K, the rows of the convolution. dtype: of the activations; time steps are float32.
    Raises RuntimeError if they disagree, and whatever the implementation raises.
    """
    ends = sorted({0, rows, *(n for n in (1, 70, 200, 203) if n < rows)})
    packed = PackedSeq.from_cu_seqlens(ends, device)
    generator = torch.Generator().manual_seed(0)
    inputs = _draw_inputs(packed, s, window, dtype, generator)
    documents = tuple(range(0, packed.num_documents, 2))
    states = _draw_states(len(documents), packed, s, window, dtype, generator)
    for initial in (None, states):
        ours, exact = (
            _with_gradients(name, inputs, packed, s, initial, documents)
            for name in (backend, "torch")
        )
        _compare(ours, exact, dtype, " with initial states" if initial else "")


def _compare(
    ours: dict[str, Tensor], exact: dict[str, Tensor], dtype: torch.dtype, case: str
) -> None:
    """Raise RuntimeError for a result or gradient that differs; `case` ends its name."""
    for name, b in exact.items():
        a, b = ours[name].float(), b.float()
        error = float((a - b).abs().max() / b.abs().max())
        if not error < _TOLERANCES[dtype] * (3 if name in _SUMS else 1):
            what = name if name in ("output", "final state") else f"gradient of {name}"
            raise RuntimeError(
                f"its {what}{case} differs from torch's by {error:.1e} of the largest value"
            )


def _with_gradients(
    backend: str,
    inputs: Inputs,
    packed: PackedSeq,
    s: Sizes,
    initial: States | None,
    documents: tuple[int, ...],
) -> dict[str, Tensor]:
    """Results of the mixer and gradients of its inputs, by name; with `initial`, which holds the
    states of `documents`, also those of the states."""
    i = Inputs(*(t.clone().requires_grad_() for t in inputs))
    states = None if initial is None else States(*(t.clone().requires_grad_() for t in initial))
    out, final = _mix(backend, i, packed, s, states, documents if states else None)
    results, leaves = {"output": out}, i._asdict()
    if states is not None and final is not None:
        results["final state"] = final
        leaves |= {"initial conv": states.conv, "initial ssm": states.ssm}
    generator = torch.Generator().manual_seed(1)
    upstream = [
        torch.randn(t.shape, generator=generator).to(t.device, t.dtype) for t in results.values()
    ]
    found = torch.autograd.grad(list(results.values()), list(leaves.values()), upstream)
    return {name: t.detach() for name, t in results.items()} | dict(zip(leaves, found, strict=True))


def _mix(
    backend: str,
    i: Inputs,
    packed: PackedSeq,
    s: Sizes,
    initial: States | None,
    documents: tuple[int, ...] | None,
) -> tuple[Tensor, Tensor | None]:
    """The output and, with `initial`, the states after the documents, as `mamba2` computes them."""
    module: Any = OP.module(backend)
    if backend == "triton":
        out, final = module.mix(i, packed, s, initial, documents, final=initial is not None)
        return out, final
    if initial is None:
        out = Mixer.apply(module, packed, s, *i)
        return out, None
    return with_gradient(module, i, packed, s, initial, documents, final=True, recompute=False)


def _draw_inputs(
    packed: PackedSeq, s: Sizes, window: int, dtype: torch.dtype, generator: torch.Generator
) -> Inputs:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(packed.device)

    return Inputs(
        zxbcdt=draw(packed.total, s.inner + s.channels + s.heads).to(dtype),
        conv_weight=draw(s.channels, window).to(dtype),
        conv_bias=draw(s.channels).to(dtype),
        dt_bias=draw(s.heads) - 1,
        A=-draw(s.heads).exp(),
        D=draw(s.heads),
        norm_weight=draw(s.inner).to(dtype),
    )


def _draw_states(
    count: int,
    packed: PackedSeq,
    s: Sizes,
    window: int,
    dtype: torch.dtype,
    generator: torch.Generator,
) -> States:
    conv = torch.randn(count, window - 1, s.channels, generator=generator)
    ssm = torch.randn(count, s.heads, s.head_dim, s.state, generator=generator)
    return States(conv.to(packed.device, dtype), ssm.to(packed.device))
