"""Messages of a step between ranks: their number, the host's reads for them, and freed outputs."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from typing import Any
from unittest import mock

import pytest
from helpers.ranks import run_ranks

LAYOUTS: dict[str, dict[str, Any]] = {
    "EP2": {"ep": 2},
    "EP2 ETP2": {"ep": 2, "etp": 2},
}


def dispatch_each(layouts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Dispatches of each layout: with and without recomputation, and with a GPU's gather."""
    from nemocascade_kernels.testing import PoisonedMemory

    from nemocascade.megatron.layers import dispatch

    found = {}
    for name, parallel in layouts.items():
        found[name] = {"kept": _dispatch(parallel, False), "recomputed": _dispatch(parallel, True)}
        with mock.patch.object(dispatch, "_indexed", dispatch._permuted), PoisonedMemory():
            found[name]["permuted"] = _dispatch(parallel, False)
    return found


def _dispatch(parallel: dict[str, Any], recompute: bool) -> dict[str, Any]:
    """Messages and host reads of one MoE layer's forward and backward passes; its gradients."""
    import torch
    from nemocascade_kernels import Nll

    from nemocascade.megatron.microbatch import Microbatch

    world, [model] = _model(parallel, "E", recompute)
    packed = Microbatch.from_batch(_batches(world.size)[world.rank], world.device)
    assert packed.batch is not None
    with _Messages() as forward:
        loss = model(packed, Nll(packed.batch.token_weight)).loss
    with _Messages() as backward:
        loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return {
        "forward": [forward.sent, forward.read],
        "backward": [backward.sent, backward.read],
        "gradients": torch.cat([g.flatten() for g in gradients]).tolist(),
    }


def pipeline() -> dict[str, Any]:
    """Elements that this stage's outputs hold after a step, and the losses of the last stage."""
    from nemocascade_kernels import Nll

    from nemocascade.megatron.microbatch import Microbatch
    from nemocascade.megatron.schedule import run_schedule
    from nemocascade.train.evaluation import batch_of

    world, chunks = _model({"pp": 2}, "MEM*", False)
    micro = [Microbatch.from_batch(batch, world.device) for batch in _batches(3)]
    outputs: list[Any] = []
    chunks[0].register_forward_hook(lambda *call: outputs.append(call[2]))
    found = run_schedule(
        world, chunks[0].config, chunks, micro, lambda m: Nll(batch_of(m).token_weight)
    )
    return {
        "elements": [out.numel() for out in outputs if not world.is_last_stage],
        "losses": [float(out.loss) for out in found],
        "expected": [-float((batch_of(m).token_weight * out.logprob).sum())
                     for m, out in zip(micro, found, strict=False)],
    }  # fmt: skip


def _model(parallel: dict[str, Any], pattern: str, recompute: bool) -> tuple[Any, list[Any]]:
    from dataclasses import replace

    from nemocascade.megatron.config import Accelerators, make_config
    from nemocascade.megatron.model import build_model
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, MoeTrainingConfig, ParallelConfig, tiny

    engine = EngineConfig(precision="fp32", recompute=recompute)
    world = start_world(ParallelConfig(**parallel), engine)
    shape = replace(tiny(), pattern=pattern, vocab_size=512, hidden_size=64)
    config = make_config(shape, world.parallel, engine, MoeTrainingConfig(), seed=3)
    return world, [chunk.train() for chunk in build_model(world, config, Accelerators())]


def _batches(count: int) -> list[Any]:
    from helpers.equivalence import random_batches

    return random_batches(count, 512)


class _Messages:
    """Counts the all-to-alls of the dispatch and the device tensors that the host reads for it."""

    def __init__(self) -> None:
        self.sent = self.read = 0
        self._stack = ExitStack()

    def __enter__(self) -> _Messages:
        import torch
        import torch.distributed as dist

        from nemocascade.megatron.layers import dispatch

        send = dist.all_to_all_single

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.sent += 1
            return send(*args, **kwargs)

        self._patch(dist, "all_to_all_single", counted)
        for name in ("tolist", "item", "__int__", "__bool__", "repeat_interleave"):
            real = getattr(torch.Tensor, name)

            def reading(*args: Any, real: Any = real, **kwargs: Any) -> Any:
                # Without an output size, the host reads the sum of repeats.
                sized = isinstance(args[-1], int) or "output_size" in kwargs
                if sys._getframe(1).f_code.co_filename == dispatch.__file__ and not sized:
                    self.read += 1
                return real(*args, **kwargs)

            self._patch(torch.Tensor, name, reading)
        return self

    def _patch(self, owner: Any, name: str, value: Any) -> None:
        self._stack.enter_context(mock.patch.object(owner, name, value))

    def __exit__(self, *error: object) -> None:
        self._stack.close()


@pytest.fixture(scope="module")
def dispatched() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_ranks(dispatch_each, 4, {"layouts": LAYOUTS})
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dispatch_reads_the_device_once(name: str, dispatched: list[dict[str, Any]]) -> None:
    """Counts, rows and results go forward; gradients of rows and of results go back."""
    for rank in dispatched:
        kept, recomputed = rank[name]["kept"], rank[name]["recomputed"]
        assert kept["forward"] == recomputed["forward"] == [3, 1]
        assert kept["backward"] == [2, 0]
        assert recomputed["backward"] == [4, 0], "the recomputation exchanges rows and results only"
        assert recomputed["gradients"] == kept["gradients"]


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_gpus_gather_gives_the_same_gradients(
    name: str, dispatched: list[dict[str, Any]]
) -> None:
    """Its rows of padding are unwritten memory, and no gradient sees them."""
    for rank in dispatched:
        kept, permuted = rank[name]["kept"], rank[name]["permuted"]
        assert permuted["forward"] == [3, 1]
        assert permuted["gradients"] == pytest.approx(kept["gradients"], rel=1e-4, abs=1e-6)


def test_a_stage_frees_its_outputs_and_keeps_its_losses() -> None:
    first, last = run_ranks(pipeline, 2)
    assert first["elements"] == [1, 1, 1]
    assert last["losses"] == pytest.approx(last["expected"], rel=1e-6)
    assert len(last["losses"]) == 3
