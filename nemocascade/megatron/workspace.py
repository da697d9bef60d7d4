"""Temporary memory of the model's operators, for planners that build nothing."""

from __future__ import annotations

import math
from typing import Literal

from nemocascade_kernels import logits_bytes
from nemocascade_kernels.mamba2 import fla as fla_scan
from nemocascade_kernels.mamba2 import limits, ssd
from nemocascade_kernels.mamba2.arguments import Sizes

from nemocascade.recipe import EngineConfig, ModelConfig

MixerBackend = Literal["triton", "fla", "torch"]
"""Implementations of `mamba2` on a GPU."""

SCAN_CHUNK = ssd.LARGEST_CHUNK
"""Tokens between two states that the scan in torch keeps for backward on a GPU."""


def head_bytes(
    model: ModelConfig, tokens: int, element_size: int, *, tp: int, on_gpu: bool, heads: int = 1
) -> int:
    """Peak bytes of logits in the loss of `tokens` tokens on one of `tp` ranks. heads: 2 for a
    divergence from a teacher."""
    device = "cuda" if on_gpu else "cpu"
    shard = -(-model.vocab_size // tp)
    return logits_bytes(tokens, shard, element_size, device=device, ranks=tp, heads=heads)


def mixer_sizes(model: ModelConfig, tp: int) -> Sizes:
    """Sizes of a Mamba-2 mixer on one of `tp` ranks."""
    groups = max(1, model.mamba_groups // tp)
    return Sizes(
        heads=max(groups, model.mamba_heads // tp),
        head_dim=model.mamba_head_dim,
        groups=groups,
        state=model.mamba_state,
        dt_limit=(model.mamba_dt_min, math.inf),
        eps=model.norm_eps,
    )


def planned_mixer(model: ModelConfig, engine: EngineConfig) -> MixerBackend:
    """The implementation of `mamba2` that a run on GPUs is expected to use."""
    if engine.fla == "on":
        return "fla"
    if limits.size_limitation(model.mamba_head_dim, model.mamba_state) is None:
        return "triton"
    return "torch" if engine.fla == "off" else "fla"


def scan_problems(model: ModelConfig, tokens: int, *, tp: int) -> list[str]:
    """Why fla-core cannot scan a pack of `tokens` rows; [] if it can."""
    try:
        fla_scan.parts(tokens, mixer_sizes(model, tp))
    except ValueError as error:
        return [
            f"fla-core: {error}: lower the capacity, raise --parallel.cp, or set --engine.fla off"
        ]
    return []


def scan_bytes(
    model: ModelConfig, tokens: int, element_size: int, *, tp: int, backend: MixerBackend
) -> int:
    """Temporary bytes of a Mamba-2 mixer's backward on a GPU, on one of `tp` ranks."""
    sizes = mixer_sizes(model, tp)
    if backend == "triton":
        return limits.workspace_bytes(tokens, sizes, element_size)
    if backend == "fla":
        return fla_scan.workspace_bytes(tokens, sizes, element_size)
    # Beside its blocks, the gradient of the projection's output: that of the states is larger.
    gradient = tokens * (sizes.inner + sizes.channels + sizes.heads)
    return ssd.workspace_bytes(tokens, sizes.inner) + gradient * element_size
