"""`rms_norm`: public function and checks. Each implementation has its own gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels.backends import Op, takes

_compiled = takes(torch.float32, torch.bfloat16, operators=("rms_norm", "rms_norm_backward"))


def native_limitation(x: Tensor, *gate: Tensor) -> str | None:
    """The reason why the compiled CPU norm is unavailable for a call, or None."""
    return "it has no gate" if gate else _compiled(x)


OP = Op("rms_norm")
OP.register("native", limit=native_limitation)
OP.register("torch")
OP.register("reference")


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    gate: Tensor | None = None,
    groups: int = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """RMSNorm over the last dimension (arXiv 1910.07467), or Mamba-2's gated one by groups::

        y = u / sqrt(mean(u^2) + eps) * weight          u = x, or x * silu(gate)

    The mean is over each of `groups` equal parts of a row.

    Args:
        x: [..., C] floating point.
        weight: [C].
        eps: added to the mean square.
        gate: [..., C], or None.
        groups: divides C; more than one needs a gate.
        backend: require an implementation; see `nemocascade_kernels.backends`.

    Returns:
        [..., C] in x's dtype; arithmetic is float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes do not fit.
        BackendUnavailableError: the required implementation is unavailable for the call.
    """
    if weight.shape != x.shape[-1:] or (gate is not None and gate.shape != x.shape):
        raise ValueError(
            f"rms_norm: x {list(x.shape)}, weight {list(weight.shape)} and gate "
            f"{None if gate is None else list(gate.shape)} must be [..., C], [C] and [..., C]"
        )
    if groups < 1 or x.shape[-1] % groups or (groups > 1 and gate is None):
        raise ValueError(
            f"rms_norm: {groups} groups must divide the {x.shape[-1]} columns, and need a gate"
        )
    module = OP.choose(x, *(() if gate is None else (gate,)), backend=backend)
    y: Tensor = module.rms_norm(x, weight, eps, gate, groups)
    return y
