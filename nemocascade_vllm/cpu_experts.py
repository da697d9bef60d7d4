"""Experts on CPUs as they were loaded, also without a gate.

vLLM's own CPU experts have two limits. They repack their weights, and repacked experts are wrong
after a reload. And they have no relu(x)^2 without a gate, which Nemotron models use. These are
plain torch: right, and fast enough for tests and small models.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def install() -> None:
    """Replace the methods of vLLM's unquantised CPU experts in this process."""
    from vllm.model_executor.layers.fused_moe import config
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    experts: Any = CPUUnquantizedExperts
    if getattr(experts, "_nemocascade", False):
        return
    ungated = MoEActivation.RELU2_NO_MUL
    known = experts._supports_activation
    check: Any = config.FusedMoEConfig.__post_init__

    def checked(self: Any) -> None:
        try:
            check(self)
        except NotImplementedError as error:
            # The check that rejects experts without a gate on CPUs is the last one.
            if "is_act_and_mul" not in str(error):
                raise

    def keep(self: Any, layer: Any) -> None:
        self._use_zentorch = False

    def apply(
        self: Any,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Any,
        *_: Any,
        **__: Any,
    ) -> None:
        output.copy_(
            experts_forward(
                hidden_states, w1, w2, topk_weights, topk_ids, gated=activation != ungated
            )
        )

    patched: Any = config.FusedMoEConfig
    patched.__post_init__ = checked
    experts._nemocascade = True
    experts._supports_no_act_and_mul = staticmethod(lambda: True)
    experts._supports_activation = staticmethod(lambda a: a in (ungated,) or known(a))
    experts.process_weights_after_loading, experts.apply = keep, apply


def experts_forward(
    x: Tensor, up: Tensor, down: Tensor, weights: Tensor, ids: Tensor, *, gated: bool
) -> Tensor:
    """Weighted sum of the chosen experts' outputs, [T, H] float32.

    x: [T, H]. up: [E, I, H], or with a gate [E, 2 I, H], the gate first. down: [E, H, I]. weights,
    ids: [T, K]. gated: silu(gate) * up; otherwise relu(up)^2.
    """
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        rows, slots = (ids == expert).nonzero(as_tuple=True)
        h = x[rows] @ up[expert].t()
        if gated:
            gate, h = h.chunk(2, -1)
            h = F.silu(gate) * h
        else:
            h = h.relu().square()
        y = (h @ down[expert].t()).float() * weights[rows, slots, None].float()
        out.index_add_(0, rows, y)
    return out
