"""Decoding on the live layers: prefill and decode steps together equal the packed forward."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from helpers.heads import skip_unless_served
from helpers.rollout import ODD, copies_of, draw_tokens, full_logits, make_model, make_runner
from nemocascade_kernels.backends import VARIABLE
from nemocascade_kernels.decode_step.op import OP

from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ModelConfig, ParallelConfig
from nemocascade.runtime.world import World

SHAPES = {
    "odd sizes": ODD,
    "rotary, normalised heads": replace(ODD, pattern="*-*", rope=True, qk_norm=True),
    "SwiGLU, softmax router": replace(
        ODD, pattern="E*", activation="swiglu", router_score="softmax", shared_expert_width=0
    ),
    "a group a head": replace(ODD, pattern="MM", mamba_groups=6, mamba_conv=3),
}
# Shorter than the convolution's window, around chunk edges, and several chunks long.
PROMPTS = (1, 2, 3, 17, 33, 64, 97)
STEPS = 7
TOLERANCE = 2e-5  # of the largest logit


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.mark.parametrize("backend", ["", "decode_step=triton"])
@pytest.mark.parametrize("case", SHAPES)
def test_prompt_and_steps_equal_the_packed_forward(
    world: World, case: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the operators of a CPU, and by those of a GPU, interpreted."""
    if backend:
        skip_unless_served(OP, "triton", torch.float32)
        monkeypatch.setenv(VARIABLE, backend)
    shape: ModelConfig = SHAPES[case]
    chunks = make_model(world, shape)
    model = make_runner(world, chunks, slots=len(PROMPTS) + 2)
    model.refresh()
    texts = [draw_tokens(shape.vocab_size, n + STEPS, seed=n) for n in PROMPTS]
    expected = [full_logits(chunks, text) for text in texts]
    # Slots in another order than rows, and one prompt in two slots.
    slots = torch.tensor([4, 0, 6, 2, 8, 1, 3])
    places = [[s] for s in slots.tolist()]
    places[3].append(5)
    copies = copies_of(model, 2, 5, PROMPTS[3])
    prompts = [t[:n] for t, n in zip(texts, PROMPTS, strict=True)]
    logits = model.prefill(prompts, places, copies=copies)
    scale = max(float(e.abs().max()) for e in expected)
    assert logits is not None
    for row, (n, e) in enumerate(zip(PROMPTS, expected, strict=True)):
        assert float((logits[row] - e[n - 1]).abs().max()) < TOLERANCE * scale
    rows = torch.cat([slots, torch.tensor([5])])
    for i in range(2 if backend else STEPS):
        position = torch.tensor([n + i for n in (*PROMPTS, PROMPTS[3])])
        token = torch.stack([t[n + i] for t, n in zip(texts, PROMPTS, strict=True)])
        token = torch.cat([token, token[3:4]])
        logits = model.decode(token, rows, position, longest=int(position.max()) + 1)
        assert logits is not None
        for row, (n, e) in enumerate(zip(PROMPTS, expected, strict=True)):
            error = float((logits[row] - e[n + i]).abs().max())
            assert error < TOLERANCE * scale, f"prompt of {n}, step {i}: {error / scale:.1e}"
        assert torch.allclose(logits[3], logits[-1], atol=TOLERANCE * scale)
