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
    assert squares.numel() == (1 if distributed else 2), "ranks of the parts"
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
