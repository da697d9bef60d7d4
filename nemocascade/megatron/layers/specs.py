"""The layer of each symbol of the layer pattern."""

from __future__ import annotations

import math
from typing import Any

from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from nemocascade.megatron.layers.attention import Attention
from nemocascade.megatron.layers.block import ResidualBlock
from nemocascade.megatron.layers.mamba import MambaMixer
from nemocascade.megatron.layers.mlp import MLP
from nemocascade.megatron.layers.moe import MoEMixer
from nemocascade.recipe import ModelConfig


def _block(mixer: type, **params: Any) -> ModuleSpec:
    return ModuleSpec(
        module=ResidualBlock, params={"mixer": ModuleSpec(module=mixer, params=params)}
    )


def layer_specs(
    shape: ModelConfig, *, mamba2_backend: str | None, te_attention: bool
) -> HybridStackSubmodules:
    """The layers that Megatron's HybridStack builds: M, *, - and E.

    mamba2_backend: the required implementation of `mamba2`; None is the best one.
    te_attention: Transformer Engine computes attention.
    """
    dt_limit = (shape.mamba_dt_min, math.inf)
    return HybridStackSubmodules(
        mamba_layer=_block(MambaMixer, backend=mamba2_backend, dt_limit=dt_limit),
        attention_layer=_block(Attention, use_te=te_attention),
        mlp_layer=_block(MLP),
        moe_layer=_block(MoEMixer),
    )
