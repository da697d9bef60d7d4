"""Settings that modules are built with: Megatron's TransformerConfig, and accelerators in use."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from nemocascade.megatron.init import Fill, generator_for
from nemocascade.megatron.upstream import without_notes
from nemocascade.megatron.workspace import MixerBackend
from nemocascade.recipe import (
    EngineConfig,
    LoraConfig,
    ModelConfig,
    MoeTrainingConfig,
    ParallelConfig,
)

Init = Callable[[Tensor], Tensor]
Adam = Literal["transformer_engine", "apex", "torch"]


@dataclass(frozen=True)
class Accelerators:
    """Optional packages that this process uses. The default is none: torch's own operators.

    adam: the package whose fused Adam is used. te_attention: Transformer Engine's attention.
    flash_attention: version of the kernels behind torch's variable-length attention.
    fused_weight_gradient: apex accumulates weight gradients inside the GEMM.
    mamba2: the implementation that Mamba-2's mixers require, after its check. None: the best one,
    as `nemocascade_kernels.backends` orders them. te_linears: Transformer Engine's linear layers,
    in FP8. te_overlap: its linear layers beside tensor-parallel communication.
    """

    adam: Adam = "torch"
    te_attention: bool = False
    fused_weight_gradient: bool = False
    mamba2: MixerBackend | None = None
    flash_attention: Literal[2, 3] = 2
    te_linears: bool = False
    te_overlap: bool = False


def seeded_normal(seed: int, name: str, std: float) -> Init:
    """A normal initialiser that depends on the seed and the parameter's global name only.

    Megatron's CPU initialisation calls it on the full weight and slices the result, so every
    parallel layout starts from the same model.
    """

    def init(weight: Tensor) -> Tensor:
        if weight.is_meta:
            return weight
        values = torch.empty(weight.shape, dtype=torch.float32)
        values.normal_(0.0, std, generator=generator_for(seed, name))
        with torch.no_grad():
            return weight.copy_(values)

    return init


def leave(weight: Tensor) -> Tensor:
    """An initialiser that does nothing."""
    return weight


@dataclass
class CascadeConfig(TransformerConfig):
    """Megatron's config with the additional settings of our layers.

    Without Megatron's `perform_initialization`, weights with random initial values are undefined
    until they are loaded. Adapters have initial values in any case.
    """

    shape: ModelConfig = field(default_factory=ModelConfig)
    """The model's own description; layers read their sizes here."""

    moe_training: MoeTrainingConfig = field(default_factory=MoeTrainingConfig)
    seed: int = 0
    """Seed of the initial weights."""

    recompute_layers: str = ""
    """Symbols of the layers that backward recomputes."""

    fp8_experts: bool = False
    """Multiply in FP8 in the routed experts while they train."""

    expert_exchange: str = "auto"
    """How rows go to the experts of other ranks: `EngineConfig.expert_exchange`."""

    overlap_shared_expert: bool = False
    """Run the shared expert while rows travel: `EngineConfig.overlaps_shared_expert`."""

    lora: LoraConfig = field(default_factory=LoraConfig)
    """Low-rank adapters of the layers' weights."""

    def init_for(self, name: str, *, residual: bool = False) -> Init:
        """Initialiser of the weight `name`; `residual` for projections into the residual stream."""
        if not self.perform_initialization:
            return leave
        std = self.shape.init_std
        if residual:
            std /= math.sqrt(self.shape.num_layers)
        return seeded_normal(self.seed, name, std)

    def fill_of(self, fill: Fill) -> Fill | None:
        """`fill`, or None if weights will be loaded."""
        return fill if self.perform_initialization else None


def make_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    engine: EngineConfig,
    moe: MoeTrainingConfig,
    *,
    seed: int,
    fuse_weight_gradient: bool = False,
    fp8_linears: bool = False,
    overlap_tensor_parallel: bool = False,
    lora: LoraConfig | None = None,
    initialise: bool = True,
) -> CascadeConfig:
    """The config of every module of a model.

    fuse_weight_gradient: accumulate weight gradients in `main_grad`, inside the GEMM; `build_model`
        chooses the GEMM. Without it they are rounded to the weights' dtype and added.
    fp8_linears: the linear layers are Transformer Engine's, in FP8. overlap_tensor_parallel: they
        are, and run beside their communication within `user_buffers`.
    lora: adapters of the layers' weights; None: there are none. initialise: fill the weights from
        the seed; False if all of them will be loaded.
    """
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    with without_notes():
        return CascadeConfig(
            shape=model,
            moe_training=moe,
            seed=seed,
            recompute_layers=engine.recomputed,
            fp8_experts=engine.experts == "fp8",
            expert_exchange=engine.expert_exchange,
            # The adapters of the shared expert run where autograd sees them.
            overlap_shared_expert=engine.overlaps_shared_expert(parallel, model)
            and not (lora and lora.rank),
            lora=lora or LoraConfig(),
            **_model_fields(model),
            **_parallel_fields(parallel),
            params_dtype=dtype,
            pipeline_dtype=dtype,
            bf16=engine.precision == "bf16",
            fp8="e4m3" if fp8_linears else None,
            fp8_recipe="blockwise",
            tp_comm_overlap=overlap_tensor_parallel,
            use_cpu_initialization=True,
            perform_initialization=initialise,
            # Upstream's default is deprecated and means the same.
            cuda_graph_modules=[],
            gradient_accumulation_fusion=fuse_weight_gradient,
            calculate_per_token_loss=True,
            init_method=seeded_normal(seed, "output_layer.weight", model.init_std),
            embedding_init_method=seeded_normal(
                seed, "embedding.word_embeddings.weight", model.init_std
            ),
            output_layer_init_method=seeded_normal(seed, "output_layer.weight", model.init_std),
        )


def _model_fields(model: ModelConfig) -> dict[str, Any]:
    """Sizes and types of layers."""
    has_moe = "E" in model.pattern
    gated = model.activation == "swiglu"
    return {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.mlp_width,
        "num_attention_heads": model.num_heads,
        "num_query_groups": model.num_kv_heads,
        "kv_channels": model.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.norm_eps,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "gated_linear_unit": gated,
        "activation_func": F.silu if gated else F.relu,
        "bias_activation_fusion": False,
        "mamba_num_heads": model.mamba_heads,
        "mamba_head_dim": model.mamba_head_dim,
        "mamba_state_dim": model.mamba_state,
        "mamba_num_groups": model.mamba_groups,
        "num_moe_experts": model.num_experts if has_moe else None,
        "moe_ffn_hidden_size": model.expert_width if has_moe else None,
        "moe_router_topk": model.experts_per_token,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
    }


def _parallel_fields(parallel: ParallelConfig) -> dict[str, Any]:
    """Parallel sizes and pipeline communication."""
    return {
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "virtual_pipeline_model_parallel_size": parallel.vpp if parallel.vpp > 1 else None,
        "expert_model_parallel_size": parallel.ep,
        "expert_tensor_parallel_size": parallel.etp,
        # With two stages, both neighbours are one rank: batched messages could be mixed up
        # when chunks interleave. Overlapped messages use two groups.
        "batch_p2p_comm": parallel.vpp == 1,
        "overlap_p2p_comm": parallel.vpp > 1,
        # Megatron's default waits for the device after each message, for torch before 2.0: waiting
        # for a batch did not order the streams (pytorch/pytorch#82450).
        "batch_p2p_sync": False,
        # A stage's output is not needed after it has been sent: backward starts at its node.
        "deallocate_pipeline_outputs": parallel.pp > 1,
        "sequence_parallel": parallel.tp > 1,
    }
