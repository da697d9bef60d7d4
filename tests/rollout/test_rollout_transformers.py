"""Greedy generation equals that of transformers' NemotronH with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.rollout import draw_tokens
from helpers.transformers_weights import build_ours, from_nemotron_h, nemotron_h, randomise

from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig, tiny
from nemocascade.rollout.engine import Request, Sampling
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.world import World

pytest.importorskip("transformers")

SHAPES = {
    "tiny": replace(tiny(), vocab_size=512),
    "odd sizes": replace(
        tiny(),
        pattern="*M-EM",
        vocab_size=301,
        hidden_size=40,
        num_heads=6,
        num_kv_heads=2,
        head_dim=12,
        mamba_heads=3,
        mamba_groups=3,
        mamba_head_dim=10,
        mamba_state=6,
        mamba_conv=3,
        num_experts=7,
        experts_per_token=3,
        expert_width=20,
        shared_expert_width=36,
        mlp_width=50,
    ),
}
PROMPTS = (1, 2, 5, 33, 130)
WRITTEN = 16


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.mark.parametrize("case", SHAPES)
def test_greedy_tokens(world: World, case: str) -> None:
    shape = SHAPES[case]
    theirs: Any = nemotron_h(shape).eval()
    randomise(theirs, seed=3)
    theirs.config.use_cache = True
    ours = build_ours(world, shape, theirs, from_nemotron_h)
    prompts = [draw_tokens(shape.vocab_size, n, seed=n) for n in PROMPTS]
    requests = [Request(i, tuple(p.tolist())) for i, p in enumerate(prompts)]
    sampling = Sampling(temperature=0.0, max_tokens=WRITTEN)
    found = {c.request.id: c for c in LiveEngine(world, [ours], slots=3).run(requests, sampling)}
    for i, prompt in enumerate(prompts):
        expected = theirs.generate(
            prompt[None],
            # Without a mask it would take tokens of id 0 for padding.
            attention_mask=torch.ones_like(prompt[None]),
            max_new_tokens=WRITTEN,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert found[i].tokens.tolist() == expected[0].tolist(), f"prompt of {len(prompt)}"
    assert len({t for c in found.values() for t in c.response}) > WRITTEN
