"""Forward and backward over the micro-batches of a step, by Megatron's pipeline schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from nemocascade.megatron.config import CascadeConfig
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.runtime.world import World

ObjectiveOf = Callable[[Microbatch], Any]


def run_schedule(
    world: World,
    config: CascadeConfig,
    chunks: Sequence[Any],
    microbatches: Sequence[Microbatch],
    objective_of: ObjectiveOf,
    *,
    forward_only: bool = False,
) -> list[Any]:
    """Run every micro-batch through the pipeline; main-gradient buffers get the gradients.

    objective_of: returns a micro-batch's objective for linear_policy_loss. All micro-batches have
    the same capacity. The gradient is that of the sum of their losses.

    Returns linear_policy_loss's output for each micro-batch on the last stage, [] on the others.
    Raises ValueError if a micro-batch holds other rows than those of this context-parallel rank.
    """
    own = world.cp_rank, world.parallel.cp
    for packed in microbatches:
        rows = (0, 1) if packed.shard is None else (packed.shard.rank, packed.shard.size)
        if rows != own:
            raise ValueError(
                f"the micro-batch holds the rows of context-parallel rank {rows[0]} of {rows[1]}, "
                f"and this is rank {own[0]} of {own[1]}: cut it with PackedBatch.shard"
            )
    schedule = get_forward_backward_func(
        pp_size=world.parallel.pp,
        vp_size=world.parallel.vpp if world.parallel.vpp > 1 else None,
    )
    iterators = [iter(microbatches) for _ in chunks]

    def forward_step(iterator: Any, model: Any) -> tuple[Tensor, Any]:
        packed = next(iterator)
        out = model(packed, objective_of(packed))
        if isinstance(out, Tensor):
            return out, None
        return out.loss, partial(_collect, out)

    with torch.set_grad_enabled(not forward_only):
        outputs: list[Any] = schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=list(chunks) if len(chunks) > 1 else chunks[0],
            num_microbatches=len(microbatches),
            # Megatron divides it by the context-parallel size.
            seq_length=microbatches[0].total * world.parallel.cp,
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return outputs if world.is_last_stage else []


def _collect(out: Any, loss: Tensor) -> tuple[Tensor, Tensor, Any]:
    # Megatron divides by a token count; the token weights already contain the normaliser. It also
    # frees the loss that it gets, as it frees any stage's output.
    kept = replace(out, loss=loss.detach())
    return loss, torch.ones((), dtype=torch.int, device=loss.device), kept
