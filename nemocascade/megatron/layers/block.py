"""The residual layer around every type of mixer: `x + mixer(norm(x))`."""

from __future__ import annotations

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from nemocascade_kernels import PackedSeq
from torch import Tensor

from nemocascade.megatron.config import CascadeConfig
from nemocascade.megatron.layers.norm import RMSNorm


class ResidualBlock(MegatronModule):
    """One layer of the stack, built and called by Megatron's HybridStack.

    mixer: a class or ModuleSpec, built with `config`, `layer_number` and `pg_collection`, whose
        `forward(hidden, packed)` keeps the shape of `hidden`.
    layer_number: from 1, over the whole model.
    HybridStack passes the other arguments to some types of layer; they are ignored.
    """

    def __init__(
        self,
        config: CascadeConfig,
        *,
        mixer: ModuleSpec | type,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        norm: ModuleSpec | type = RMSNorm,
        **_unused: Any,
    ) -> None:
        super().__init__(config)
        if config.hidden_dropout:
            raise ValueError(
                f"hidden_dropout({config.hidden_dropout}) is not supported by these layers: set 0"
            )
        self.layer_number = layer_number
        self.tp_group = pg_collection.tp
        self.norm = build_module(
            norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
        )
        self.mixer = build_module(
            mixer, config=config, layer_number=layer_number, pg_collection=pg_collection
        )

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        inference_context: None = None,
        rotary_pos_emb: Tensor | None = None,
        *,
        packed_seq_params: PackedSeq,
        **_unused: Any,
    ) -> Tensor:
        """Apply the layer to hidden_states: [T, 1, H], or [T / tp, 1, H] if sequence-parallel.

        packed_seq_params: the documents. Masks and positions follow from it, so the other
        arguments of Megatron's layers are not used. Returns the shape and dtype of the input.
        """
        mixed: Tensor = self.mixer(self.norm(hidden_states), packed_seq_params)
        return hidden_states + mixed
