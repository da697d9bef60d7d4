"""Megatron's own groups and optimizers in a fake world, to check the planner's figures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.overrides import TorchFunctionMode

from nemocascade.megatron import cpu
from nemocascade.megatron.fake import _fake_group, _world
from nemocascade.recipe import ParallelConfig
from nemocascade.runtime.world import World


class OnMeta(TorchFunctionMode):
    """While active, every factory makes its tensor on the meta device, whatever device it names.

    `Tensor.type()` says nothing of meta: Megatron's optimizers sort parameters by its CUDA name,
    which `cpu.cuda_names` makes where there is no CUDA.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            named = "torch.cuda." if torch.cuda.is_available() else "torch."
            return func(*args).replace("torch.meta.", named, 1)
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextlib.contextmanager
def fake_megatron_world(rank: int, size: int, parallel: ParallelConfig) -> Iterator[World]:
    """A `fake_world` with all of Megatron's global groups, which its optimizers look up. Takes
    seconds where the world has hundreds of ranks."""
    cpu.install()
    with _fake_group(rank, size):
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tp,
            pipeline_model_parallel_size=parallel.pp,
            virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
            context_parallel_size=parallel.cp,
            expert_model_parallel_size=parallel.ep,
            expert_tensor_parallel_size=parallel.etp,
            create_gloo_process_groups=False,
        )
        try:
            groups = ProcessGroupCollection.use_mpu_process_groups()
            with mock.patch.object(dist, "all_gather_object", _gather_own):
                yield _world(rank, size, parallel, groups)
        finally:
            parallel_state.destroy_model_parallel()


def _gather_own(objects: list[Any], own: Any, group: Any = None) -> None:
    """Every rank says what this one says; Megatron asks for what all ranks agree on."""
    objects[:] = [own] * len(objects)
