"""The whole model against transformers' own as the oracle: outputs and every gradient.

transformers gets one document at a time; our model gets them packed, with padding. All weights are
random, including norms, biases and decays, so that a missing tensor is noticed.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.transformers_weights import (
    WeightMap,
    build_ours,
    from_nemotron_h,
    from_qwen3,
    from_qwen3_moe,
    load_into,
    nemotron_h,
    part_of,
    parts_by_key,
    qwen3,
    qwen3_moe,
    randomise,
)
from nemocascade_kernels import Nll
from torch import Tensor, nn

from nemocascade.megatron.layers.mamba import MambaMixer
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import CascadeModel
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    tiny,
)
from nemocascade.runtime.world import World
from nemocascade.types import Document, PackedBatch, pack_documents

pytest.importorskip("transformers")

# Short, around chunk edges (16, 32, 64, 128), and longer than transformers' chunk of 128.
LENGTHS = (1, 33, 130, 2, 16, 63, 3, 65, 128)
PADDING = 7
TOLERANCE = 1e-5  # of the largest value; seen: 2e-6 in outputs, 3e-6 in gradients

TINY = replace(tiny(), vocab_size=512)
NEMOTRON_H = {
    "tiny": TINY,
    "mamba, a group a head": replace(
        TINY,
        pattern="MM",
        hidden_size=40,
        mamba_heads=3,
        mamba_groups=3,
        mamba_head_dim=10,
        mamba_state=6,
        mamba_conv=3,
    ),
    "one group, one kv head, k of an odd E": replace(
        TINY,
        pattern="MEM*E",
        hidden_size=48,
        num_heads=6,
        num_kv_heads=1,
        head_dim=20,
        mamba_heads=6,
        mamba_groups=1,
        mamba_head_dim=24,
        num_experts=7,
        experts_per_token=3,
        expert_width=20,
        shared_expert_width=36,
        router_scale=1.5,
    ),
    "attention first, dense MLP, tied": replace(
        TINY,
        pattern="*-M-*",
        hidden_size=56,
        num_heads=6,
        num_kv_heads=6,
        head_dim=14,
        mlp_width=90,
        tie_embeddings=True,
    ),
    "router groups, weights as they are": replace(
        TINY,
        pattern="EM-E*",
        num_experts=12,
        experts_per_token=5,
        router_groups=4,
        router_top_groups=2,
        router_normalize=False,
        router_scale=0.7,
        tie_embeddings=True,
    ),
    "all experts": replace(TINY, pattern="E*", num_experts=2, experts_per_token=2),
}
QWEN3 = replace(
    TINY,
    pattern="*E*E",
    norm_eps=1e-6,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rope=True,
    qk_norm=True,
    activation="swiglu",
    router_score="softmax",
    router_bias=False,
    router_scale=1.0,
    shared_expert_width=0,
    num_experts=9,
    experts_per_token=4,
    expert_width=24,
)
QWEN3_MOE = {
    "tied": replace(QWEN3, tie_embeddings=True),
    "large base, weights as they are": replace(QWEN3, router_normalize=False, rope_base=1e6),
    "dense SwiGLU layers": replace(QWEN3, pattern="*-*E*-", mlp_width=70),
}
DENSE = replace(
    TINY,
    pattern="*-*-*-",
    norm_eps=1e-6,
    num_heads=6,
    head_dim=24,
    rope=True,
    qk_norm=True,
    activation="swiglu",
    mlp_width=70,
)
QWEN3_DENSE = {
    "tied": replace(DENSE, tie_embeddings=True),
    "large base, one kv head": replace(DENSE, num_kv_heads=1, rope_base=1e6),
}


@dataclass(frozen=True)
class Readings:
    """A model's results on the documents.

    hidden: [T, H] after the final norm. logits: [T, V]. logprob: [T], of the next token, 0 where it
    does not train. loss: scalar. gradients: of the loss, under our names.
    """

    hidden: Tensor
    logits: Tensor
    logprob: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


def documents(vocabulary: int, seed: int) -> list[Document]:
    random = torch.Generator().manual_seed(seed)
    return [
        Document(
            tokens=torch.randint(vocabulary, (n,), generator=random, dtype=torch.int32),
            trained=torch.rand(n, generator=random) < 0.7,
            source=f"document {i}",
        )
        for i, n in enumerate(LENGTHS)
    ]


def packed_batch(shape: ModelConfig, seed: int) -> PackedBatch:
    """The documents, with an unequal weight on every trained row."""
    batch = pack_documents(documents(shape.vocab_size, seed), sum(LENGTHS) + PADDING)
    random = torch.Generator().manual_seed(seed + 1)
    weight = batch.token_weight * torch.rand(batch.capacity, generator=random)
    return replace(batch, token_weight=weight / weight.sum())


def read_with_transformers(
    model: nn.Module, shape: ModelConfig, batch: PackedBatch, to_ours: WeightMap
) -> Readings:
    """One document after the other; gradients add up."""
    model.zero_grad()
    losses, hidden, logits, logprobs = [], [], [], []
    bounds = batch.cu_seqlens.tolist()
    for first, end in itertools.pairwise(bounds):
        if first >= batch.num_tokens:
            break
        rows = slice(first, end)
        out: Any = model(input_ids=batch.tokens[None, rows], output_hidden_states=True)
        chosen = out.logits[0].log_softmax(-1).gather(1, batch.targets[rows, None]).squeeze(1)
        loss = -(batch.token_weight[rows] * chosen).sum()
        loss.backward()
        losses.append(loss.detach())
        hidden.append(out.hidden_states[-1][0].detach())
        logits.append(out.logits[0].detach())
        logprobs.append(torch.where(batch.token_weight[rows] != 0, chosen.detach(), 0.0))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Readings(
        hidden=torch.cat(hidden),
        logits=torch.cat(logits),
        logprob=torch.cat(logprobs),
        loss=torch.stack(losses).sum(),
        gradients=to_ours(gradients, shape),
    )


def read_packed(model: CascadeModel, batch: PackedBatch, world: World) -> Readings:
    """All documents and the padding at once."""
    model.zero_grad()
    packed = Microbatch.from_batch(batch, world.device)
    assert packed.batch is not None
    with torch.no_grad():
        hidden = model(packed).squeeze(1)[: batch.num_tokens]
        logits = hidden @ model.lm_head().t()
    out = model(packed, Nll(packed.batch.token_weight))
    out.loss.backward()
    return Readings(
        hidden=hidden,
        logits=logits,
        logprob=out.logprob[: batch.num_tokens],
        loss=out.loss.detach(),
        gradients={
            key: part_of(part, part.owner.grad)
            for key, part in parts_by_key(model, world).items()
            if part.owner.grad is not None
        },
    )


def error(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    scale = expected.abs().max().clamp(min=1e-30)
    return float((value - expected).abs().max() / scale)


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
