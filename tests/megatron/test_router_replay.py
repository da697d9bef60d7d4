"""Router replay in one process: recorded choices, replayed choices, and gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from nemocascade_kernels import Nll
from torch import Tensor

from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.layers.moe import Router
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.megatron.replay import RouteRecorder, RouteReplay, choice_dtype, lay_choices
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, MoeTrainingConfig, ParallelConfig, tiny
from nemocascade.runtime.world import World
from nemocascade.types import Document, PackedBatch, pack_documents

SHAPE = replace(tiny(), pattern="EM*E", vocab_size=64, hidden_size=32, expert_width=16)
LENGTHS, CAPACITY = (19, 1, 40), 67
TOKENS = sum(LENGTHS)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


def make_model(world: World, *, recompute: bool = False) -> CascadeModel:
    engine = EngineConfig(precision="fp32", recompute=recompute)
    moe = MoeTrainingConfig(load_balance="none")
    config = make_config(SHAPE, world.parallel, engine, moe, seed=1)
    [model] = build_model(world, config, Accelerators())
    trained: CascadeModel = model.train()
    return trained


def make_batch() -> PackedBatch:
    random = torch.Generator().manual_seed(2)
    documents = [
        Document(
            torch.randint(SHAPE.vocab_size, (n,), generator=random, dtype=torch.int32),
            torch.ones(n, dtype=torch.bool),
            "random",
        )
        for n in LENGTHS
    ]
    return pack_documents(documents, CAPACITY)


def foreign_choices(seed: int = 3) -> Tensor:
    """[C, L, K] choices that no router made; E for padding."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(CAPACITY, 2, SHAPE.num_experts, generator=random)
    choices = scores.argsort(-1)[..., : SHAPE.experts_per_token]
    choices[TOKENS:] = SHAPE.num_experts
    return choices


def microbatch(world: World, choices: Tensor | None = None) -> Microbatch:
    """Records, and replays `choices` if there are some."""
    batch, replay = make_batch(), None
    if choices is not None:
        replay = RouteReplay.from_choices(SHAPE, choices, batch.num_tokens, world.device)
    recorder = RouteRecorder(SHAPE, CAPACITY, world.device)
    return Microbatch.from_batch(batch, world.device, replay=replay, recorder=recorder)


def gradients(model: CascadeModel, packed: Microbatch) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, added up in float64, and the gradient of every parameter."""
    model.zero_grad()
    assert packed.batch is not None
    weight = packed.batch.token_weight
    out = model(packed, Nll(weight))
    out.loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return -(weight.double() * out.logprob.detach().double()).sum(), found


def recorded(packed: Microbatch) -> Tensor:
    assert packed.recorder is not None
    return packed.recorder.choices


@torch.no_grad()
def scramble_routers(model: CascadeModel) -> None:
    """A router that chooses otherwise, as one does that rounds differently, only more so."""
    for module in model.modules():
        if isinstance(module, Router):
            module.expert_bias.copy_(module.expert_bias.flip(0) + torch.arange(8.0))


def test_a_record_replays_to_the_same_loss_and_gradients(world: World) -> None:
    model = make_model(world)
    first = microbatch(world)
    loss, expected = gradients(model, first)
    assert recorded(first).dtype == torch.uint8
    assert (recorded(first)[TOKENS:] == SHAPE.num_experts).all()
    assert (recorded(first)[:TOKENS] < SHAPE.num_experts).all()
    scramble_routers(model)
    chosen_anew = microbatch(world)
    assert gradients(model, chosen_anew)[0] != loss
    assert not torch.equal(recorded(chosen_anew), recorded(first))
    again = microbatch(world, recorded(first))
    replayed_loss, found = gradients(model, again)
    assert torch.equal(recorded(again), recorded(first))
    torch.testing.assert_close(replayed_loss, loss)
    torch.testing.assert_close(found, expected)


def test_the_gradient_reaches_the_router_through_the_weights(world: World) -> None:
    """Replayed choices are constants; the loss still falls along the router's gradient."""
    model = make_model(world)
    packed = microbatch(world, foreign_choices())
    loss, found = gradients(model, packed)
    name = "decoder.layers.3.mixer.router.weight"
    weight = dict(model.named_parameters())[name]
    step = 5e-2 * found[name] / found[name].norm()
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step
        losses.append(gradients(model, microbatch(world, foreign_choices()))[0])
        with torch.no_grad():
            weight -= sign * step
    slope = float(losses[0] - losses[1]) / (2 * float(step.norm()))
    assert slope == pytest.approx(float(found[name].norm()), rel=0.05)
    assert losses[1] < loss < losses[0]


def test_a_token_without_a_record_chooses_for_itself(world: World) -> None:
    """The last token of a response has no record: no rollout ever put it through a layer."""
    model = make_model(world)
    free = microbatch(world)
    gradients(model, free)
    choices = foreign_choices()
    last = [LENGTHS[0] - 1, TOKENS - 1]
    choices[last] = SHAPE.num_experts
    packed = microbatch(world, choices)
    assert packed.replay is not None
    assert not packed.replay.complete
    gradients(model, packed)
    found = recorded(packed)
    others = torch.ones(CAPACITY, dtype=torch.bool)
    others[last] = False
    assert torch.equal(found[others].long(), choices[others])
    assert (found[last] < SHAPE.num_experts).all()
    # The first layer sees the same inputs as without replay.
    assert torch.equal(found[last, 0], recorded(free)[last, 0])


@pytest.mark.parametrize("replayed", [False, True])
def test_recompute_takes_the_choices_of_the_first_pass(world: World, replayed: bool) -> None:
    """Routers that would choose otherwise by the time of the backward change no gradient."""
    choices = foreign_choices() if replayed else None
    _, expected = gradients(make_model(world), microbatch(world, choices))
    model = make_model(world, recompute=True)
    packed = microbatch(world, choices)
    assert packed.batch is not None
    loss = model(packed, Nll(packed.batch.token_weight)).loss
    first = recorded(packed).clone()
    load = [m.load.clone() for m in model.modules() if isinstance(m, Router)]
    scramble_routers(model)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected)
    assert torch.equal(recorded(packed), first)
    assert all(map(torch.equal, load, (m.load for m in model.modules() if isinstance(m, Router))))


def test_recompute_keeps_the_choices_of_each_pass_apart(world: World) -> None:
    """Two forward passes of one micro-batch before their backward passes, as two models make."""
    packed = microbatch(world)
    _, expected = gradients(make_model(world), packed)
    model, other = make_model(world, recompute=True), make_model(world, recompute=True)
    scramble_routers(other)
    assert packed.batch is not None
    loss = model(packed, Nll(packed.batch.token_weight)).loss
    other(packed, Nll(packed.batch.token_weight))
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected)


def test_records_of_documents_are_laid_like_the_documents() -> None:
    batch, choices = make_batch(), foreign_choices().to(torch.uint8)
    bounds = batch.cu_seqlens.tolist()
    whole = [choices[a:b] for a, b in itertools.pairwise(bounds)]
    laid = lay_choices(SHAPE, whole, batch.cu_seqlens)
    assert torch.equal(laid, choices)
    partial = lay_choices(SHAPE, [whole[0][:-1], None, whole[2]], batch.cu_seqlens)
    missing = (partial != choices).flatten(1).any(1).nonzero().squeeze(1)
    assert missing.tolist() == [18, 19]
    assert (partial[missing] == SHAPE.num_experts).all()
    with pytest.raises(ValueError, match="document 1 has 1 tokens and its record 19"):
        lay_choices(SHAPE, [None, whole[0]], batch.cu_seqlens)
    with pytest.raises(ValueError, match="6 records for 4 documents"):
        lay_choices(SHAPE, [None] * 6, batch.cu_seqlens)


def test_choices_that_do_not_fit_are_rejected(world: World) -> None:
    device, good = world.device, foreign_choices()
    with pytest.raises(ValueError, match=r"\[67, 1, 2\], and must be \[T, 2, 2\]"):
        RouteReplay.from_choices(SHAPE, good[:, :1], TOKENS, device)
    with pytest.raises(ValueError, match=r"float32, and must be integers.*hold 0\.\.9, and must"):
        RouteReplay.from_choices(SHAPE, good.float() + (good == 8), TOKENS, device)
    short = RouteReplay.from_choices(SHAPE, good[:-1], TOKENS, device)
    with pytest.raises(ValueError, match="replay holds 66 tokens and the packed batch 67"):
        Microbatch.from_batch(make_batch(), device, replay=short)


@pytest.mark.parametrize(
    ("experts", "dtype"),
    [(255, torch.uint8), (256, torch.int16), (32767, torch.int16), (32768, torch.int32)],
)
def test_ids_and_no_expert_fit_the_dtype(experts: int, dtype: torch.dtype) -> None:
    assert choice_dtype(replace(SHAPE, num_experts=experts)) == dtype
