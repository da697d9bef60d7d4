"""Chunked prefill of a text equals its prefill at once: states, logits, tokens, routing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from helpers.rollout import ODD, copies_of, draw_tokens, full_logits, make_model, make_runner
from nemocascade_kernels import backends
from torch import Tensor

from nemocascade.megatron.generation.cached_layers import AttentionSlotLayer
from nemocascade.megatron.generation.model_runner import ModelRunner
from nemocascade.megatron.model import CascadeModel
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ModelConfig, ParallelConfig
from nemocascade.rollout.engine import Completion, Request, Sampling
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.world import World

SHAPES = {
    "M and others": ODD,
    "M": replace(ODD, pattern="MM"),
    "M, a group a head, short window": replace(ODD, pattern="MM", mamba_groups=6, mamba_conv=2),
    "*": replace(ODD, pattern="**"),
    "*, rotary, one key head": replace(ODD, pattern="*-*", rope=True, qk_norm=True, num_kv_heads=1),
    "*, as many key heads": replace(ODD, pattern="*M", num_kv_heads=6),
    "E": replace(ODD, pattern="EE"),
}
TOLERANCE = 1e-5  # of the largest value
STOPS = tuple((t,) for t in range(0, ODD.vocab_size, 4))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def chunks(world: World) -> list[CascadeModel]:
    return make_model(world, ODD)


def states_of(model: ModelRunner, slot: int, length: int) -> list[Tensor]:
    """Everything that the layers hold of a slot with so many tokens."""
    found = []
    for layer in model._pipeline.layers:
        (*states,) = layer.state(slot, model.table.named(slot, length))
        if isinstance(layer, AttentionSlotLayer):
            states = [cache.transpose(1, 2).flatten(0, 1)[:length] for cache in states]
        found += states
    return found


def error(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-9))


def read_in_pieces(
    model: ModelRunner, texts: Sequence[Tensor], slots: Sequence[int], size: int
) -> Tensor:
    """Logits after each text, read `size` tokens a pass; short texts end before long ones, and a
    text begins beside others that go on: the first pass reads all but the first text."""
    last: dict[int, Tensor] = {}
    held = [0] * len(texts)
    late = True
    while any(h < t.numel() for h, t in zip(held, texts, strict=True)):
        rows = [i for i, t in enumerate(texts) if held[i] < t.numel() and not (late and i == 0)]
        late = False
        pieces = [texts[i][held[i] : held[i] + size] for i in rows]
        logits = model.prefill(pieces, [[slots[i]] for i in rows], [held[i] for i in rows])
        assert logits is not None
        for row, i in enumerate(rows):
            held[i] += pieces[row].numel()
            last[i] = logits[row]
    return torch.stack([last[i] for i in range(len(texts))])


@pytest.mark.parametrize("case", [*SHAPES, *(f"{name}, torch" for name in SHAPES if "M" in name)])
def test_pieces_equal_the_whole(world: World, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At sizes below the convolution's window, around the scan's chunks, and odd ones; with the
    compiled mixer and with torch's operators."""
    if case.endswith(", torch"):
        case = case.removesuffix(", torch")
        monkeypatch.setenv(backends.VARIABLE, "mamba2=torch")
    shape: ModelConfig = SHAPES[case]
    chunks = make_model(world, shape)
    lengths = (67, 1, 3, 33, 100)
    texts = [draw_tokens(shape.vocab_size, n, seed=n) for n in lengths]
    count = len(texts)
    model = make_runner(world, chunks, slots=2 * count)
    model.refresh()
    whole = model.prefill(texts, [[i] for i in range(count)])
    assert whole is not None
    expected = torch.stack([full_logits(chunks, t)[-1] for t in texts])
    assert error(whole, expected) < TOLERANCE
    # Slots of pieces in another order than those of the whole, with leavings of other texts.
    slots = [count + (3 * i + 1) % count for i in range(count)]
    model.prefill([draw_tokens(shape.vocab_size, 140, seed=9)], [slots])
    for size in (1, 7, 32, 45):
        found = read_in_pieces(model, texts, slots, size)
        assert error(found, whole) < TOLERANCE, size
        for i, length in enumerate(lengths):
            for one, other in zip(
                states_of(model, slots[i], length), states_of(model, i, length), strict=True
            ):
                assert error(one, other) < TOLERANCE, (size, length)


@pytest.mark.parametrize("case", [name for name in SHAPES if "M" in name])
def test_the_compiled_mixer_leaves_the_states_of_torch(
    world: World, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole texts, then one that continues beside one that starts."""
    shape: ModelConfig = SHAPES[case]
    lengths = (1, 31, 32, 33, 64, 67)
    count = len(lengths)
    texts = [draw_tokens(shape.vocab_size, n, seed=n) for n in lengths]
    models = []
    for backend in ("native", "torch"):
        monkeypatch.setenv(backends.VARIABLE, f"mamba2={backend}")
        model = make_runner(world, make_model(world, shape), slots=count)
        model.refresh()
        model.prefill(texts, [[i] for i in range(count)])
        more = [draw_tokens(shape.vocab_size, 40, seed=99 + i) for i in range(2)]
        model.prefill(more, [[1], [2]], [31, 0])
        models.append(model)
    for i, length in enumerate((1, 71, 40, 33, 64, 67)):
        for one, other in zip(*(states_of(m, i, length) for m in models), strict=True):
            assert error(one, other) < TOLERANCE, lengths[i]


def test_a_piece_goes_on_after_steps(world: World, chunks: list[CascadeModel]) -> None:
    """Prompt, steps, a piece, steps, a piece: as the packed forward; the last piece goes to several
    slots at once, and what is in slots that it does not name does not matter."""
    model = make_runner(world, chunks, slots=5)
    model.refresh()
    text = draw_tokens(ODD.vocab_size, 120, seed=1)
    expected = full_logits(chunks, text)
    for layer in model._pipeline.layers:
        for name in ("conv", "ssm", "keys", "values"):
            if hasattr(layer, name):
                getattr(layer, name).fill_(float("nan"))

    def check(logits: Tensor | None, at: int) -> None:
        assert logits is not None
        for row in logits:
            assert error(row, expected[at]) < TOLERANCE, at

    check(model.prefill([text[:11]], [[2]]), 10)
    at = 11
    for steps, piece in ((3, 2), (1, 40), (5, 33)):
        for _ in range(steps):
            row = (text[at : at + 1], torch.tensor([2]), torch.tensor([at]), at + 1)
            check(model.decode(*row), at)
            at += 1
        last = steps == 5
        end = at + piece
        copies = [(a, b) for slot in (3, 1) for a, b in copies_of(model, 2, slot, end)]
        check(
            model.prefill(
                [text[at:end]], [[2, 3, 1] if last else [2]], [at], copies if last else []
            ),
            end - 1,
        )
        at = end
    rows = torch.tensor([1, 3, 2])
    check(model.decode(text[at].repeat(3), rows, torch.full((3,), at), at + 1), at)


def test_a_chunk_with_cached_tokens_needs_a_slot(world: World, chunks: list[CascadeModel]) -> None:
    model = make_runner(world, chunks, slots=2)
    model.refresh()
    with pytest.raises(ValueError, match="continues 3 cached tokens"):
        model.prefill([torch.tensor([1])], [[]], [3])


def test_documents_in_one_pass_do_not_meet(world: World, chunks: list[CascadeModel]) -> None:
    """A piece's logits have the same bits whatever other texts the pass reads."""
    model = make_runner(world, chunks, slots=4)
    model.refresh()
    text = draw_tokens(ODD.vocab_size, 60, seed=3)
    results = []
    for other in (1, 2):
        beside = draw_tokens(ODD.vocab_size, 70, seed=other)
        model.prefill([beside[:20], text[:25]], [[0], [1]])
        logits = model.prefill([beside[20:], beside[:9], text[25:]], [[0], [2], [1]], [20, 0, 25])
        assert logits is not None
        results.append(logits)
    assert torch.equal(results[0][2], results[1][2])
    assert not torch.equal(results[0][0], results[1][0])


def make_requests(prompts: int, rollouts: int) -> list[Request]:
    """Prompts of different lengths, each continued `rollouts` times."""
    return [
        Request(p * rollouts + g, tuple(draw_tokens(ODD.vocab_size, 3 + 17 * p, seed=p).tolist()))
        for p in range(prompts)
        for g in range(rollouts)
    ]


def by_id(found: Sequence[Completion]) -> dict[int, Completion]:
    return {c.request.id: c for c in found}


def test_the_engine_reads_prompts_in_pieces(world: World, chunks: list[CascadeModel]) -> None:
    """Texts are those of whole prompts, whatever slots and packs there are; a prompt that has more
    requests than slots is read once."""
    requests, sampling = make_requests(4, 5), Sampling(max_tokens=12, seed=6, stop_tokens=STOPS)
    whole = by_id(list(LiveEngine(world, chunks, slots=20).run(requests, sampling)))
    same = by_id(
        list(LiveEngine(world, chunks, slots=20, prefill_chunk=54).run(requests, sampling))
    )
    pieces: dict[int, Completion] = {}
    for slots, budget in ((20, 0), (3, 0), (1, 0), (20, 1000), (7, 30)):
        engine = LiveEngine(world, chunks, slots=slots, prefill_tokens=budget, prefill_chunk=13)
        found = by_id(list(engine.run(requests, sampling)))
        assert engine.counts.prefills == 4
        assert engine.counts.prefill_tokens == sum(len(r.prompt) for r in requests[::5])
        assert engine.counts.prefill_chunks == sum(-(-len(r.prompt) // 13) for r in requests[::5])
        pieces = pieces or found
        for number, expected in whole.items():
            c = found[number]
            assert torch.equal(c.tokens, expected.tokens), (slots, budget, number)
            assert float((c.logprob - expected.logprob).abs().max()) < 1e-4
            assert torch.equal(same[number].logprob, expected.logprob)
            # Alone in its passes, a prompt gives the same bits whatever number of slots there is.
            assert budget or torch.equal(c.logprob, pieces[number].logprob)
    assert any(not torch.equal(pieces[i].logprob, whole[i].logprob) for i in whole)


def test_turns_of_an_environment_are_read_once(world: World, chunks: list[CascadeModel]) -> None:
    """Long episodes: the passes read each token once, and give what one long text would."""
    turns = 25

    def respond(c: Completion) -> list[int] | None:
        if c.turns == turns:
            return None
        return [1 + (c.request.id + i) % ODD.vocab_size for i in range(1 + 7 * (c.turns % 3))]

    requests = make_requests(3, 1)
    sampling = Sampling(max_tokens=900, seed=8, stop_tokens=STOPS)
    results = []
    for slots, chunk in ((3, 0), (1, 0), (3, 4)):
        engine = LiveEngine(world, chunks, slots=slots, prefill_chunk=chunk, record_routing=True)
        found = by_id(list(engine.run(requests, sampling, respond)))
        assert {c.turns for c in found.values()} == {turns}
        # All but the last token of each text.
        read = sum(len(c.tokens) - 1 for c in found.values())
        assert engine.counts.prefill_tokens + engine.counts.rows == read
        assert engine.counts.prefills == 3 * turns
        results.append(found)
    for number, c in results[0].items():
        assert torch.equal(c.tokens, results[1][number].tokens)
        assert torch.equal(c.logprob, results[1][number].logprob)
        assert torch.equal(c.tokens, results[2][number].tokens)
        assert float((c.logprob - results[2][number].logprob).abs().max()) < 1e-4
        logprobs = full_logits(chunks, c.tokens).log_softmax(1)
        expected = logprobs[:-1].gather(1, c.tokens[1:, None]).squeeze(1)
        rows = c.written[1:]
        assert float((c.logprob[1:][rows] - expected[rows]).abs().max()) < 1e-4
        one, other = c.routing, results[2][number].routing
        assert one is not None
        assert other is not None
        assert one.shape == other.shape == (len(c.tokens) - 1, 2, ODD.experts_per_token)
        # Experts whose scores are nearly alike may change places.
        assert float((one == other).float().mean()) > 0.995


def test_routing_of_pieces_reaches_every_request(world: World, chunks: list[CascadeModel]) -> None:
    """Those that share a prompt's reading, and those that begin from the kept prompt."""
    requests, sampling = make_requests(3, 4), Sampling(max_tokens=4, seed=2)
    engines = [
        LiveEngine(world, chunks, slots=3, prefill_chunk=size, record_routing=True)
        for size in (0, 11)
    ]
    whole, pieces = (by_id(list(e.run(requests, sampling))) for e in engines)
    for number, expected in whole.items():
        found = pieces[number].routing
        assert found is not None
        assert expected.routing is not None
        assert torch.equal(found, expected.routing)


def test_settings(world: World, chunks: list[CascadeModel]) -> None:
    with pytest.raises(ValueError, match=r"prefill_chunk\(-1\)"):
        LiveEngine(world, chunks, prefill_chunk=-1)
