"""Number of parameters, against published numbers, transformers, a formula and a built model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.transformers_weights import nemotron_h

from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.model import build_model
from nemocascade.megatron.parameters import ParameterCount, count_parameters, meta_model
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    ModelConfig,
    MoeTrainingConfig,
    ParallelConfig,
    nemotron3_nano_30b,
    tiny,
)

SHAPES = {
    "tiny": tiny(),
    "tied": replace(tiny(), tie_embeddings=True),
    "gated, normalised heads": replace(
        tiny(), pattern="*E*-", activation="swiglu", qk_norm=True, shared_expert_width=0
    ),
}


def by_hand(shape: ModelConfig) -> ParameterCount:
    """From the published description of each layer."""
    h, matrices = shape.hidden_size, 3 if shape.activation == "swiglu" else 2
    heads, inner = shape.mamba_heads, shape.mamba_heads * shape.mamba_head_dim
    conv = inner + 2 * shape.mamba_groups * shape.mamba_state
    expert = matrices * h * shape.expert_width
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    layer = {
        "M": h * (inner + conv + heads)
        + conv * (shape.mamba_conv + 1)
        + 3 * heads
        + inner
        + inner * h,
        "*": h * (queries + 2 * keys) + queries * h + 2 * shape.head_dim * shape.qk_norm,
        "-": matrices * h * shape.mlp_width,
        "E": h * shape.num_experts
        + shape.num_experts * expert
        + matrices * h * shape.shared_expert_width,
    }
    table = shape.vocab_size * h
    total = sum(layer[symbol] + h for symbol in shape.pattern) + h + table
    total += 0 if shape.tie_embeddings else table
    idle = shape.pattern.count("E") * (shape.num_experts - shape.experts_per_token) * expert
    active = total - idle - (0 if shape.tie_embeddings else table)
    return ParameterCount(total=total, active=active)


def test_nemotron_3_nano_has_31_6_billion_parameters_and_3_2_active() -> None:
    count = count_parameters(nemotron3_nano_30b())
    assert count == by_hand(nemotron3_nano_30b())
    assert f"{count.total / 1e9:.1f}" == "31.6"
    assert f"{count.active / 1e9:.1f}" == "3.2"


def test_nemotron_3_nano_has_as_many_parameters_as_transformers_model() -> None:
    pytest.importorskip("transformers")
    with torch.device("meta"):
        theirs = nemotron_h(nemotron3_nano_30b())
    assert count_parameters(nemotron3_nano_30b()).total == sum(
        p.numel() for p in theirs.parameters()
    )


@pytest.mark.parametrize("name", SHAPES)
def test_the_meta_model_is_the_model(name: str) -> None:
    """Same parameters, shapes and dtypes; and counting leaves the world that exists as it was."""
    shape = SHAPES[name]
    world = start_world(ParallelConfig(), EngineConfig())
    try:
        config = make_config(shape, world.parallel, EngineConfig(), MoeTrainingConfig(), seed=0)
        [model] = build_model(world, config, Accelerators())
        real = {n: (p.shape, p.dtype) for n, p in model.named_parameters()}
        on_meta = dict(meta_model(shape).named_parameters())
        assert all(p.is_meta for p in on_meta.values())
        assert {n: (p.shape, p.dtype) for n, p in on_meta.items()} == real
        count = count_parameters(shape)
        assert count == by_hand(shape)
        assert count.total == sum(p.numel() for p in model.parameters())
        ones = torch.ones(1, device=world.device)
        assert world.sum_over_data_parallel(ones).item() == 1
    finally:
        world.close()


def test_no_process_group_is_left_behind() -> None:
    count_parameters(tiny())
    assert not dist.is_initialized()
