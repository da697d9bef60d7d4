"""The optimizer around Megatron's: the Adam it builds, the gradient norm, clipping."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from megatron.core import optimizer as megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nemocascade.megatron import adam as adam_module
from nemocascade.megatron.adam import Bf16MomentsAdamW
from nemocascade.megatron.config import Accelerators, Adam, make_config
from nemocascade.megatron.cpu import cuda_names
from nemocascade.megatron.model import build_model
from nemocascade.megatron.optimizer import (
    FUSED_ADAMS,
    NonFiniteGradientError,
    Optimizer,
    _adam,
    wrap_ddp,
)
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    tiny,
)
from nemocascade.recipe.train import LARGEST_BF16_BETA
from nemocascade.runtime.world import World

ENGINE = EngineConfig(precision="fp32")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), ENGINE)
    yield world
    world.close()


class StubAdam(torch.optim.AdamW):
    """A fused Adam of an optional package: it takes apex's arguments."""

    def __init__(self, params: Any, *, adam_w_mode: bool, **settings: Any) -> None:
        assert adam_w_mode
        super().__init__(params, **settings)


def stub(package: str, patch: pytest.MonkeyPatch) -> type[StubAdam]:
    """Install a stub of a package that holds a fused Adam; returns its class."""
    module: Any = ModuleType(FUSED_ADAMS[package])
    module.FusedAdam = type(f"FusedAdam of {package}", (StubAdam,), {})
    patch.setitem(sys.modules, FUSED_ADAMS[package], module)
    found: type[StubAdam] = module.FusedAdam
    return found


def build(world: World, *, adam: Adam = "torch", **settings: Any) -> Optimizer:
    """An optimizer of a small model with experts, whose gradients are random."""
    shape = replace(tiny(), pattern="ME", vocab_size=64, hidden_size=32)
    config = make_config(shape, world.parallel, ENGINE, MoeTrainingConfig(), seed=0)
    recipe = OptimizerConfig(**settings)
    accelerators = Accelerators(adam=adam)
    modules = build_model(world, config, accelerators)
    chunks = wrap_ddp(world, config, modules, distributed=recipe.distributed)
    optimizer = Optimizer(recipe, chunks, world, config, accelerators)
    generator = torch.Generator().manual_seed(0)
    for parameter in chunks[0].parameters():
        main_grad: Tensor = parameter.main_grad
        main_grad.normal_(generator=generator)
    return optimizer


@pytest.mark.parametrize("found", ["nothing", "apex", "transformer_engine"])
@pytest.mark.parametrize("adam", ["torch", "apex", "transformer_engine"])
def test_the_selected_adam_is_built_whatever_megatron_has_found(
    world: World, adam: Adam, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron takes Transformer Engine's Adam, else apex's, else torch's, at its import."""
    stubs: dict[str, type] = {name: stub(name, monkeypatch) for name in FUSED_ADAMS}
    stubs |= {"torch": torch.optim.AdamW, "nothing": torch.optim.AdamW}
    state = stubs[found], found == "nothing"
    monkeypatch.setattr(megatron_optimizer, "Adam", state[0])
    monkeypatch.setattr(megatron_optimizer, "USING_PYTORCH_OPTIMIZER", state[1])
    optimizer = build(world, adam=adam)
    assert [type(part.optimizer) for part in optimizer.parts] == [stubs[adam]] * 2
    assert (megatron_optimizer.Adam, megatron_optimizer.USING_PYTORCH_OPTIMIZER) == state
    before = [p.clone() for part in optimizer.parts for p in part.get_parameters()]
    optimizer.step(1e-2)
    after = [p for part in optimizer.parts for p in part.get_parameters()]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(("device", "fused"), [("cuda", True), ("cpu", None)])
def test_the_adam_of_torch_is_fused_on_a_gpu(device: str, fused: bool | None) -> None:
    adam = _adam(Accelerators(), torch.device(device))
    built = adam(params=[torch.nn.Parameter(torch.zeros(2))], lr=1e-3, adam_w_mode=True)
    assert type(built) is torch.optim.AdamW
    assert [group["fused"] for group in built.param_groups] == [fused]


@pytest.mark.parametrize("adam", ["torch", "apex", "transformer_engine"])
def test_bf16_moments_are_stored_by_our_adam_or_transformer_engines(
    world: World, adam: Adam, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apex's has fp32 moments only."""
    asked: list[torch.dtype] = []

    class TeAdam(StubAdam):
        def __init__(self, params: Any, *, exp_avg_dtype: Any, exp_avg_sq_dtype: Any, **rest: Any):
            asked.extend([exp_avg_dtype, exp_avg_sq_dtype])
            super().__init__(params, **rest)

    for package in FUSED_ADAMS:
        stub(package, monkeypatch)
    module: Any = sys.modules[FUSED_ADAMS["transformer_engine"]]
    module.FusedAdam = TeAdam
    optimizer = build(world, adam=adam, moments="bf16")
    by_te = adam == "transformer_engine"
    kinds = {type(part.optimizer) for part in optimizer.parts}
    assert kinds == {TeAdam if by_te else Bf16MomentsAdamW}
    assert asked == [torch.bfloat16] * (4 if by_te else 0)
    assert optimizer.moments_dtype == torch.bfloat16


@pytest.mark.parametrize("elements", [1, 1 << 20])
def test_bf16_moments_follow_their_definition(
    elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """AdamW in float64 whose moments are rounded to bf16 after each step; also batch by batch."""
    monkeypatch.setattr(adam_module, "BATCH_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(1)
    shapes, lr, betas, eps, decay = [(5, 7), (3,)], 1e-2, (0.9, 0.98), 1e-8, 0.1
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]
    expected = [p.detach().double() for p in parameters]
    moments = [[torch.zeros(s, dtype=torch.bfloat16) for s in shapes] for _ in range(2)]
    adam = Bf16MomentsAdamW(parameters, lr=lr, betas=betas, eps=eps, weight_decay=decay)
    for step in range(1, 6):
        for i, parameter in enumerate(parameters):
            g = torch.randn(parameter.shape, generator=generator)
            parameter.grad = g
            m, v = (moment[i].double() for moment in moments)
            m = betas[0] * m + (1 - betas[0]) * g.double()
            v = betas[1] * v + (1 - betas[1]) * g.double() ** 2
            root = (v / (1 - betas[1] ** step)).sqrt() + eps
            expected[i] *= 1 - lr * decay
            expected[i] -= lr * m / (1 - betas[0] ** step) / root
            moments[0][i], moments[1][i] = m.float().bfloat16(), v.float().bfloat16()
        adam.step()
        for i, parameter in enumerate(parameters):
            torch.testing.assert_close(parameter.double(), expected[i], rtol=1e-5, atol=1e-6)
            state = adam.state[parameter]
            for name, moment in zip(adam_module.MOMENTS, moments, strict=True):
                # Float32 and float64 may round to neighbours.
                torch.testing.assert_close(state[name], moment[i], rtol=2**-7, atol=0)
                moment[i] = state[name].clone()


def test_betas_that_bf16_moments_cannot_follow_are_rejected() -> None:
    [problem] = OptimizerConfig(moments="bf16", beta2=0.999).problems()
    assert "optimizer.beta2(0.999) is above 0.99" in problem
    assert "set --optimizer.moments fp32" in problem
    assert OptimizerConfig(moments="bf16").problems() == []
    # With the largest one, a moment still falls to zero when its gradients end.
    moment = torch.ones((), dtype=torch.bfloat16)
    for _ in range(2000):
        moment = (moment.float() * LARGEST_BF16_BETA).bfloat16()
    assert moment < 1e-3


class HostReads(TorchDispatchMode):
    """Counts values that the host reads from tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("distributed", [True, False])
def test_norm_and_clipping_have_the_bits_of_megatron(world: World, distributed: bool) -> None:
    """Without a read of the host before the squares are complete."""
    ours, theirs = (build(world, distributed=distributed, clip_grad=0.5) for _ in range(2))
    with HostReads() as reads:
        squares = ours.prepare()
    assert reads.count == 0
    # The groups of one process are one, so the parts have one sum.
    assert squares.numel() == 1
    with cuda_names():
        theirs.inner.prepare_grads()
        norm = theirs.inner.get_grad_norm()
        for part in theirs.parts:
            clip_grad_by_total_norm_fp32(part.get_parameters(), 0.5, norm)
    expected = [p.grad for part in theirs.parts for p in part.get_parameters()]
    assert ours.step(0.0, squares.tolist()) == norm > 0.5
    clipped = [p.grad for part in ours.parts for p in part.get_parameters()]
    assert len(clipped) > 10
    assert all(torch.equal(a, b) for a, b in zip(clipped, expected, strict=True))


@pytest.mark.parametrize("clip_grad", [0.0, 1e6])
def test_small_gradients_are_not_scaled(world: World, clip_grad: float) -> None:
    optimizer = build(world, clip_grad=clip_grad)
    squares = optimizer.prepare().tolist()
    before = [p.grad.clone() for part in optimizer.parts for p in part.get_parameters()]
    with HostReads() as reads:
        optimizer._clip(squares[0] ** 0.5)
    after = [p.grad for part in optimizer.parts for p in part.get_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert reads.count == 0


@pytest.mark.parametrize("squares", [[float("nan")], [4.0, float("inf")]])
def test_a_norm_that_is_not_finite_changes_nothing(world: World, squares: list[float]) -> None:
    optimizer = build(world)
    optimizer.prepare()
    before = [p.clone() for part in optimizer.parts for p in part.get_parameters()]
    with pytest.raises(NonFiniteGradientError, match=r"gradient norm is (nan|inf)"):
        optimizer.step(1e-2, squares)
    after = [p for part in optimizer.parts for p in part.get_parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
