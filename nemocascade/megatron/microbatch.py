"""A packed batch on its device, the input of the model's layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from nemocascade_kernels import PackedSeq, Truncation
from torch import Tensor

from nemocascade.megatron.context import ContextShard
from nemocascade.megatron.replay import RouteRecorder, RouteReplay
from nemocascade.types import PackedBatch


@dataclass(frozen=True, eq=False)
class DispatchPlan:
    """Message sizes of one dispatch to the experts of other ranks.

    to_owner: this rank's slots for each of the ep expert groups.
    received: rows from each of the ep x etp ranks.
    arrived: [ep * etp, local experts, sources] int32 on the device, rows from each rank for each
    expert; by the node of their tokens if the rank passes on rows of several nodes.
    """

    to_owner: list[int]
    received: list[int]
    arrived: Tensor

    @property
    def copies(self) -> int:
        """Ranks that share an expert (etp); each gets a copy of its rows."""
        return len(self.received) // len(self.to_owner)

    @property
    def sent(self) -> list[int]:
        """Rows to each of the ep x etp ranks."""
        return [count for count in self.to_owner for _ in range(self.copies)]


@dataclass(frozen=True, eq=False)
class NodePlan:
    """Message sizes of a dispatch to experts on several nodes.

    sent, received: rows to and from each node, one for each token and node of its experts. ranks:
    the plan of the exchange that follows, inside the node or over all ranks.
    """

    sent: list[int]
    received: list[int]
    ranks: DispatchPlan


@dataclass(eq=False)
class FirstPass:
    """Results of a layer's forward pass for its recomputation in backward.

    experts: [rows, K] int32, the router's choices. dispatch, node_dispatch: the plan for them, if
    the expert ranks are on one node, or on several. All are None before the forward pass.
    """

    experts: Tensor | None = None
    dispatch: DispatchPlan | None = None
    node_dispatch: NodePlan | None = None


@dataclass(frozen=True, eq=False)
class Microbatch(PackedSeq):
    """The documents of a packed batch, and the routers' settings for it.

    batch: the packed batch; its tensors are on the device.
    shard: under context parallelism, the documents among this rank's rows; otherwise None. Then
        `starts`, `lengths` and `cu_seqlens` describe these rows.
    trained_rows: number of rows whose loss counts, known on the host.
    aux_scale: factor on the routers' auxiliary losses, 1 / (documents of the whole step).
    replay: choices of experts for the routers to use; None: they choose.
    recorder: records the routers' choices; None: not recorded.
    first_pass: that of the called layer, if backward recomputes it; otherwise None.
    temperature, truncation: of the trained policy. entropy: measure the policy's entropy.
    """

    batch: PackedBatch | None = None
    shard: ContextShard | None = None
    aux_scale: float = 1.0
    trained_rows: int = 0
    replay: RouteReplay | None = None
    recorder: RouteRecorder | None = None
    first_pass: FirstPass | None = None
    temperature: float = 1.0
    truncation: Truncation | None = None
    entropy: bool = False

    @classmethod
    def from_batch(
        cls,
        batch: PackedBatch,
        device: torch.device,
        aux_scale: float = 1.0,
        *,
        replay: RouteReplay | None = None,
        recorder: RouteRecorder | None = None,
        temperature: float = 1.0,
        truncation: Truncation | None = None,
        entropy: bool = False,
    ) -> Microbatch:
        """Make the description of `batch`, whose tensors are on the host, and move it to `device`.

        Raises ValueError if `replay` or `recorder` is for another number of tokens.
        """
        for name, routes in (("replay", replay), ("recorder", recorder)):
            if routes is not None and routes.choices.shape[0] != batch.tokens.numel():
                raise ValueError(
                    f"{name} holds {routes.choices.shape[0]} tokens and the packed batch "
                    f"{batch.tokens.numel()}: make it for the batch's rows"
                )
        moved = batch.to(device)
        shard = None if batch.cp_size == 1 else ContextShard(batch, device)
        if shard is None:
            seq = replace(PackedSeq.from_cu_seqlens(batch.cu_seqlens), cu_seqlens=moved.cu_seqlens)
        else:
            seq = PackedSeq.from_cu_seqlens(shard.cu_seqlens(), device)
        return cls(
            starts=seq.starts,
            lengths=seq.lengths,
            cu_seqlens=seq.cu_seqlens,
            total=seq.total,
            max_length=seq.max_length,
            batch=moved,
            shard=shard,
            aux_scale=aux_scale,
            trained_rows=batch.num_trained(),
            replay=replay,
            recorder=recorder,
            temperature=temperature,
            truncation=truncation,
            entropy=entropy,
        )

    def recomputed_later(self) -> Microbatch:
        """A copy for both passes of one layer call: forward, and its recomputation."""
        return replace(self, first_pass=FirstPass())

    def document_bounds(self) -> Tensor:
        """Bounds of the pack's documents among this rank's rows, [D + 1] int32 on the device."""
        return self.cu_seqlens if self.shard is None else self.shard.document_bounds

    def token_mask(self, rows: slice) -> Tensor | None:
        """Mask [rows] bool, False for padding; None if `rows` hold no padding."""
        assert self.batch is not None
        real = self.batch.num_own_tokens
        if rows.stop <= real:
            return None
        index = torch.arange(rows.start, rows.stop, device=self.device)
        return index < real
