"""One optimizer step over packed batches, the same for every stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from nemocascade.megatron.config import Accelerators, CascadeConfig, make_config
from nemocascade.megatron.layers.moe import MoEMixer
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.megatron.optimizer import NonFiniteGradientError, Optimizer, wrap_ddp
from nemocascade.megatron.schedule import run_schedule
from nemocascade.recipe import (
    EngineConfig,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    UserError,
)
from nemocascade.runtime.world import World
from nemocascade.train.dump import NonFiniteError, dump_batches
from nemocascade.train.evaluation import (
    batch_of,
    from_last_stage,
    heldout_loss,
    sum_of_losses,
)
from nemocascade.train.flops import batch_flops
from nemocascade.train.objectives import Objective, nll_objective
from nemocascade.types import PackedBatch


class NothingToTrainError(UserError, RuntimeError):
    """No token of a step has a weight, so only auxiliary losses would move the model."""


Measure = Callable[[World, Sequence[Any], Sequence[PackedBatch]], dict[str, float]]
"""Computes metrics of a step from the outputs of `run_schedule` and this rank's batches on the
host, like `policy_metrics`; the same on every rank."""


@dataclass(frozen=True)
class StepResult:
    """Measurements of one optimizer step, over all ranks.

    loss: the objective, summed over the step. grad_norm: before clipping. tokens: number of
    document tokens, without padding. trained_tokens: number of rows that train. flops: see
    train/flops.py. expert_load: [MoE layers, experts] slots, or None. expert_bias: [MoE layers,
    experts], the selection bias after the step, or None. metrics: from `measure`.
    """

    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    flops: float
    expert_load: torch.Tensor | None
    expert_bias: torch.Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class Trainer:
    """The model, its optimizer, and the training step."""

    def __init__(
        self,
        world: World,
        model: ModelConfig,
        *,
        engine: EngineConfig,
        moe: MoeTrainingConfig,
        optimizer: OptimizerConfig,
        accelerators: Accelerators,
        seed: int,
        run_dir: Path,
    ) -> None:
        self.world = world
        self.run_dir = run_dir
        self.config: CascadeConfig = make_config(
            model,
            world.parallel,
            engine,
            moe,
            seed=seed,
            fuse_weight_gradient=accelerators.fused_weight_gradient,
        )
        self.modules: list[CascadeModel] = build_model(world, self.config, accelerators)
        self.chunks = wrap_ddp(world, self.config, self.modules, distributed=optimizer.distributed)
        self.optimizer = Optimizer(optimizer, self.chunks, world, self.config, accelerators)
        self.step_number = 0
        """Number of steps done; messages and files name the one under way, counted from 1."""

    def train_step(
        self,
        batches: Sequence[PackedBatch],
        objective: Objective = nll_objective,
        *,
        temperature: float = 1.0,
        measure: Measure | None = None,
    ) -> StepResult:
        """Run one optimizer step over this rank's micro-batches of the step.

        Token weights are divided by their sum over all ranks, so that the loss is a weighted mean.
        temperature: of the trained policy. measure: computes metrics from the outputs of the
        training pass; every rank calls it.

        Raises NothingToTrainError if no token has a weight, and NonFiniteError if the loss or the
        gradient is not finite; both before any weight changes. The batches of the rank that saw a
        non-finite value first are written to RUN/nonfinite.
        """
        watch = self.world.watch
        watch.enter(f"step {self.step_number + 1}: forward and backward")
        self._zero_gradients()
        totals = self._totals(batches)
        weight_sum = float(totals[0])
        if not weight_sum > 0:
            raise NothingToTrainError(
                f"step {self.step_number + 1}: none of its {int(totals[1])} tokens trains, for "
                "every label is masked or truncated: look at the rows, or raise --data.capacity"
            )
        batches = [replace(b, token_weight=b.token_weight / weight_sum) for b in batches]
        aux_scale = 1.0 / max(1.0, float(totals[3]))
        entropy = measure is not None
        micro = [
            Microbatch.from_batch(
                b, self.world.device, aux_scale, temperature=temperature, entropy=entropy
            )
            for b in batches
        ]
        outputs = run_schedule(
            self.world, self.config, self.chunks, micro, lambda m: objective(batch_of(m))
        )
        loss = self._finite_loss(outputs, batches)
        watch.enter(f"step {self.step_number + 1}: optimizer")
        norm = self._update(loss, batches)
        load, bias = self._move_router_bias()
        self.step_number += 1
        watch.enter(f"after step {self.step_number}")
        return StepResult(
            loss=loss,
            grad_norm=norm,
            tokens=int(totals[1]),
            trained_tokens=int(totals[2]),
            flops=float(totals[4]),
            expert_load=load,
            expert_bias=bias,
            metrics=measure(self.world, outputs, batches) if measure else {},
        )

    def _zero_gradients(self) -> None:
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _update(self, loss: float, batches: Sequence[PackedBatch]) -> float:
        """Step the optimizer; returns the gradient norm. Raises NonFiniteError as `train_step`."""
        try:
            return self.optimizer.step(self.optimizer.settings.lr_at(self.step_number))
        except NonFiniteGradientError as error:
            folder = dump_batches(self.run_dir, self.step_number + 1, self.world, batches)
            raise NonFiniteError(
                f"step {self.step_number + 1}: the loss is {loss:.6g} but the {error}; no weight "
                f"was changed. Every rank wrote its batches to {folder}"
            ) from error

    def skip_step(self) -> None:
        """Count a step with nothing to train on; no weight or optimizer state changes."""
        self.step_number += 1

    def evaluate(self, steps: Iterable[Sequence[PackedBatch]]) -> tuple[float, int]:
        """Mean negative log-likelihood of held-out batches and the number of its tokens."""
        return heldout_loss(self.world, self.config, self.chunks, steps)

    def _totals(self, batches: Sequence[PackedBatch]) -> torch.Tensor:
        """[5] float64 over data-parallel ranks: weight, tokens, trained rows, documents, FLOPs."""
        local = torch.zeros(5, dtype=torch.float64)
        for batch in batches:
            weight = batch.token_weight
            local += torch.tensor(
                [
                    float(weight.double().sum()),
                    batch.num_tokens,
                    batch.num_trained(),
                    batch.num_documents,
                    batch_flops(self.config.shape, batch),
                ],
                dtype=torch.float64,
            )
        return self.world.sum_over_data_parallel(local.to(self.world.device)).cpu()

    def _finite_loss(self, outputs: Sequence[Any], batches: Sequence[PackedBatch]) -> float:
        loss = float(from_last_stage(self.world, sum_of_losses(outputs)))
        if math.isfinite(loss):
            return loss
        mine = [float(o.loss.detach()) for o in outputs]
        bad = [i for i, x in enumerate(mine) if not math.isfinite(x)]
        if bad:
            dump_batches(self.run_dir, self.step_number + 1, self.world, [batches[i] for i in bad])
        seen = self.world.all_gather_object([(i, mine[i]) for i in bad])
        ranks = {rank: found for rank, found in enumerate(seen) if found}
        where = "; ".join(
            f"rank {rank}: " + ", ".join(f"micro-batch {i} has loss {x}" for i, x in found)
            for rank, found in ranks.items()
        )
        raise NonFiniteError(
            f"step {self.step_number + 1}: the loss is {loss} ({where}); no weight was changed. "
            f"The batches are in {self.run_dir / 'nonfinite'}"
        )

    def routers(self) -> list[MoEMixer]:
        """The MoE mixers of this rank, in layer order."""
        return [m for c in self.modules for m in c.modules() if isinstance(m, MoEMixer)]

    def _move_router_bias(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Update every router's selection bias; returns load and bias of all layers, on every
        rank."""
        pattern = self.config.shape.pattern
        order = [i for i, symbol in enumerate(pattern) if symbol == "E"]
        if not order:
            return None, None
        shape = (2, len(order), self.config.shape.num_experts)
        table = torch.zeros(shape, device=self.world.device)
        rate = self.config.moe_training.bias_update_rate
        for mixer in self.routers():
            row = order.index(mixer.layer_number - 1)
            table[0, row] = mixer.router.update_bias(self.world.groups.tp_dp_cp, rate)
            if self.config.shape.router_bias:
                table[1, row] = mixer.router.expert_bias
        dist.all_reduce(table, group=self.world.groups.pp)
        load, bias = table.cpu()
        return load, bias if self.config.shape.router_bias else None
