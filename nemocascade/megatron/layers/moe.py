"""Mixture-of-experts mixer: router, routed experts, shared expert.

Shape letters: T tokens on this rank, H hidden size, E experts, K experts a token, I expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.module import MegatronModule
from nemocascade_kernels import (
    Routing,
    moe_experts,
    moe_route,
    router_logits,
    update_expert_bias,
)
from torch import Tensor, nn

from nemocascade.megatron.config import CascadeConfig
from nemocascade.megatron.groups import ExpertNodes
from nemocascade.megatron.layers.adapted_experts import adapted_experts, expert_factors
from nemocascade.megatron.layers.deepep import dispatched_by_deepep
from nemocascade.megatron.layers.dispatch import OverlappedWork, dispatched
from nemocascade.megatron.layers.linear import tp_shard
from nemocascade.megatron.layers.lora import FACTOR_A, FACTOR_B, Adapted, Adapter
from nemocascade.megatron.layers.mlp import MLP
from nemocascade.megatron.layers.moe_loss import attach_loss, load_balance_loss, z_loss
from nemocascade.megatron.layers.node_dispatch import dispatched_over_nodes
from nemocascade.megatron.microbatch import FirstPass, Microbatch


class Router(MegatronModule):
    """Scores every expert for every token, in fp32, and counts the load of each.

    weight: [E, H]. expert_bias: [E] float32 buffer, used only in the selection.
    load: [E] float32 buffer, slots routed to each expert since the last update of the bias.
    """

    expert_bias: Tensor
    load: Tensor

    def __init__(self, config: CascadeConfig, name: str) -> None:
        super().__init__(config=config)
        shape = config.shape
        self.weight = nn.Parameter(
            torch.empty(shape.num_experts, shape.hidden_size, dtype=config.params_dtype)
        )
        config.init_for(f"{name}.weight")(self.weight.data)
        self.weight.requires_grad_(not config.moe_training.freeze_router)
        # Tensor-parallel ranks hold different tokens, so this replicated weight's gradient is
        # summed over them.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        bias = torch.zeros(shape.num_experts, dtype=torch.float32)
        self.register_buffer("expert_bias", bias)
        self.register_buffer("load", torch.zeros_like(bias), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits [T, E] float32 of x [T, H]."""
        # On a CPU this gradient is rounded like that of every linear layer.
        accumulate = x.is_cuda and hasattr(self.weight, "main_grad")
        return router_logits(x, self.weight, accumulate_main_grad=accumulate)

    def route(
        self, logits: Tensor, token_mask: Tensor | None, choices: Tensor | None = None
    ) -> Routing:
        """The routing of logits [T, E]. choices: [T, K] int32, experts to use instead of choosing;
        their weights still come from the logits."""
        shape = self.config.shape
        return moe_route(
            logits,
            shape.experts_per_token,
            score=shape.router_score,
            expert_bias=self.expert_bias if shape.router_bias else None,
            num_groups=shape.router_groups,
            top_groups=shape.router_top_groups,
            normalize=shape.router_normalize,
            scale=shape.router_scale,
            token_mask=token_mask,
            experts=choices,
        )

    def next_bias(self, load: Tensor, rate: float) -> Tensor:
        """The bias moved by `rate` towards equal load. load: [E], summed over all tokens."""
        if rate and self.config.shape.router_bias:
            return update_expert_bias(self.expert_bias, load, rate)
        return self.expert_bias

    def start_step(self, bias: Tensor) -> None:
        """Set the bias [E] and reset the counts."""
        self.expert_bias.copy_(bias)
        self.load.zero_()


class Experts(Adapted, MegatronModule):
    """This rank's experts. linear_fc1 [E/ep, I/etp or 2I/etp, H], linear_fc2 [E/ep, H, I/etp].

    With a gated activation the first half of an expert's linear_fc1 rows is the gate. The factors
    of an adapted weight are linear_fc1_lora_a, linear_fc1_lora_b, and so on.
    """

    def __init__(self, config: CascadeConfig, name: str, groups: ProcessGroupCollection) -> None:
        super().__init__(config=config)
        shape = config.shape
        self.groups = groups
        # Worlds that only count or generate have no nodes.
        self.nodes: ExpertNodes | None = getattr(groups, "expert_nodes", None)
        self.ep_rank, self.ep_size = groups.ep.rank(), groups.ep.size()
        self.etp_rank, self.etp_size = groups.expt_tp.rank(), groups.expt_tp.size()
        self.num_local = shape.num_experts // self.ep_size
        self.gates = 2 if shape.activation == "swiglu" else 1
        width = shape.expert_width // self.etp_size
        self.linear_fc1 = self._parameter(self.gates * width, shape.hidden_size)
        self.linear_fc2 = self._parameter(shape.hidden_size, width)
        self._initialise(name, width)
        for weight, dim in (("linear_fc1", 0), ("linear_fc2", 1)):
            if config.lora.adapts(f"{name}.{weight}"):
                self._adapt(f"{name}.{weight}", weight, dim)

    def _adapt(self, name: str, weight: str, dim: int) -> None:
        """Give a weight its factors. dim: that of an expert's weight which etp shards."""
        shard, first = tp_shard(self.groups.expt_tp, dim), self.ep_rank * self.num_local
        factors = expert_factors(self.config, getattr(self, weight), name, first, shard)
        for factor, value in zip((FACTOR_A, FACTOR_B), factors, strict=True):
            self.register_parameter(f"{weight}_{factor}", value)

    def adapter(self, weight: str) -> Adapter | None:
        """The adapter of linear_fc1 or linear_fc2; None without one."""
        if not hasattr(self, f"{weight}_{FACTOR_A}"):
            return None
        a, b = (getattr(self, f"{weight}_{factor}") for factor in (FACTOR_A, FACTOR_B))
        return Adapter(getattr(self, weight), a, b, self.config.lora.scale)

    def adapters(self) -> list[Adapter]:
        found = (self.adapter(weight) for weight in ("linear_fc1", "linear_fc2"))
        return [adapter for adapter in found if adapter is not None]

    def _parameter(self, rows: int, columns: int) -> nn.Parameter:
        weight = nn.Parameter(
            torch.empty(self.num_local, rows, columns, dtype=self.config.params_dtype)
        )
        # Expert gradients are reduced over the expert-data-parallel group. Every rank counts them
        # in the gradient norm: no two ranks of an expert layout hold the same shard.
        weight.allreduce = False  # type: ignore[attr-defined]
        set_tensor_model_parallel_attributes(weight, True, 1, 1)
        return weight

    def _initialise(self, name: str, width: int) -> None:
        shape = self.config.shape
        if self.linear_fc1.is_meta or not self.config.perform_initialization:
            return
        cut = slice(self.etp_rank * width, (self.etp_rank + 1) * width)
        for local in range(self.num_local):
            expert = self.ep_rank * self.num_local + local
            up = torch.empty(self.gates, shape.expert_width, shape.hidden_size)
            down = torch.empty(shape.hidden_size, shape.expert_width)
            self.config.init_for(f"{name}.linear_fc1.{expert}")(up)
            self.config.init_for(f"{name}.linear_fc2.{expert}", residual=True)(down)
            self.linear_fc1.data[local] = up[:, cut].reshape(-1, shape.hidden_size)
            self.linear_fc2.data[local] = down[:, cut]

    def forward(
        self,
        x: Tensor,
        routing: Routing,
        first_pass: FirstPass | None = None,
        overlapped: OverlappedWork | None = None,
    ) -> Tensor:
        """Apply the experts: x [T, H] and its routing over all experts -> [T, H].

        first_pass: that of the layer, if backward recomputes it. overlapped: runs while rows travel
        by an all-to-all; other ways of exchange ignore it.
        """

        adapters = self.adapter("linear_fc1"), self.adapter("linear_fc2")

        def experts(rows: Tensor, local: Routing) -> Tensor:
            if any(adapters):
                weights = self.linear_fc1, self.linear_fc2
                return adapted_experts(
                    rows, local, *weights, adapters, self.config.shape.activation
                )
            return moe_experts(
                rows,
                local,
                self.linear_fc1,
                self.linear_fc2,
                activation=self.config.shape.activation,
                fp8=self.config.fp8_experts and self.training,
                accumulate_main_grad=hasattr(self.linear_fc1, "main_grad"),
            )

        if self.ep_size * self.etp_size == 1:
            return experts(x, routing)
        if self.config.expert_exchange == "deepep":
            return dispatched_by_deepep(x, routing, experts, self.groups.ep)
        if self.nodes is not None:
            return dispatched_over_nodes(
                x, routing, experts, self.groups, self.nodes, first_pass, overlapped
            )
        return dispatched(x, routing, experts, self.groups, first_pass, overlapped)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Shard the expert axis over ep, the width over etp; gate and up are stored separately."""
        state: dict[str, Any] = {}

        def add(key: str, tensor: Tensor, axis: int | None) -> None:
            """Add a tensor [E/ep, ...]. axis: sharded over etp; None: all of its ranks hold it."""
            replica = self.groups.expt_dp.rank()
            shards = [(0, self.ep_rank, self.ep_size)]
            if axis is not None:
                shards.append((axis, self.etp_rank, self.etp_size))
            state[prefix + key] = ShardedTensor.from_rank_offsets(
                prefix + key,
                tensor.data,
                *shards,
                replica_id=(0, self.etp_rank if axis is None else 0, replica),
            )

        def add_halves(key: str, tensor: Tensor) -> None:
            halves = tensor.data.unflatten(1, (self.gates, -1))
            for index, part in enumerate(("gate", "up")[-self.gates :]):
                add(f"{key}.{part}", halves[:, index], 1)

        add_halves("linear_fc1", self.linear_fc1)
        add("linear_fc2", self.linear_fc2, 2)
        if (adapter := self.adapter("linear_fc1")) is not None:
            add(f"linear_fc1.{FACTOR_A}", adapter.a, None)
            add_halves(f"linear_fc1.{FACTOR_B}", adapter.b)
        if (adapter := self.adapter("linear_fc2")) is not None:
            add(f"linear_fc2.{FACTOR_A}", adapter.a, 2)
            add(f"linear_fc2.{FACTOR_B}", adapter.b, None)
        return state


class SharedPass:
    """A forward pass of the shared expert `mlp` on hidden [T, 1, H], in two parts.

    Its gradient and that of the routed experts are the only two that are added for `hidden`, so
    the order in which the parts run does not change a bit.
    """

    def __init__(self, mlp: MLP, hidden: Tensor) -> None:
        self._mlp, self._hidden = mlp, hidden
        self._wide: Tensor | None = None
        self._out: Tensor | None = None

    def work(self) -> OverlappedWork:
        """The parts as work beside the exchanges of rows."""
        return OverlappedWork(dispatch=self._expand, combine=self._contract)

    def output(self) -> Tensor:
        """The expert's output, [T, 1, H]; computed now unless it ran during the exchanges."""
        if self._out is None:
            self._out = self._mlp(self._hidden)
        return self._out

    def _expand(self) -> None:
        self._wide = self._mlp.expand(self._hidden)

    def _contract(self) -> None:
        wide, self._wide = self._wide, None
        assert wide is not None
        self._out = self._mlp.contract(wide)


class MoEMixer(MegatronModule):
    """`y = sum_k w_k expert_k(x) + shared(x)`, as in Nemotron-3-Nano (arXiv 2512.20848)."""

    def __init__(
        self,
        config: CascadeConfig,
        *,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_unused: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self.tp_group, self.tp_cp_group = pg_collection.tp, pg_collection.tp_cp
        name = f"layers.{layer_number - 1}.mixer"
        self.router = Router(config, f"{name}.router")
        self.experts = Experts(config, f"{name}.experts", pg_collection)
        self.shared_experts = None
        if config.shape.shared_expert_width:
            self.shared_experts = MLP(
                config,
                layer_number=layer_number,
                pg_collection=pg_collection,
                width=config.shape.shared_expert_width,
                name=f"{name}.shared_experts",
            )

    def forward(self, hidden_states: Tensor, packed: Microbatch) -> Tensor:
        """Apply the mixer to [T, 1, H], this rank's part of the sequence; same shape."""
        x = hidden_states.flatten(0, 1)
        rows = self.rows(x.shape[0])
        logits = self.router(x)
        # The choices of the forward pass, if this is its recomputation in backward.
        earlier = None if packed.first_pass is None else packed.first_pass.experts
        routing = self.route(logits, packed, rows, earlier)
        shared = overlapped = None
        if self.shared_experts is not None:
            shared = SharedPass(self.shared_experts, hidden_states)
            overlapped = shared.work() if self.config.overlap_shared_expert else None
        y: Tensor = self.experts(x, routing, packed.first_pass, overlapped)
        if self.training and torch.is_grad_enabled():
            y = self._with_losses(y, logits, routing, packed, rows)
            if earlier is None:
                self.router.load += routing.counts
        y = y.view_as(hidden_states)
        return y if shared is None else y + shared.output()

    def route(
        self, logits: Tensor, packed: Microbatch, rows: slice, earlier: Tensor | None = None
    ) -> Routing:
        """Route this rank's `rows` of the packed sequence, by the router's choice, a replayed one,
        or `earlier`, that of the forward pass. logits: [T, E]."""
        mask, layer, replay = packed.token_mask(rows), self.layer_number, packed.replay
        if earlier is not None:
            # Recomputed scores may round differently, and the bias may have changed.
            return self.router.route(logits, mask, earlier)
        choices = None
        if replay is not None:
            choices = replay.of_layer(layer, rows)
            if not replay.complete:
                own = self.router.route(logits.detach(), mask).experts
                recorded = choices[:, :1] < self.config.shape.num_experts
                choices = torch.where(recorded, choices, own)
        routing = self.router.route(logits, mask, choices)
        if packed.first_pass is not None:
            packed.first_pass.experts = routing.experts
        if packed.recorder is not None:
            packed.recorder.keep(layer, rows, routing.experts)
        return routing

    def rows(self, count: int) -> slice:
        """This rank's part of the batch's rows under sequence parallelism."""
        if not self.config.sequence_parallel:
            return slice(0, count)
        first = self.tp_group.rank() * count
        return slice(first, first + count)

    def _with_losses(
        self, y: Tensor, logits: Tensor, routing: Routing, packed: Microbatch, rows: slice
    ) -> Tensor:
        """Attach the router's auxiliary losses to y's backward."""
        training, shape = self.config.moe_training, self.config.shape
        if training.freeze_router:
            return y
        group = self.tp_group if self.config.sequence_parallel else None
        if packed.shard is not None:
            group = self.tp_cp_group
        if training.load_balance != "none" and training.load_balance_coef:
            loss = load_balance_loss(
                logits,
                routing,
                packed,
                rows,
                score=shape.router_score,
                over=training.load_balance,
                group=group,
            )
            y = attach_loss(y, loss, training.load_balance_coef * packed.aux_scale)
        if training.z_loss_coef:
            loss = z_loss(logits, packed, rows)
            y = attach_loss(y, loss, training.z_loss_coef * packed.aux_scale)
        return y
