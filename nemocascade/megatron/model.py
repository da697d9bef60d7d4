"""The hybrid language model: Megatron's HybridModel and HybridStack on packed batches.

Shape letters: T tokens of a micro-batch, H hidden size, V vocabulary, tp tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from nemocascade_kernels import linear_policy_loss
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemocascade.megatron.config import Accelerators, CascadeConfig
from nemocascade.megatron.cpu import cuda_names
from nemocascade.megatron.distillation import Distillation, StatesOf
from nemocascade.megatron.layers.deepep import deepep_limitation
from nemocascade.megatron.layers.flash_attention import use_flash_attention
from nemocascade.megatron.layers.linear import use_weight_gradient
from nemocascade.megatron.layers.norm import RMSNorm
from nemocascade.megatron.layers.specs import layer_specs
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.recipe import UserError
from nemocascade.runtime.world import World


class CascadeStack(HybridStack):
    """Megatron's stack with our final norm and our loop over packed layers."""

    def __init__(self, config: CascadeConfig, submodules: Any, **kwargs: Any) -> None:
        # The parent would build a final norm that needs Transformer Engine.
        super().__init__(config, submodules, post_layer_norm=False, **kwargs)
        if self.post_process:
            self.final_norm = RMSNorm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )

    def forward(self, hidden_states: Tensor | None, packed: Microbatch) -> Tensor:
        """Run the layers and the final norm.

        hidden_states: [T/tp, 1, H], or None if it comes from the pipeline. Returns [T/tp, 1, H].
        """
        x = hidden_states if self.pre_process else self.input_tensor
        assert x is not None
        for symbol, layer in zip(self.layer_type_list, self.layers, strict=True):
            if symbol in self.config.recompute_layers and torch.is_grad_enabled():
                x = checkpoint(
                    layer,
                    x,
                    packed_seq_params=packed.recomputed_later(),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                x = layer(x, packed_seq_params=packed)
        if self.post_process:
            x = self.final_norm(x)
        elif not self.layers:
            # The schedule frees a stage's output, so it may not be the stage's input, or a view.
            x = x.clone()
        return x


class CascadeModel(HybridModel):
    """HybridModel whose output is a loss over the trained rows, computed without all logits."""

    def forward(self, packed: Microbatch, objective: Any = None) -> Any:
        """Hidden states [T/tp, 1, H] of a stage; on the last one, with an objective, its loss.

        packed: the micro-batch. objective: of `nemocascade_kernels.linear_policy_loss`, or one of
        megatron/distillation.py.
        Returns the output of linear_policy_loss, or the objective's own, on the last stage with an
        objective, and the final hidden states [T/tp, 1, H] otherwise.
        """
        batch = packed.batch
        assert batch is not None
        hidden = self.embed(batch.tokens) if self.pre_process else None
        hidden = self.decoder(hidden, packed)
        if not self.post_process or objective is None:
            return hidden
        tp_group = self.pg_collection.tp if self.config.tensor_model_parallel_size > 1 else None
        if self.config.sequence_parallel:
            # Its backward sums the gradient over the vocabulary shards while scattering it.
            hidden = gather_from_sequence_parallel_region(hidden, group=self.pg_collection.tp)
        hidden, head = hidden.flatten(0, 1), self.lm_head()
        if isinstance(objective, StatesOf):
            return objective.kept(hidden)
        settings: dict[str, Any] = {
            "temperature": packed.temperature,
            "tp_group": tp_group,
            "reduce_hidden_grad": not self.config.sequence_parallel,
            "accumulate_main_grad": torch.is_grad_enabled() and hasattr(head, "main_grad"),
        }
        if isinstance(objective, Distillation):
            return objective.loss(hidden, head, batch.targets, **settings)
        return linear_policy_loss(
            hidden,
            head,
            batch.targets,
            objective,
            truncation=packed.truncation,
            return_entropy=packed.entropy,
            active_rows=packed.trained_rows,
            **settings,
        )

    def lm_head(self) -> Tensor:
        """This rank's rows of the LM head, [V/tp, H]."""
        weight: Tensor
        if self.share_embeddings_and_output_weights:
            weight = self.shared_embedding_or_output_weight()
        else:
            weight = self.output_layer.weight
        return weight

    def embed(self, tokens: Tensor) -> Tensor:
        """Embed ids: [T] -> [T/tp, 1, H]."""
        embedding = self.embedding.word_embeddings
        hidden: Tensor = embedding(tokens[None])
        if not embedding.reduce_scatter_embeddings:
            hidden = hidden.transpose(0, 1).contiguous()
        return hidden


def build_model(
    world: World, config: CascadeConfig, accelerators: Accelerators
) -> list[CascadeModel]:
    """This rank's part of the model, one chunk for each virtual pipeline stage, on its device."""
    shape, parallel = config.shape, world.parallel
    needs_deepep = config.expert_exchange == "deepep" and parallel.ep * parallel.etp > 1
    if needs_deepep and (reason := deepep_limitation(world.device, parallel.etp)):
        raise UserError(
            f"engine.expert_exchange is deepep, but {reason}: set --engine.expert-exchange auto"
        )
    if config.gradient_accumulation_fusion:
        use_weight_gradient(apex=accelerators.fused_weight_gradient)
    if world.device.type == "cuda":
        # For the whole process: a model on the meta device, which only counts, changes nothing.
        use_flash_attention(accelerators.flash_attention)
    layers = layer_specs(
        shape,
        # Triton is the best one where it passed its check: then NEMOCASCADE_BACKEND may choose.
        mamba2_backend=None if accelerators.mamba2 == "triton" else accelerators.mamba2,
        te_attention=accelerators.te_attention,
    )
    spec = ModuleSpec(module=CascadeStack, submodules=layers)
    chunks = []
    for stage in range(parallel.vpp):
        # Megatron synchronises the tied weights of two stages on the CUDA device.
        with cuda_names():
            chunk = CascadeModel(
                config=config,
                hybrid_stack_spec=spec,
                vocab_size=shape.vocab_size,
                max_sequence_length=0,
                hybrid_layer_pattern=parallel.layout(shape.pattern),
                pre_process=world.is_first_stage and stage == 0,
                post_process=world.is_last_stage and stage == parallel.vpp - 1,
                share_embeddings_and_output_weights=shape.tie_embeddings,
                position_embedding_type="none",
                pg_collection=world.groups,
                vp_stage=stage if parallel.vpp > 1 else None,
            )
        chunks.append(chunk if chunk_is_meta(chunk) else chunk.to(world.device))
    return chunks


def chunk_is_meta(chunk: torch.nn.Module) -> bool:
    """True if the module was built on the meta device, with shapes but no values."""
    return any(p.is_meta for p in chunk.parameters())
