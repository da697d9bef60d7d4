"""The whole model against transformers' own as the oracle: outputs and every gradient.

transformers gets one document at a time; our model gets them packed, with padding. All weights are
random, including norms, biases and decays, so that a missing tensor is noticed.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.against_transformers import (
    LENGTHS,
    NEMOTRON_H,
    QWEN3_DENSE,
    QWEN3_MOE,
    TINY,
    TOLERANCE,
    Readings,
    error,
    packed_batch,
    read_packed,
    read_with_transformers,
)
from helpers.transformers_weights import (
    build_ours,
    from_nemotron_h,
    from_qwen3,
    from_qwen3_moe,
    load_into,
    nemotron_h,
    qwen3,
    qwen3_moe,
    randomise,
)

from nemocascade.megatron.layers.mamba import MambaMixer
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    ParallelConfig,
)
from nemocascade.runtime.world import World

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


def assert_equal(ours: Readings, theirs: Readings) -> None:
    assert float(theirs.hidden.std()) > 0.1
    assert float(theirs.logprob.std()) > 0.1
    for name in ("hidden", "logits", "logprob", "loss"):
        found = error(getattr(ours, name), getattr(theirs, name))
        assert found <= TOLERANCE, f"{name} differs by {found:.1e}"
    assert sorted(ours.gradients) == sorted(theirs.gradients)
    errors = {n: error(g, theirs.gradients[n]) for n, g in ours.gradients.items()}
    wrong = {name: f"{e:.1e}" for name, e in errors.items() if e > TOLERANCE}
    assert not wrong, wrong


@pytest.mark.parametrize("case", NEMOTRON_H)
def test_packed_documents_equal_nemotron_h(world: World, case: str) -> None:
    shape = NEMOTRON_H[case]
    theirs = nemotron_h(shape).to(world.device).eval()
    randomise(theirs, seed=3)
    ours = build_ours(world, shape, theirs, from_nemotron_h)
    batch = packed_batch(shape, seed=5)
    expected = read_with_transformers(theirs, shape, batch.to(world.device), from_nemotron_h)
    assert_equal(read_packed(ours, batch, world), expected)


@pytest.mark.parametrize("case", QWEN3_MOE)
def test_packed_documents_equal_qwen3_moe(world: World, case: str) -> None:
    shape = QWEN3_MOE[case]
    theirs = qwen3_moe(shape).to(world.device).eval()
    randomise(theirs, seed=4)
    ours = build_ours(world, shape, theirs, from_qwen3_moe)
    batch = packed_batch(shape, seed=6)
    expected = read_with_transformers(theirs, shape, batch.to(world.device), from_qwen3_moe)
    assert_equal(read_packed(ours, batch, world), expected)


@pytest.mark.parametrize("case", QWEN3_DENSE)
def test_packed_documents_equal_qwen3(world: World, case: str) -> None:
    shape = QWEN3_DENSE[case]
    theirs = qwen3(shape).to(world.device).eval()
    randomise(theirs, seed=4)
    ours = build_ours(world, shape, theirs, from_qwen3)
    batch = packed_batch(shape, seed=6)
    expected = read_with_transformers(theirs, shape, batch.to(world.device), from_qwen3)
    assert_equal(read_packed(ours, batch, world), expected)


def test_the_time_step_limit_equals_transformers(world: World) -> None:
    """transformers raises short steps to a bound; our mixer can, and by default does not."""
    shape = replace(TINY, pattern="M-M")
    theirs = nemotron_h(shape, shortest_step=0.02).to(world.device).eval()
    randomise(theirs, seed=7)
    ours = build_ours(world, shape, theirs, from_nemotron_h)
    batch = packed_batch(shape, seed=8)
    expected = read_with_transformers(theirs, shape, batch.to(world.device), from_nemotron_h)
    unlimited = read_packed(ours, batch, world)
    assert error(unlimited.hidden, expected.hidden) > 1e-3
    for module in ours.modules():
        if isinstance(module, MambaMixer):
            module.dt_limit = (0.02, float("inf"))
    assert_equal(read_packed(ours, batch, world), expected)


def test_joined_documents_do_not_equal_packed_ones(world: World) -> None:
    """The oracle sees a leak between documents: read as one document they give other outputs."""
    shape = replace(TINY, pattern="M")
    theirs = nemotron_h(shape).to(world.device).eval()
    randomise(theirs, seed=9)
    ours = build_ours(world, shape, theirs, from_nemotron_h)
    batch = packed_batch(shape, seed=10)
    joined = replace(batch, cu_seqlens=batch.cu_seqlens[[0, -2, -1]])
    expected = read_with_transformers(theirs, shape, joined.to(world.device), from_nemotron_h)
    assert_equal(read_packed(ours, joined, world), expected)
    packed = read_packed(ours, batch, world)
    first = LENGTHS[0]
    assert error(packed.hidden[:first], expected.hidden[:first]) <= TOLERANCE
    assert error(packed.hidden[first:], expected.hidden[first:]) > 1e-2


@pytest.mark.parametrize("fault", ["left over", "missing", "shape"])
def test_no_tensor_is_lost_on_the_way(world: World, fault: str) -> None:
    shape = replace(TINY, pattern="ME*-")
    theirs = nemotron_h(shape)
    tensors = dict(theirs.state_dict())
    to_ours = functools.partial(from_nemotron_h, shape=shape)
    ours = to_ours(tensors)
    model = build_ours(world, shape, theirs, from_nemotron_h)
    if fault == "left over":
        tensors["model.layers.0.mixer.in_proj.bias"] = torch.zeros(3)
        with pytest.raises(ValueError, match=r"1 tensors have no place.*in_proj\.bias"):
            to_ours(tensors)
    elif fault == "missing":
        broken = copy.copy(ours)
        del broken["decoder.layers.1.mixer.router.expert_bias"]
        with pytest.raises(ValueError, match="expert_bias is missing"):
            load_into(model, broken, shape, world)
    else:
        name = "decoder.layers.3.mixer.linear_fc1.weight"
        with pytest.raises(ValueError, match=r"linear_fc1\.weight is"):
            load_into(model, ours | {name: ours[name].t()}, shape, world)
