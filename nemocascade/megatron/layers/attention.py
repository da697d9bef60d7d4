"""Grouped-query attention for packed documents, as a mixer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    all_gather_last_dim_from_tensor_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from nemocascade_kernels import PackedSeq
from torch import Tensor

from nemocascade.megatron.config import CascadeConfig
from nemocascade.megatron.context import gather_keys
from nemocascade.megatron.layers.attention_core import (
    TransformerEngineAttention,
    packed_attention,
)
from nemocascade.megatron.layers.continued_attention import continued_attention
from nemocascade.megatron.layers.linear import column_linear, row_linear
from nemocascade.megatron.layers.norm import RMSNorm
from nemocascade.megatron.layers.rope import rotary_tables, rotate
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.recipe import ModelConfig


class Attention(MegatronModule):
    """Grouped-query attention with Megatron's layout: `linear_qkv` holds, for each key/value head,
    its query heads, then the key, then the value.

    With fewer key/value heads than TP ranks, the ranks that share a key/value head gather its
    projection and each takes its own query heads, as in Megatron; the weights stay sharded.
    Under context parallelism queries stay on their rank and keys and values are gathered, which
    grouped queries make small. A pack whose documents are within segments exchanges nothing.
    use_te: Transformer Engine computes the attention of CUDA tensors, except that over gathered
    keys.
    Raises ValueError if the heads cannot be sharded this way.
    """

    def __init__(
        self,
        config: CascadeConfig,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        use_te: bool = False,
        **_unused: Any,
    ) -> None:
        super().__init__(config)
        shape, self.tp_group = config.shape, pg_collection.tp
        tp = self.tp_group.size()
        self.head_dim = shape.head_dim
        width = _projection_rows(shape, tp)
        self.cp_group = pg_collection.cp
        self.ratio = shape.num_heads // shape.num_kv_heads
        self.kv_heads = max(1, shape.num_kv_heads // tp)
        # Ranks that share one key/value head.
        self.sharing = max(1, tp // shape.num_kv_heads)
        self.all_kv_heads = shape.num_kv_heads
        self.te_attention: TransformerEngineAttention | None = None
        if use_te:
            self.te_attention = TransformerEngineAttention(
                shape.num_heads // tp, self.kv_heads, shape.head_dim
            )
        self.rope_dim = int(shape.head_dim * shape.rope_percent) // 2 * 2 if shape.rope else 0
        self.rope_base = shape.rope_base

        name = f"layers.{layer_number - 1}.mixer"
        self.linear_qkv = column_linear(
            config,
            config.hidden_size,
            width,
            name=f"{name}.linear_qkv.weight",
            tp_group=self.tp_group,
        )
        self.linear_proj = row_linear(
            config,
            shape.num_heads * shape.head_dim,
            config.hidden_size,
            name=f"{name}.linear_proj.weight",
            tp_group=self.tp_group,
        )
        self.q_layernorm: RMSNorm | None = None
        self.k_layernorm: RMSNorm | None = None
        if shape.qk_norm:
            self.q_layernorm = RMSNorm(config, shape.head_dim, config.layernorm_epsilon)
            self.k_layernorm = RMSNorm(config, shape.head_dim, config.layernorm_epsilon)

    def forward(self, hidden: Tensor, packed: PackedSeq) -> Tensor:
        """Apply attention to [T, 1, H], or [T / tp, 1, H] if sequence-parallel; same shape."""
        q, k, v = self.heads(self.linear_qkv(hidden)[0], self.rotary(packed))
        mixed = self.attend(q, k, v, packed)
        out: Tensor = self.linear_proj(mixed.flatten(1).unsqueeze(1))[0]
        return out

    def rotary(self, packed: PackedSeq) -> tuple[Tensor, Tensor] | None:
        """cos and sin of every row's angles; None without rotary positions."""
        return rotary_tables(packed, self.rope_dim, self.rope_base) if self.rope_dim else None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, packed: PackedSeq) -> Tensor:
        """Causal attention within documents; see `packed_attention`."""
        shard = packed.shard if isinstance(packed, Microbatch) else None
        if shard is not None and shard.exchanges:
            gathered = gather_keys(k, v, shard, self.cp_group)
            queries = q.split(shard.segment)
            return torch.cat(
                [
                    continued_attention(own, *pair, keys)
                    for own, pair, keys in zip(queries, gathered, shard.keys, strict=True)
                ]
            )
        if self.te_attention is None or not q.is_cuda or q.dtype == torch.float32:
            return packed_attention(q, k, v, packed)
        out: Tensor = self.te_attention(q, k, v, packed)
        return out

    def heads(
        self, qkv: Tensor, rotary: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Split into q [T, heads / tp, d], k and v [T, kv heads of this rank, d]; norm and rotate.

        qkv: [T, 1, ...], output of `linear_qkv`. rotary: cos and sin [T, m] of the rows' angles.
        """
        q, k, v = self.grouped_heads(qkv)
        q = q.flatten(1, 2)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            q, k = self.q_layernorm(q), self.k_layernorm(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        return q, k, v

    def grouped_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split into q [T, kv heads of this rank, query heads of each, d], k and v [T, kv heads,
        d]."""
        rank = self.tp_group.rank()
        if self.sharing > 1:
            qkv = all_gather_last_dim_from_tensor_parallel_region(qkv, group=self.tp_group)
            width = qkv.shape[-1] // self.all_kv_heads
            qkv = qkv.narrow(-1, rank // self.sharing * width, width)
        qkv = qkv.reshape(qkv.shape[0], self.kv_heads, self.ratio + 2, self.head_dim)
        q, k, v = qkv.split([self.ratio, 1, 1], dim=2)
        if self.sharing > 1:
            mine = self.ratio // self.sharing
            q = q.narrow(2, rank % self.sharing * mine, mine)
        return q, k.squeeze(2), v.squeeze(2)


def _projection_rows(shape: ModelConfig, tp: int) -> int:
    """Rows of the query, key and value projection. Raises ValueError if `tp` ranks cannot share
    them and the heads."""
    if shape.num_heads % tp or (shape.num_kv_heads % tp and tp % shape.num_kv_heads):
        raise ValueError(
            f"tp({tp}) must divide model.num_heads({shape.num_heads}), and divide "
            f"model.num_kv_heads({shape.num_kv_heads}) or be a multiple of it: choose such a TP"
        )
    rows = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
    if rows % tp:
        raise ValueError(
            f"tp({tp}) does not divide the {rows} rows of the query, key and value "
            "projection: choose a TP that does"
        )
    return rows
