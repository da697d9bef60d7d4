"""One optimizer step over packed batches, the same for every stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from nemocascade_kernels import Truncation
from torch import Tensor

from nemocascade.megatron.adapter import train_adapters_only
from nemocascade.megatron.config import Accelerators, CascadeConfig, make_config
from nemocascade.megatron.layers.moe import MoEMixer, Router
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.megatron.optimizer import NonFiniteGradientError, Optimizer, wrap_ddp
from nemocascade.megatron.replay import RouteReplay, lay_choices, moe_index
from nemocascade.megatron.schedule import run_schedule
from nemocascade.recipe import (
    EngineConfig,
    LoraConfig,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    UserError,
)
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World
from nemocascade.train.dump import NonFiniteError, dump_batches
from nemocascade.train.evaluation import (
    batch_of,
    heldout_loss,
    on_host,
    outputs_on_host,
    sum_of_losses,
)
from nemocascade.train.flops import batch_flops
from nemocascade.train.garbage import GarbageCollection
from nemocascade.train.objectives import Objective, nll_objective
from nemocascade.train.stragglers import StragglerWarnings, WorkClock, straggler_values
from nemocascade.types import PackedBatch


class NothingToTrainError(UserError, RuntimeError):
    """No token of a step has a weight, so only auxiliary losses would move the model."""


Measure = Callable[[World, Sequence[Any], Sequence[PackedBatch]], dict[str, float]]
"""Computes metrics of a step from the outputs of `run_schedule` and this rank's batches, like
`policy_metrics`; the same on every rank. Log-probabilities, metrics and batches are on the host."""


@dataclass(frozen=True)
class StepResult:
    """Measurements of one optimizer step, over all ranks.

    loss: the objective, summed over the step. grad_norm: before clipping. tokens: number of
    document tokens, without padding. trained_tokens: number of rows that train. flops: see
    train/flops.py. expert_load: [MoE layers, experts] slots, or None. expert_bias: [MoE layers,
    experts], the selection bias after the step, or None. metrics: from `measure`. stragglers: see
    `straggler_values`; on the main rank, of all ranks that have reported their time so far.
    """

    loss: float
    grad_norm: float
    tokens: int
    trained_tokens: int
    flops: float
    expert_load: Tensor | None
    expert_bias: Tensor | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    stragglers: dict[str, Any] = field(default_factory=dict)


class _Totals(NamedTuple):
    """Sums of a step over all ranks with different rows. weight: of all tokens."""

    weight: float
    tokens: int
    trained_tokens: int
    documents: int
    flops: float


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
        lora: LoraConfig | None = None,
        initialise: bool = True,
    ) -> None:
        """lora: with a rank, its adapters alone are trained: the weights, the routers and their
        selection biases are frozen, and routers have no auxiliary losses. initialise: False if
        `Checkpoints.start` will load the weights, which are undefined before."""
        self.world = world
        self.run_dir = run_dir
        is_adapter = lora is not None and bool(lora.rank)
        if is_adapter:
            moe = replace(moe, freeze_router=True, bias_update_rate=0.0)
        self.config: CascadeConfig = make_config(
            model,
            world.parallel,
            engine,
            moe,
            seed=seed,
            # A CPU's product with accumulation depends on its BLAS; the plain one does not.
            fuse_weight_gradient=world.device.type == "cuda",
            fp8_linears=accelerators.te_linears,
            overlap_tensor_parallel=accelerators.te_overlap,
            lora=lora,
            initialise=initialise,
        )
        self._modules: list[CascadeModel] = build_model(world, self.config, accelerators)
        if is_adapter:
            LOGGER.info(train_adapters_only(self._modules))
        self._chunks = wrap_ddp(
            world,
            self.config,
            self._modules,
            distributed=optimizer.distributed,
            gradients=engine.gradients,
            overlap_gather=engine.overlap_parameter_gather,
        )
        self.optimizer = Optimizer(optimizer, self._chunks, world, self.config, accelerators)
        self._garbage = GarbageCollection(engine.gc_every)
        self._clock, self._stragglers = WorkClock(world.device), StragglerWarnings()
        self._stop_clock_before_reduction()
        self.step_number = 0
        """Number of steps done; messages and files name the current one, counted from 1."""

    @property
    def modules(self) -> list[CascadeModel]:
        """The model's chunks on this rank; their weights are those of the last step."""
        self._finish_gather()
        return self._modules

    @property
    def chunks(self) -> list[Any]:
        """`modules` with their gradient buffers."""
        self._finish_gather()
        return self._chunks

    def _finish_gather(self) -> None:
        if self.optimizer.gather is not None:
            self.optimizer.gather.finish()

    def train_step(
        self,
        batches: Sequence[PackedBatch],
        objective: Objective = nll_objective,
        *,
        temperature: float = 1.0,
        truncation: Truncation | None = None,
        measure: Measure | None = None,
    ) -> StepResult:
        """Run one optimizer step over this rank's micro-batches of the step.

        Token weights are divided by their sum over all ranks, so that the loss is a weighted mean.
        temperature, truncation: of the trained policy. measure: computes metrics from the outputs
        of the training pass; every rank calls it.

        Raises NothingToTrainError if no token has a weight, and NonFiniteError if the loss or the
        gradient is not finite; both before any weight changes. The batches of the rank that saw a
        non-finite value first are written to RUN/nonfinite.
        """
        watch = self.world.watch
        watch.enter(f"step {self.step_number + 1}: forward and backward")
        self._zero_gradients()
        totals = self._totals(batches)
        batches = [replace(b, token_weight=b.token_weight / totals.weight) for b in batches]
        micro = self._microbatches(
            batches,
            totals.documents,
            temperature=temperature,
            truncation=truncation,
            entropy=measure is not None,
        )
        self._clock.start()
        outputs = run_schedule(
            self.world, self.config, self._chunks, micro, lambda m: objective(batch_of(m))
        )
        # The host waits for the device here only. The results include whatever may stop the step,
        # so they are read before any weight changes.
        routing = self._routing()
        loss, squares, table = on_host(
            [sum_of_losses(self.world, outputs), self.optimizer.prepare(), routing]
        )
        self._check_loss(float(loss), outputs, batches)
        stragglers = self._straggler_values()
        measured = outputs_on_host(outputs) if measure else []
        watch.enter(f"step {self.step_number + 1}: optimizer")
        norm = self._update(float(loss), squares.tolist(), batches)
        self._start_routers(routing)
        self.step_number += 1
        self._garbage.after_step(self.step_number)
        watch.enter(f"after step {self.step_number}")
        load, bias = table
        return StepResult(
            loss=float(loss),
            grad_norm=norm,
            tokens=totals.tokens,
            trained_tokens=totals.trained_tokens,
            flops=totals.flops,
            expert_load=load if len(load) else None,
            expert_bias=bias if len(bias) and self.config.shape.router_bias else None,
            metrics=measure(self.world, measured, batches) if measure else {},
            stragglers=stragglers,
        )

    def _stop_clock_before_reduction(self) -> None:
        reduce: Any = self.config.finalize_model_grads_func
        # The configuration must not refer to the trainer, which would keep its world.
        clock, watch, on_cpu = self._clock, self.world.watch, self.world.device.type == "cpu"

        def finalize(*args: Any, **kwargs: Any) -> None:
            clock.stop()
            if on_cpu:
                # Every rank has reported its time before the reduction ends.
                watch.tell_time(clock.seconds())
            reduce(*args, **kwargs)

        self.config.finalize_model_grads_func = finalize

    def _straggler_values(self) -> dict[str, Any]:
        """Metrics of the ranks' own times, on the main rank; {} on the others."""
        watch = self.world.watch
        if self.world.device.type != "cpu":
            watch.tell_time(self._clock.seconds())
        if not self.world.is_main:
            return {}
        values = straggler_values(watch.rank_times())
        self._stragglers.after_step(values, watch)
        return values

    def _zero_gradients(self) -> None:
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def _update(
        self, loss: float, squares: Sequence[float], batches: Sequence[PackedBatch]
    ) -> float:
        """Step the optimizer; returns the gradient norm. Raises NonFiniteError as `train_step`.

        squares: see `Optimizer.step`.
        """
        try:
            return self.optimizer.step(self.optimizer.settings.lr_at(self.step_number), squares)
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

    def _totals(self, batches: Sequence[PackedBatch]) -> _Totals:
        """Sums over the batches of all ranks. Raises NothingToTrainError as `train_step`."""
        local = torch.zeros(5, dtype=torch.float64)
        for batch in batches:
            weight = batch.token_weight
            local += torch.tensor(
                [
                    float(weight.double().sum()),
                    batch.num_own_tokens,
                    batch.num_trained(),
                    # Documents of a pack are counted once.
                    0 if batch.cp_rank else batch.num_documents,
                    batch_flops(self.config.shape, batch),
                ],
                dtype=torch.float64,
            )
        found = self.world.sum_over_data_parallel(local)
        totals = _Totals(
            weight=float(found[0]),
            tokens=int(found[1]),
            trained_tokens=int(found[2]),
            documents=int(found[3]),
            flops=float(found[4]),
        )
        if not totals.weight > 0:
            raise NothingToTrainError(
                f"step {self.step_number + 1}: none of its {totals.tokens} tokens trains, for "
                "every label is masked or truncated: look at the rows, or raise --data.capacity"
            )
        return totals

    def _microbatches(
        self,
        batches: Sequence[PackedBatch],
        documents: int,
        *,
        temperature: float,
        truncation: Truncation | None,
        entropy: bool,
    ) -> list[Microbatch]:
        """This rank's batches on its device. documents: of the step, over which auxiliary losses
        are averaged."""
        aux_scale = 1.0 / max(1.0, documents)
        return [
            Microbatch.from_batch(
                batch,
                self.world.device,
                aux_scale,
                replay=self._replay(batch),
                temperature=temperature,
                truncation=truncation,
                entropy=entropy,
            )
            for batch in batches
        ]

    def _replay(self, batch: PackedBatch) -> RouteReplay | None:
        """The recorded experts of a batch, for its training pass; None if it has none."""
        if not any(choices is not None for choices in batch.routing):
            return None
        shape = self.config.shape
        whole = lay_choices(shape, batch.routing, batch.cu_seqlens)
        choices = torch.cat([whole[rows] for rows in batch.segments])
        return RouteReplay.from_choices(shape, choices, batch.num_own_tokens, self.world.device)

    def _check_loss(
        self, loss: float, outputs: Sequence[Any], batches: Sequence[PackedBatch]
    ) -> None:
        """Raise NonFiniteError as `train_step`."""
        if math.isfinite(loss):
            return
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
        return [m for c in self._modules for m in c.modules() if isinstance(m, MoEMixer)]

    def _routing(self) -> Tensor:
        """Load of every expert and its selection bias after the step, [2, MoE layers, experts]
        float32 on the device, on every rank."""
        shape = self.config.shape
        table = torch.zeros(
            2, shape.pattern.count("E"), shape.num_experts, device=self.world.device
        )
        if not table.numel():
            return table
        load, bias = table
        rows = self._router_rows()
        for row, router in rows:
            load[row] = router.load
        dist.all_reduce(load, group=self.world.groups.tp_dp_cp)
        for row, router in rows:
            bias[row] = router.next_bias(load[row], self.config.moe_training.bias_update_rate)
        dist.all_reduce(table, group=self.world.groups.pp)
        return table

    def _start_routers(self, routing: Tensor) -> None:
        """Set every router's bias for the next step. routing: from `_routing`."""
        for row, router in self._router_rows():
            router.start_step(routing[1, row])

    def _router_rows(self) -> list[tuple[int, Router]]:
        """The routers of this rank, with their index among the model's MoE layers."""
        shape = self.config.shape
        return [(moe_index(shape, m.layer_number), m.router) for m in self.routers()]
