"""Megatron's DDP, distributed optimizer and gradient clipping around the model."""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import optimizer as megatron_optimizer
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from torch import Tensor

from nemocascade.megatron.adam import Bf16MomentsAdamW
from nemocascade.megatron.config import Accelerators, CascadeConfig
from nemocascade.megatron.cpu import cuda_names
from nemocascade.megatron.layers.adapted_experts import sum_whole_factors
from nemocascade.megatron.model import CascadeModel
from nemocascade.megatron.parameter_gather import ParameterGather
from nemocascade.recipe import OptimizerConfig
from nemocascade.recipe.train import Moments
from nemocascade.runtime.world import World


class NonFiniteGradientError(RuntimeError):
    """The gradient norm is NaN or infinite; nothing was updated."""


def wrap_ddp(
    world: World,
    config: CascadeConfig,
    chunks: Sequence[CascadeModel],
    *,
    distributed: bool,
    gradients: Literal["fp32", "bf16"] = "fp32",
    overlap_gather: bool = False,
) -> list[DistributedDataParallel]:
    """Give every chunk its gradient buffer, reduced over the data-parallel ranks.

    distributed: reduce-scatter for the distributed optimizer instead of all-reduce. gradients:
    precision of the buffer and its reduction; float32 weights have float32 gradients.
    overlap_gather: for a `ParameterGather`, which the optimizer makes.
    """
    on_gpu = world.device.type == "cuda"
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=gradients == "fp32",
        overlap_grad_reduce=on_gpu,
        overlap_param_gather=overlap_gather,
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
        trained = (p for chunk in model for p in chunk.parameters())
        sum_whole_factors(trained, world.groups.expt_tp)

    config.finalize_model_grads_func = finalize
    if on_gpu:
        config.no_sync_func = [w.no_sync for w in wrapped]
        if len(wrapped) == 1:
            config.no_sync_func = wrapped[0].no_sync
    return wrapped


FUSED_ADAMS = {
    "transformer_engine": "transformer_engine.pytorch.optimizers",
    "apex": "apex.optimizers",
}
"""Modules of the optional packages that hold a class `FusedAdam`."""


MOMENTS: dict[Moments, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""Dtypes of AdamW's moments."""


def _adam(
    accelerators: Accelerators, device: torch.device, moments: Moments = "fp32"
) -> Callable[..., torch.optim.Optimizer]:
    """Constructor of the selected Adam, with the arguments of apex's.

    Apex's has float32 moments only. Transformer Engine's gets their dtype without Megatron's
    precision-aware optimizer, which would also move the trained copies of the weights into it.
    """
    if accelerators.adam == "transformer_engine" or (
        accelerators.adam == "apex" and moments == "fp32"
    ):
        fused_adam: Callable[..., torch.optim.Optimizer] = importlib.import_module(
            FUSED_ADAMS[accelerators.adam]
        ).FusedAdam
        if moments == "fp32":
            return fused_adam
        dtype = MOMENTS[moments]
        return functools.partial(fused_adam, exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype)
    kind = torch.optim.AdamW if moments == "fp32" else Bf16MomentsAdamW

    def adamw(*, adam_w_mode: bool, **arguments: Any) -> torch.optim.Optimizer:
        assert adam_w_mode
        # Fused and other kernels round differently; on a CPU the default is not fused.
        fused = True if device.type == "cuda" else None
        return kind(**arguments, fused=fused)

    return adamw


@contextlib.contextmanager
def _building_with(adam: Callable[..., torch.optim.Optimizer]) -> Iterator[None]:
    """Context in which Megatron builds optimizers with `adam`, whatever package it has found.

    Its own choice is made at its import. The flag makes it call `Adam`, with apex's arguments.
    """
    upstream: Any = megatron_optimizer
    found = upstream.Adam, upstream.USING_PYTORCH_OPTIMIZER
    upstream.Adam, upstream.USING_PYTORCH_OPTIMIZER = adam, False
    try:
        yield
    finally:
        upstream.Adam, upstream.USING_PYTORCH_OPTIMIZER = found


def _sum_of_squares(gradients: list[Tensor], group: Any, device: torch.device) -> Tensor:
    """Sum of the gradients' squares over the ranks of `group`, [1] float32 on `device`."""
    total = torch.zeros(1, dtype=torch.float32, device=device)
    if gradients:
        norms = torch.stack(torch._foreach_norm(gradients))
        total = torch.linalg.vector_norm(norms).reshape(1) ** 2.0
    dist.all_reduce(total, group=group)
    return total


def _norm(squares: Sequence[float]) -> float:
    """The norm of vectors whose squared norms are `squares`."""
    norms = [square**0.5 for square in squares]
    return norms[0] if len(norms) == 1 else math.sqrt(sum(norm**2 for norm in norms))


class Optimizer:
    """AdamW over every trainable parameter, stepped with a given learning rate.

    inner: Megatron's optimizer; the checkpoint reads and writes its state. gather: of the updated
    weights, if it overlaps with the next forward pass; otherwise None, and a step waits for it.
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
        self._chunks, self._device = list(chunks), world.device
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
        adam = _adam(accelerators, world.device, settings.moments)
        with cuda_names(), _building_with(adam):
            self.inner = get_megatron_optimizer(
                megatron,
                list(chunks),
                use_gloo_process_groups=False,
            )
        overlaps = chunks and chunks[0].ddp_config.overlap_param_gather
        self.gather = ParameterGather(chunks) if overlaps else None

    @property
    def moments_dtype(self) -> torch.dtype:
        """Dtype of AdamW's moments."""
        return MOMENTS[self.settings.moments]

    @property
    def parts(self) -> list[Any]:
        """Megatron's optimizers, the dense one and the expert one where it exists."""
        return list(getattr(self.inner, "chained_optimizers", [self.inner]))

    def state_tensors(self) -> list[Tensor]:
        """Moments and trained copies of the weights on this rank, without the weights themselves
        and without scalars."""
        weights = {p.untyped_storage().data_ptr() for c in self._chunks for p in c.parameters()}
        tensors = []
        for part in self.parts:
            # A part without parameters on this rank has no optimizer.
            inner = getattr(part, "optimizer", None)
            if inner is not None:
                tensors += [p for group in inner.param_groups for p in group["params"]]
                tensors += [t for state in inner.state.values() for t in state.values()]
        return [
            t
            for t in tensors
            if isinstance(t, Tensor) and t.dim() and t.untyped_storage().data_ptr() not in weights
        ]

    @torch.no_grad()
    def prepare(self) -> Tensor:
        """Collect the reduced gradients; returns squares of their norms, [n] float32 on the device.

        Each is summed over the ranks of an optimizer; parts that share ranks have one square. The
        host does not wait for the device.
        """
        with cuda_names():
            self.inner.prepare_grads()
            parts = [
                (p.get_grads_for_grad_norm(), p.get_grad_stats_parallel_group()) for p in self.parts
            ]
            groups = [group for _, group in parts]
            if all(group == groups[0] for group in groups):
                parts = [([g for gradients, _ in parts for g in gradients], groups[0])]
            return torch.cat([_sum_of_squares(*part, self._device) for part in parts])

    @torch.no_grad()
    def step(self, lr: float, squares: Sequence[float] | None = None) -> float:
        """Clip and update once with learning rate `lr`; returns the gradient norm before clipping.

        squares: the values of `prepare`, on the host; None calls it, and waits for the device.

        Raises NonFiniteGradientError, with every weight as it was, if the norm is not finite.
        """
        norm = _norm(self.prepare().tolist() if squares is None else squares)
        if not math.isfinite(norm):
            raise NonFiniteGradientError(f"gradient norm is {norm}")
        with cuda_names():
            self._clip(norm)
            for group in self.inner.param_groups:
                group["lr"] = lr * group.get("lr_mult", 1.0)
                group["weight_decay"] = self.settings.weight_decay * group.get("wd_mult", 1.0)
            self.inner.step_with_ready_grads()
            if self.gather is not None:
                self.gather.start()
        return norm

    def _clip(self, norm: float) -> None:
        """Scale the gradients, whose norm is `norm`, to at most `clip_grad`."""
        scale = self.settings.clip_grad / (norm + 1e-6)
        parameters = [p for part in self.parts for p in part.get_parameters()]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.settings.clip_grad and scale < 1.0 and gradients:
            torch._foreach_mul_(gradients, scale)

    def zero_grad(self) -> None:
        """Clear the gradients of the last step."""
        with cuda_names():
            self.inner.zero_grad()
