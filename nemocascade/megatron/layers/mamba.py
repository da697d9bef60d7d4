"""The Mamba-2 mixer (arXiv 2405.21060) for packed documents, with Megatron's names and layout.

    out = W_out mamba2(W_in u)

`nemocascade_kernels.mamba2` defines the computation between the two projections. Tensor parallelism
shards heads and groups; each rank computes whole groups.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.utils import _split_tensor_factory
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import (
    ensure_metadata_has_dp_cp_group,
    make_sharded_tensors_for_checkpoint,
    sharded_state_dict_default,
)
from nemocascade_kernels import PackedSeq, mamba2, mamba2_final_state
from torch import Tensor

from nemocascade.megatron.config import CascadeConfig
from nemocascade.megatron.context import ContextShard, GatherRanks, tie
from nemocascade.megatron.init import Fill, generator_for, sharded_init
from nemocascade.megatron.layers.border_states import entering_states
from nemocascade.megatron.layers.linear import column_linear, row_linear, tp_shard
from nemocascade.megatron.layers.lora import FACTOR_B
from nemocascade.megatron.microbatch import Microbatch

States = tuple[Tensor, Tensor]


def _parameter(value: Tensor) -> torch.nn.Parameter:
    """A parameter sharded over TP in dimension 0, with Megatron's attributes."""
    parameter = torch.nn.Parameter(value)
    set_tensor_model_parallel_attributes(parameter, True, 0, 1)
    return parameter


class _CutOverTp(torch.nn.Module):
    """A module whose parameters are all sharded over TP in dimension 0."""

    tp_group: Any

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        state = self.state_dict(prefix="", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            state,
            prefix,
            dict.fromkeys(state, 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return sharded


class CausalConv1d(_CutOverTp):
    """Weight [C, 1, K] and bias [C] of the depthwise convolution, sharded over TP by blocks."""

    def __init__(
        self, config: CascadeConfig, blocks: tuple[int, ...], width: int, name: str, tp_group: Any
    ) -> None:
        super().__init__()
        self.tp_group = tp_group
        shard = tp_shard(tp_group, 0, blocks)
        bound = 1 / math.sqrt(width)

        def fill(what: str) -> Fill | None:
            generator = generator_for(config.seed, f"{name}.{what}")
            return config.fill_of(lambda w: w.uniform_(-bound, bound, generator=generator))

        channels = sum(blocks)
        dtype = config.params_dtype
        self.weight = _parameter(
            sharded_init((channels, 1, width), fill("weight"), (shard,), dtype=dtype)
        )
        self.bias = _parameter(sharded_init((channels,), fill("bias"), (shard,), dtype=dtype))


class GatedRMSNorm(_CutOverTp):
    """Weight [inner / tp] of the gated norm; each rank has whole groups."""

    def __init__(self, config: CascadeConfig, inner: int, tp_group: Any) -> None:
        super().__init__()
        self.tp_group = tp_group
        self.weight = _parameter(torch.ones(inner // tp_group.size(), dtype=config.params_dtype))


class MambaMixer(MegatronModule):
    """The mixer; sizes come from `config.shape`.

    heads, groups, inner (heads * head_dim) and channels (of the convolution): sizes on this rank.
    layer_number: from 1, over the whole model. dt_limit: bounds of softplus(dt + dt_bias).
    backend: the required implementation of `mamba2`; None is the best one.
    Raises ValueError if TP does not divide the groups.
    """

    def __init__(
        self,
        config: CascadeConfig,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        backend: str | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__(config)
        shape, self.tp_group = config.shape, pg_collection.tp
        tp = self.tp_group.size()
        if shape.mamba_groups % tp:
            raise ValueError(
                f"tp({tp}) does not divide model.mamba_groups({shape.mamba_groups}): each rank "
                "computes whole groups, so choose a TP that divides the groups"
            )
        self.cp_group = pg_collection.cp
        self.heads, self.groups = shape.mamba_heads // tp, shape.mamba_groups // tp
        self.head_dim, self.state = shape.mamba_head_dim, shape.mamba_state
        self.inner = self.heads * self.head_dim
        self.channels = self.inner + 2 * self.groups * self.state
        self.dt_limit, self.eps, self.backend = dt_limit, config.layernorm_epsilon, backend

        name = f"layers.{layer_number - 1}.mixer"
        inner, shared = shape.mamba_inner, shape.mamba_groups * shape.mamba_state
        blocks = (inner, inner, shared, shared, shape.mamba_heads)
        self.in_proj = column_linear(
            config,
            config.hidden_size,
            sum(blocks),
            name=f"{name}.in_proj.weight",
            tp_group=self.tp_group,
            blocks=blocks,
        )
        self.conv1d = CausalConv1d(
            config, (inner, shared, shared), shape.mamba_conv, f"{name}.conv1d", self.tp_group
        )
        self._make_head_parameters(config, name)
        self.norm = GatedRMSNorm(config, inner, self.tp_group)
        self.out_proj = row_linear(
            config,
            inner,
            config.hidden_size,
            name=f"{name}.out_proj.weight",
            tp_group=self.tp_group,
        )

    def _make_head_parameters(self, config: CascadeConfig, name: str) -> None:
        """Make A uniform in [1, 16]; dt_bias such that softplus(dt_bias) is log-uniform in
        [1e-3, 0.1]; D one. They are float32 at any model precision: decays need it."""
        heads = config.shape.mamba_heads
        shard = (tp_shard(self.tp_group, 0),)

        def a_log(w: Tensor) -> None:
            w.uniform_(1, 16, generator=generator_for(config.seed, f"{name}.A_log")).log_()

        def dt_bias(w: Tensor) -> None:
            low, high = math.log(1e-3), math.log(0.1)
            w.uniform_(low, high, generator=generator_for(config.seed, f"{name}.dt_bias"))
            dt = w.exp().clamp_(min=1e-4)
            w.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus

        self.A_log = _parameter(sharded_init((heads,), config.fill_of(a_log), shard))
        self.dt_bias = _parameter(sharded_init((heads,), config.fill_of(dt_bias), shard))
        self.D = _parameter(sharded_init((heads,), lambda w: w.fill_(1), shard))

    def forward(self, hidden: Tensor, packed: PackedSeq) -> Tensor:
        """Apply the mixer to [T, 1, H], or [T / tp, 1, H] if sequence-parallel; same shape."""
        zxbcdt, shard = self.in_proj(hidden)[0].squeeze(1), None
        if isinstance(packed, Microbatch):
            shard = packed.shard
        if shard is not None and shard.exchanges:
            mixed = self.mix_shard(zxbcdt, packed, shard)
        else:
            mixed, _ = self.mix(zxbcdt, packed)
        out: Tensor = self.out_proj(mixed.unsqueeze(1))[0]
        return out

    def mix(
        self,
        zxbcdt: Tensor,
        packed: PackedSeq,
        initial_state: States | None = None,
        *,
        return_final_state: bool = False,
    ) -> tuple[Tensor, States | None]:
        """Input of out_proj, [T, inner], from the output of in_proj; states as in `mamba2`."""
        return mamba2(
            zxbcdt,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            self.dt_bias,
            -self.A_log.float().exp(),
            self.D,
            self.norm.weight,
            packed,
            **self._sizes(),
            eps=self.eps,
            initial_state=initial_state,
            return_final_state=return_final_state,
            recompute="M" not in self.config.recompute_layers,
            backend=self.backend,
        )

    def _sizes(self) -> dict[str, Any]:
        """Arguments of `mamba2` and `mamba2_final_state`."""
        return {
            "heads": self.heads,
            "head_dim": self.head_dim,
            "groups": self.groups,
            "state": self.state,
            "dt_limit": self.dt_limit,
        }

    def mix_shard(self, zxbcdt: Tensor, packed: PackedSeq, shard: ContextShard) -> Tensor:
        """`mix` of one context-parallel rank's rows [R, ...].

        The recurrence is linear in the state that enters a segment. So every segment's last
        document is scanned from zero at first, for the state it leaves; these are folded in order,
        and the scan of a continued document starts from the result.
        """
        halos, tails = self._halos(zxbcdt, shard)
        left = tie(self._left(zxbcdt, shard, halos), tails)
        states, last = entering_states(left, packed, shard, self.cp_group)
        entering = [p.number for p in shard.parts if p.before]
        by_segment = dict(zip(entering, states, strict=True))
        if not entering:
            return tie(self.mix(zxbcdt, packed)[0], last)
        # Only continued documents take the slower way with states. A split has one gradient.
        rows = zxbcdt.split([run.documents.total for run in shard.runs])
        mixed = []
        for own, run in zip(rows, shard.runs, strict=True):
            initial = None
            if run.continues is not None:
                ssm = by_segment[run.continues].view(1, self.heads, self.head_dim, self.state)
                initial = halos[run.continues][None], ssm
            mixed.append(self.mix(own, run.documents, initial)[0])
        return tie(torch.cat(mixed), last)

    def _halos(self, zxbcdt: Tensor, shard: ContextShard) -> tuple[dict[int, Tensor], Tensor]:
        """The convolution's inputs before each of the rank's segments that continues a document,
        [K - 1, W] by segment, and those that all ranks gave, [c, 2, K - 1, W]."""
        width = self.conv1d.weight.shape[2] - 1
        xbc = zxbcdt[:, self.inner : self.inner + self.channels]
        tails = torch.stack([xbc[p.rows.stop - width : p.rows.stop] for p in shard.parts])
        gathered: Tensor = GatherRanks.apply(tails, self.cp_group)
        halos = {}
        for part in shard.parts:
            if part.before:
                rank, which = shard.place(part.number - 1)
                own = min(width, part.before)
                rows = gathered[rank, which, width - own :]
                halos[part.number] = torch.nn.functional.pad(rows, (0, 0, width - own, 0))
        return halos, gathered

    def _left(self, zxbcdt: Tensor, shard: ContextShard, halos: dict[int, Tensor]) -> Tensor:
        """The states that the rank's two segments leave from zero, and their decays,
        [2, h, p n + 1]; zeros where the next segment starts a document."""
        high = torch.promote_types(zxbcdt.dtype, torch.float32)
        none = zxbcdt.new_zeros(self.heads, self.head_dim * self.state + 1, dtype=high)
        found = []
        # One after the other: backward needs the convolution of one of them at a time.
        for part in shard.parts:
            if not part.continues:
                found.append(none)
                continue
            # A document that fills the segment may have inputs before its rows here.
            conv = halos.get(part.number) if len(part.bounds) == 2 else None
            states, decays = mamba2_final_state(
                zxbcdt[part.last_rows],
                self.conv1d.weight.squeeze(1),
                self.conv1d.bias,
                self.dt_bias,
                -self.A_log.float().exp(),
                shard.leaving[part.number],
                **self._sizes(),
                initial_conv=None if conv is None else conv[None],
                backend=self.backend,
            )
            found.append(torch.cat([states[0].flatten(1), decays[0, :, None]], dim=1))
        return torch.stack(found)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Store fused tensors by part, as Megatron's mixer does, so that TP may change."""
        metadata = ensure_metadata_has_dp_cp_group(metadata)
        own: dict[str, Any] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        sharded: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            dict.fromkeys(("A_log", "dt_bias", "D"), 0),
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, module in self.named_children():
            sharded.update(
                sharded_state_dict_default(
                    module, f"{prefix}{name}.", sharded_offsets, metadata, tp_group=self.tp_group
                )
            )
        inner, shared = self.inner, self.groups * self.state
        conv = {"x": inner, "B": shared, "C": shared}
        fused = {"z": inner, **conv, "dt": self.heads}
        parts = {
            "in_proj.weight": fused,
            f"in_proj.{FACTOR_B}": fused,
            "conv1d.weight": conv,
            "conv1d.bias": conv,
        }
        for name, sizes in parts.items():
            key = f"{prefix}{name}"
            if key not in sharded:
                continue
            sharded[key] = _split_tensor_factory(sharded[key], [*sizes.values()], [*sizes], 0)
        return sharded
