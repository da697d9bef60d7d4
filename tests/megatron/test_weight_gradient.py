"""Weight gradients of linears that are added to `main_grad` inside the product."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.layers import draw
from helpers.ranks import run_ranks
from megatron.core.tensor_parallel import layers as megatron_layers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemocascade.megatron.config import Accelerators, CascadeConfig, make_config
from nemocascade.megatron.layers.linear import (
    APEX_WEIGHT_GRADIENT,
    column_linear,
    row_linear,
    use_weight_gradient,
)
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    tiny,
)
from nemocascade.runtime.world import World
from nemocascade.train import trainer as trainer_module
from nemocascade.train.trainer import Trainer
from nemocascade.types import Document, pack_documents

ROWS, INPUTS, OUTPUTS = 96, 24, 40
LINEARS = {"column": column_linear, "row": row_linear}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig())
    yield world
    world.close()


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's module is as before after each test."""
    monkeypatch.setattr(megatron_layers, APEX_WEIGHT_GRADIENT, None, raising=False)
    monkeypatch.setattr(megatron_layers, "_grad_accum_fusion_available", False)


def config(world: World, precision: str, *, fused: bool) -> CascadeConfig:
    return make_config(
        tiny(),
        world.parallel,
        EngineConfig(precision=precision),  # type: ignore[arg-type]
        MoeTrainingConfig(),
        seed=0,
        fuse_weight_gradient=fused,
    )


def accumulated(world: World, kind: str, precision: str, fused: bool, recompute: bool) -> Tensor:
    """main_grad of a linear after two micro-batches, as Megatron's DDP accumulates it."""
    settings = config(world, precision, fused=fused)
    linear: Any = LINEARS[kind](settings, INPUTS, OUTPUTS, name="w", tp_group=world.groups.tp)
    weight = linear.weight
    weight.main_grad = torch.zeros(weight.shape)
    weight.grad_added_to_main_grad = False
    for step in range(2):
        x = draw(ROWS, 1, INPUTS, seed=step, dtype=settings.params_dtype).requires_grad_()
        out = checkpoint(linear, x, use_reentrant=False)[0] if recompute else linear(x)[0]
        out.backward(draw(ROWS, 1, OUTPUTS, seed=step, dtype=settings.params_dtype))
        assert weight.grad is not None, "Megatron's DDP needs a sign that the gradient is complete"
        assert weight.grad_added_to_main_grad == fused
        if not fused:
            weight.main_grad += weight.grad
        weight.grad = None
        assert x.grad is not None
    main_grad: Tensor = weight.main_grad
    return main_grad


def exact(precision: str) -> Tensor:
    """The gradient of `accumulated` in float64."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    total = torch.zeros(OUTPUTS, INPUTS, dtype=torch.float64)
    for step in range(2):
        x = draw(ROWS, INPUTS, 1, seed=step, dtype=dtype).view(ROWS, INPUTS).double()
        total += draw(ROWS, OUTPUTS, 1, seed=step, dtype=dtype).view(ROWS, OUTPUTS).double().t() @ x
    return total


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", LINEARS)
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_sum_is_not_rounded_to_the_weights_dtype(
    world: World, precision: str, kind: str, recompute: bool
) -> None:
    use_weight_gradient(apex=False)
    found, rounded = (
        (accumulated(world, kind, precision, fused, recompute).double() - exact(precision)).abs()
        for fused in (True, False)
    )
    scale = float(exact(precision).abs().max())
    assert float(found.max()) < 1e-6 * scale
    if precision == "bf16":
        assert float(rounded.max()) > 1e-3 * scale


def test_a_frozen_weight_gets_no_gradient(world: World) -> None:
    use_weight_gradient(apex=False)
    settings = config(world, "fp32", fused=True)
    linear = column_linear(settings, INPUTS, OUTPUTS, name="w", tp_group=world.groups.tp)
    weight: Any = linear.weight
    weight.requires_grad_(False)
    weight.main_grad = torch.zeros(weight.shape)
    x = draw(ROWS, 1, INPUTS).requires_grad_()
    linear(x)[0].sum().backward()
    assert not weight.main_grad.any()
    assert x.grad is not None


def test_a_weight_without_main_grad_gets_its_gradient(world: World) -> None:
    use_weight_gradient(apex=False)
    settings = config(world, "fp32", fused=True)
    linear = column_linear(settings, INPUTS, OUTPUTS, name="w", tp_group=world.groups.tp)
    linear(draw(ROWS, 1, INPUTS))[0].sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.any()


def test_apex_is_used_where_it_is_selected(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    apex: Any = ModuleType(APEX_WEIGHT_GRADIENT)

    def doubled(inputs: Tensor, grad_outputs: Tensor, main_grad: Tensor) -> None:
        main_grad.add_(grad_outputs.t().float() @ inputs.float(), alpha=2)

    apex.wgrad_gemm_accum_fp32 = doubled
    monkeypatch.setitem(sys.modules, APEX_WEIGHT_GRADIENT, apex)
    use_weight_gradient(apex=True)
    found = accumulated(world, "column", "bf16", True, recompute=True)
    torch.testing.assert_close(found, 2 * exact("bf16").float(), rtol=1e-4, atol=1e-4)


def trained(world: World, fused: bool, precision: str, recompute: bool, **model: Any) -> Any:
    """(loss, gradient norm, main gradients by name) of a step over two micro-batches."""
    engine = EngineConfig(precision=precision, recompute=recompute)  # type: ignore[arg-type]

    def make(*args: Any, **settings: Any) -> CascadeConfig:
        return make_config(*args, **settings | {"fuse_weight_gradient": fused})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_module, "make_config", make)
        trainer = Trainer(
            world,
            replace(tiny(), pattern="M*E-", vocab_size=64, hidden_size=64, **model),
            engine=engine,
            moe=MoeTrainingConfig(),
            optimizer=OptimizerConfig(clip_grad=0.0),
            accelerators=Accelerators(),
            seed=1,
            run_dir=Path("/nonexistent"),
        )
    generator = torch.Generator().manual_seed(world.dp_rank)
    batches = []
    for _ in range(2):
        tokens = torch.randint(64, (60,), generator=generator, dtype=torch.int32)
        document = Document(tokens, torch.ones(60, dtype=torch.bool), "x")
        batches.append(pack_documents([document], 64))
    result = trainer.train_step(batches)
    gradients: dict[str, Any] = {}
    for name, parameter in trainer.modules[0].named_parameters():
        main_grad: Tensor = parameter.main_grad
        gradients[name] = main_grad.clone()
        is_linear = name.endswith(("_proj.weight", "_qkv.weight")) or ".linear_fc" in name
        if is_linear and ".experts." not in name:
            assert parameter.grad_added_to_main_grad == fused, name
    return result.loss, result.grad_norm, gradients


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_a_step_has_the_gradients_of_a_step_without_fusion(
    world: World, precision: str, tolerance: float, tied: bool, recompute: bool
) -> None:
    plain, fused = (
        trained(world, on, precision, recompute, tie_embeddings=tied) for on in (False, True)
    )
    assert fused[0] == plain[0]
    assert fused[1] == pytest.approx(plain[1], rel=tolerance)
    assert_equal(fused[2], plain[2], tolerance)


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, gradient in expected.items():
        error = float((found[name] - gradient).abs().max() / gradient.abs().max())
        assert error < tolerance, f"{name} is off by {error:.1e} of its largest value"


def on_ranks(tp: int, ep: int) -> None:
    world = start_world(ParallelConfig(tp=tp, ep=ep), EngineConfig(precision="fp32"))
    plain, fused = (trained(world, on, "fp32", True) for on in (False, True))
    assert fused[0] == plain[0]
    assert fused[1] == pytest.approx(plain[1], rel=1e-5)
    assert_equal(fused[2], plain[2], 1e-5)


def test_sequence_parallel_ranks_have_the_gradients_of_ranks_without_fusion() -> None:
    run_ranks(on_ranks, 2, {"tp": 2, "ep": 2})
