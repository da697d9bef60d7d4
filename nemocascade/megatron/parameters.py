"""Number of parameters of a model, and of those active for one token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.layers.moe import MoEMixer
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.recipe import EngineConfig, ModelConfig, MoeTrainingConfig, ParallelConfig
from nemocascade.runtime.world import World


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model. Buffers, among them the routers' selection bias, are not counted.

    total: every parameter; a tied embedding and LM head count once.
    active: those used in the matrix products and norms of one token. Excluded: experts that the
        token is not sent to, and the embedding table, of which a token reads one row. The LM head
        counts, tied or not.
    """

    total: int
    active: int


@contextlib.contextmanager
def _world_of_one() -> Iterator[World]:
    """A world of this process only, beside one that may exist; nothing is ever sent."""
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    here = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
    try:
        yield World(
            rank=0,
            size=1,
            device=torch.device("meta"),
            parallel=ParallelConfig(),
            groups=ProcessGroupCollection(
                **{field.name: here for field in fields(ProcessGroupCollection)}
            ),
        )
    finally:
        dist.destroy_process_group(None if started else here)


def meta_model(shape: ModelConfig) -> CascadeModel:
    """The whole model of `shape` on the meta device: shapes and dtypes, no memory.

    Any rank may call it before, during and after a run of any number of ranks.
    """
    with _world_of_one() as world:
        config = make_config(shape, world.parallel, EngineConfig(), MoeTrainingConfig(), seed=0)
        with torch.device("meta"):
            [model] = build_model(world, config, Accelerators())
    return model


def count_parameters(shape: ModelConfig) -> ParameterCount:
    """Build the model of `shape` on the meta device and count."""
    model = meta_model(shape)
    total = sum(p.numel() for p in model.parameters())
    experts = sum(
        p.numel()
        for module in model.modules()
        if isinstance(module, MoEMixer)
        for p in module.experts.parameters()
    )
    idle, rest = divmod(experts * (shape.num_experts - shape.experts_per_token), shape.num_experts)
    assert rest == 0, "experts of one layer have equal sizes"
    embedding = 0 if shape.tie_embeddings else shape.vocab_size * shape.hidden_size
    return ParameterCount(total=total, active=total - idle - embedding)
