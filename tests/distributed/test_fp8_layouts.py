"""Experts in FP8 on two ranks, expert- or tensor-parallel, equal those of one process.

Blocks that share a scale lie within a shard: a rank's experts are whole, its part of their width
is a multiple of 128, and rows keep their order when they are dispatched. Combine weights multiply
gradients before they are rounded where rows are dispatched, and after it elsewhere. Scales are
powers of two, so weights that are powers of two change nothing.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from helpers.ranks import run_ranks
from torch import Tensor

LAYOUTS: dict[str, dict[str, Any]] = {
    "EP2": {"ep": 2},
    "TP2 EP2": {"tp": 2, "ep": 2},
    "ETP2": {"tp": 2, "etp": 2},
}
TOKENS, EXPERTS, HIDDEN, WIDTH = 96, 4, 40, 256
ACTIVATIONS: tuple[Literal["relu2"], Literal["swiglu"]] = ("relu2", "swiglu")


def outputs_and_gradients(
    layouts: list[dict[str, Any]], fp8: bool = True, combine_weight: float = 0.5
) -> list[dict[str, Any]]:
    """Output, and gradients of x and both weights, of this rank's tokens and experts, for each
    layout and activation. combine_weight: that of every choice; 0 = the router's."""
    from dataclasses import replace

    import torch.distributed as dist
    from nemocascade_kernels import moe_route

    from nemocascade.megatron.config import make_config
    from nemocascade.megatron.layers.moe import Experts
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, ModelConfig, MoeTrainingConfig, ParallelConfig

    engine = EngineConfig(precision="fp32", experts="fp8" if fp8 else "bf16")
    found = []
    for settings in layouts:
        parallel = ParallelConfig(**settings)
        world = start_world(parallel, engine)
        each, rank = TOKENS // world.size, dist.get_rank() if world.size > 1 else 0
        mine = slice(rank * each, (rank + 1) * each)
        results: dict[str, Any] = {}
        for activation in ACTIVATIONS:
            shape = ModelConfig(
                pattern="E", hidden_size=HIDDEN, num_experts=EXPERTS, experts_per_token=2,
                expert_width=WIDTH, activation=activation, init_std=0.2,
            )  # fmt: skip
            config = make_config(shape, parallel, engine, MoeTrainingConfig(), seed=1)
            experts = Experts(config, "layers.0.mixer.experts", world.groups)
            generator = torch.Generator().manual_seed(2)
            x, grad, logits = (
                torch.randn(TOKENS, n, generator=generator)[mine].clone()
                for n in (HIDDEN, HIDDEN, EXPERTS)
            )
            x.requires_grad_()
            routing = moe_route(logits, 2)
            if combine_weight:
                fixed = torch.full_like(routing.weights, combine_weight)
                routing = replace(routing, weights=fixed)
            out = experts(x, routing)
            out.backward(grad)
            tensors = out, x.grad, experts.linear_fc1.grad, experts.linear_fc2.grad
            results[activation] = [t.tolist() for t in tensors if t is not None]
        found.append(results)
        world.close()
    return found


@pytest.fixture(scope="module")
def results() -> dict[str, list[Any]]:
    """Results of one process, with FP8 and without, and of both ranks on every layout."""
    here = f"{__file__}:outputs_and_gradients"
    single: dict[str, dict[str, Any]] = {
        "one": {}, "without FP8": {"fp8": False}, "one, routed": {"combine_weight": 0},
    }  # fmt: skip
    found = {name: run_ranks(here, 1, {"layouts": [{}], **s}) for name, s in single.items()}
    found = {name: [of_rank[0] for of_rank in ranks] for name, ranks in found.items()}
    two = run_ranks(here, 2, {"layouts": list(LAYOUTS.values())})
    found |= {name: [of_rank[i] for of_rank in two] for i, name in enumerate(LAYOUTS)}
    routed = run_ranks(here, 2, {"layouts": [{"ep": 2}], "combine_weight": 0})
    return found | {"EP2, routed": [of_rank[0] for of_rank in routed]}


def weight(parts: list[Any], name: str, index: int, activation: str) -> Tensor:
    """A weight's whole gradient, from those of its shards."""
    shards = [torch.tensor(part[activation][index]) for part in parts]
    if name != "ETP2":
        return torch.cat(shards)
    if index == 3:
        return torch.cat(shards, dim=2)
    gates = 2 if activation == "swiglu" else 1
    return torch.cat([s.unflatten(1, (gates, -1)) for s in shards], dim=2).flatten(1, 2)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_two_ranks_equal_one(name: str, activation: str, results: dict[str, list[Any]]) -> None:
    for index, error in enumerate(errors(results[name], results["one"][0], name, activation)):
        assert error < 1e-5, f"tensor {index} is off by {error:.1e}"


def errors(parts: list[Any], one: dict[str, Any], name: str, activation: str) -> list[float]:
    """Relative rms error of the output, and of the gradients of x and both weights."""
    whole = [torch.cat([torch.tensor(p[activation][index]) for p in parts]) for index in (0, 1)]
    whole += [weight(parts, name, index, activation) for index in (2, 3)]
    exact = [torch.tensor(values) for values in one[activation]]
    return [float((a - b).norm() / b.norm()) for a, b in zip(whole, exact, strict=True)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_combine_weights_are_rounded_with_gradients(
    activation: str, results: dict[str, list[Any]]
) -> None:
    """Any weights: the outputs are equal, and gradients to the rounding of e4m3."""
    output, *gradients = errors(
        results["EP2, routed"], results["one, routed"][0], "EP2", activation
    )
    assert output < 1e-5
    assert max(gradients) < 0.07


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_setting_reaches_the_products(activation: str, results: dict[str, list[Any]]) -> None:
    for ours, exact in zip(
        results["one"][0][activation], results["without FP8"][0][activation], strict=True
    ):
        a, b = torch.tensor(ours), torch.tensor(exact)
        assert 0.005 < float((a - b).norm() / b.norm()) < 0.1
