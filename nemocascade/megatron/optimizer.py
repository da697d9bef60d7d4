"""Megatron's DDP, distributed optimizer and gradient clipping around the model."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from nemocascade.megatron.config import Accelerators, CascadeConfig
from nemocascade.megatron.cpu import cuda_names
from nemocascade.megatron.model import CascadeModel
from nemocascade.recipe import OptimizerConfig
from nemocascade.runtime.world import World


class NonFiniteGradientError(RuntimeError):
    """The gradient norm is NaN or infinite; nothing was updated."""


def wrap_ddp(
    world: World, config: CascadeConfig, chunks: Sequence[CascadeModel], *, distributed: bool
) -> list[DistributedDataParallel]:
    """Give every chunk its fp32 gradient buffer, reduced over the data-parallel ranks.

    distributed: reduce-scatter for the distributed optimizer instead of all-reduce.
    """
    on_gpu = world.device.type == "cuda"
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=on_gpu,
        overlap_param_gather=False,
        use_distributed_optimizer=distributed,
        check_for_nan_in_grad=False,
    )
    wrapped = [
        DistributedDataParallel(
            config=config,
            ddp_config=ddp,
            module=chunk,
            # Without buckets, bf16 and fp32 parameters are gathered in one coalesced call, and
            # gloo assumes a single dtype.
            disable_bucketing=on_gpu and index > 0,
            pg_collection=world.groups,
        )
        for index, chunk in enumerate(chunks)
    ]

    def finalize(model: list[Any], num_tokens: Any = None, **kwargs: Any) -> None:
        # Token weights already contain the normaliser, so nothing is divided here.
        finalize_model_grads(model, None, **kwargs)

    config.finalize_model_grads_func = finalize
    if on_gpu:
        config.no_sync_func = [w.no_sync for w in wrapped]
        if len(wrapped) == 1:
            config.no_sync_func = wrapped[0].no_sync
    return wrapped


@contextlib.contextmanager
def _adam_of(accelerators: Accelerators) -> Iterator[None]:
    """Context in which Megatron builds with the selected Adam, not with any fused one it finds."""
    found = megatron_optimizer.Adam
    if accelerators.adam == "torch":
        megatron_optimizer.Adam = torch.optim.AdamW
    try:
        yield
    finally:
        megatron_optimizer.Adam = found


class Optimizer:
    """AdamW over every trainable parameter, stepped with a given learning rate.

    inner: Megatron's optimizer; the checkpoint reads and writes its state.
    """

    def __init__(
        self,
        settings: OptimizerConfig,
        chunks: Sequence[DistributedDataParallel],
        world: World,
        config: CascadeConfig,
        accelerators: Accelerators,
    ) -> None:
        self.settings = settings
        megatron = MegatronOptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=settings.min_lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.eps,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=settings.distributed,
            clip_grad=settings.clip_grad,
        )
        with cuda_names(), _adam_of(accelerators):
            self.inner = get_megatron_optimizer(
                megatron,
                list(chunks),
                use_gloo_process_groups=world.device.type == "cuda",
            )

    @property
    def parts(self) -> list[Any]:
        """Megatron's optimizers, the dense one and the expert one where it exists."""
        return list(getattr(self.inner, "chained_optimizers", [self.inner]))

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip and update once with learning rate `lr`; returns the gradient norm before clipping.

        Raises NonFiniteGradientError, with every weight as it was, if the norm is not finite.
        """
        with cuda_names():
            self.inner.prepare_grads()
            norm = float(self.inner.get_grad_norm())
            if not math.isfinite(norm):
                raise NonFiniteGradientError(f"gradient norm is {norm}")
            for part in self.parts:
                parameters = part.get_parameters()
                if parameters and self.settings.clip_grad:
                    clip_grad_by_total_norm_fp32(parameters, self.settings.clip_grad, norm)
            for group in self.inner.param_groups:
                group["lr"] = lr * group.get("lr_mult", 1.0)
                group["weight_decay"] = self.settings.weight_decay * group.get("wd_mult", 1.0)
            self.inner.step_with_ready_grads()
        return norm

    def zero_grad(self) -> None:
        """Clear the gradients of the last step."""
        with cuda_names():
            self.inner.zero_grad()
