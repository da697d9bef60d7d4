"""Each mixer on two tensor-parallel ranks equals the mixer on one, with every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor

LENGTHS = (5, 1, 33, 40, 17)
ROWS = sum(LENGTHS)
HIDDEN = 24


def mixers() -> dict[str, Any]:
    """Class and shape by name."""
    from nemocascade.megatron.layers.attention import Attention
    from nemocascade.megatron.layers.mamba import MambaMixer
    from nemocascade.megatron.layers.mlp import MLP
    from nemocascade.recipe import ModelConfig

    shape = ModelConfig(
        pattern="M",
        hidden_size=HIDDEN,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        mamba_heads=4,
        mamba_head_dim=6,
        mamba_state=5,
        mamba_groups=2,
        mlp_width=20,
        init_std=0.2,
    )
    return {
        "mamba": (MambaMixer, shape),
        "attention": (Attention, replace(shape, rope=True, qk_norm=True)),
        "one kv head": (Attention, replace(shape, num_kv_heads=1)),
        "one kv head, normalised": (Attention, replace(shape, num_kv_heads=1, qk_norm=True)),
        "relu2": (MLP, shape),
        "swiglu": (MLP, replace(shape, activation="swiglu")),
    }


def outputs_and_gradients(tp: int) -> dict[str, dict[str, Any]]:
    """For every mixer: whole output, whole input gradient, and each parameter's gradient.

    A rank's part of a cut parameter's gradient stays its own; replicated ones are summed over
    ranks, as Megatron does for parameters that carry `sequence_parallel`.
    """
    import torch.distributed as dist
    from helpers.layers import draw, pack

    from nemocascade.megatron.config import make_config
    from nemocascade.megatron.layers.block import ResidualBlock
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, MoeTrainingConfig, ParallelConfig

    parallel, engine = ParallelConfig(tp=tp), EngineConfig(precision="fp32")
    world = start_world(parallel, engine)
    rows = slice(world.tp_rank * ROWS // tp, (world.tp_rank + 1) * ROWS // tp)
    packed = pack(LENGTHS)
    found = {}
    for name, (mixer, shape) in mixers().items():
        config = make_config(shape, parallel, engine, MoeTrainingConfig(), seed=1)
        block = ResidualBlock(config, mixer=mixer, layer_number=1, pg_collection=world.groups)
        hidden = draw(ROWS, 1, HIDDEN)[rows].requires_grad_()
        out = block(hidden, packed_seq_params=packed)
        out.backward(draw(ROWS, 1, HIDDEN, seed=1)[rows])
        assert hidden.grad is not None
        parts = {}
        for key, value in (("out", out.detach()), ("d_hidden", hidden.grad)):
            whole = [torch.empty_like(value) for _ in range(tp)]
            dist.all_gather(whole, value.contiguous(), group=world.groups.tp)
            parts[key] = torch.cat(whole).tolist()
        for key, parameter in block.named_parameters():
            assert parameter.grad is not None, key
            if getattr(parameter, "sequence_parallel", False):
                dist.all_reduce(parameter.grad, group=world.groups.tp)
            parts[key] = parameter.grad.tolist()
        found[name] = parts
    return found


@pytest.fixture(scope="module")
def results() -> dict[int, list[dict[str, dict[str, Any]]]]:
    here = f"{__file__}:outputs_and_gradients"
    return {tp: run_ranks(here, tp, {"tp": tp}, timeout_s=300) for tp in (1, 2)}


def cut(name: str, key: str, full: Tensor, rank: int) -> Tensor:
    """The part that rank `rank` of two holds of a parameter's full gradient."""
    from nemocascade.megatron.init import Shard

    inner, shared, heads = 24, 10, 4
    blocks: dict[str, tuple[int, ...] | None] = {
        "mixer.in_proj.weight": (inner, inner, shared, shared, heads),
        "mixer.conv1d.weight": (inner, shared, shared),
        "mixer.conv1d.bias": (inner, shared, shared),
        "mixer.linear_fc1.weight": (20, 20) if name == "swiglu" else None,
    }
    if key in ("out", "d_hidden", "norm.weight") or "layernorm" in key:
        return full
    by_row = key.endswith(("out_proj.weight", "linear_proj.weight", "linear_fc2.weight"))
    return Shard(1 if by_row else 0, rank, 2, blocks.get(key)).cut(full)


@pytest.mark.parametrize("name", mixers())
def test_two_ranks_equal_one(
    results: dict[int, list[dict[str, dict[str, Any]]]], name: str
) -> None:
    one = {key: torch.tensor(value) for key, value in results[1][0][name].items()}
    for rank, of_rank in enumerate(results[2]):
        two = {key: torch.tensor(value) for key, value in of_rank[name].items()}
        assert two.keys() == one.keys()
        for key, full in one.items():
            expected = cut(name, key, full, rank)
            error = float((two[key] - expected).abs().max() / full.abs().max())
            assert error < 1e-5, f"{key} on rank {rank} is off by {error:.1e}"
