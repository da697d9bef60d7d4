"""A real vLLM generates what the live model gives the same probabilities, over weight updates."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rollout import EVEN, QWEN3, draw_tokens, full_logits, make_model
from helpers.vllm_server import missing, vllm_server
from torch import Tensor

from nemocascade.megatron.artifact import Provenance, write_artifact
from nemocascade.megatron.convert import export_huggingface
from nemocascade.megatron.model import CascadeModel
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RolloutServerConfig,
)
from nemocascade.rollout import weight_updates
from nemocascade.rollout.engine import Completion, Request, Sampling
from nemocascade.rollout.factory import open_engine
from nemocascade.rollout.server import ServerEngine
from nemocascade.rollout.servers import ServerError
from nemocascade.runtime.world import World

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

BASE = replace(EVEN, vocab_size=512, hidden_size=128)
SHAPES: dict[str, ModelConfig] = {
    "nemotron-moe": replace(BASE, pattern="M*EME"),
    "nemotron": replace(BASE, pattern="M*-M-", mlp_width=256),
    "qwen3-moe": replace(
        BASE,
        pattern="*E*E",
        **QWEN3,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        num_experts=8,
        experts_per_token=2,
        expert_width=128,
    ),
}
MEAN, LARGEST = 1e-5, 1e-3


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


def model(world: World, shape: ModelConfig, seed: int) -> list[CascadeModel]:
    """A model with weights small enough that float32 rounds little."""
    chunks = make_model(world, shape, seed=seed)
    with torch.no_grad():
        for name, value in chunks[0].named_parameters():
            if value.dim() > 1 and "conv1d" not in name:
                value.div_(8.0 if "router" in name else 4.0)
    return [chunk.eval() for chunk in chunks]


def export(world: World, chunks: Sequence[CascadeModel], folder: Path) -> Path:
    made_by = Provenance(stage="test", step=0, recipe={}, data={}, scores={})
    write_artifact(folder / "artifact", world, chunks, made_by)
    export_huggingface(folder / "artifact", folder / "hf")
    return folder / "hf"


def fill(chunks: Sequence[CascadeModel], others: Sequence[CascadeModel]) -> None:
    """Give the live model other weights, in place, as an optimizer step does."""
    with torch.no_grad():
        for mine, theirs in zip(chunks, others, strict=True):
            for a, b in zip(mine.state_dict().values(), theirs.state_dict().values(), strict=True):
                if isinstance(a, Tensor):
                    a.copy_(b)


def logprobs(chunks: Sequence[CascadeModel], tokens: Tensor, prompt: int) -> Tensor:
    found = full_logits(chunks, tokens).log_softmax(1)[prompt - 1 : -1]
    return found.gather(1, tokens[prompt:, None]).squeeze(1)


def engine_of(
    world: World, chunks: Sequence[CascadeModel], folder: Path, weights: Any, **more: Any
) -> ServerEngine:
    server = RolloutServerConfig(announce=str(folder / "servers"), weights=weights, **more)
    settings = RolloutConfig(
        engine="server", server=server, max_prompt_tokens=256, max_response_tokens=256
    )
    engine = open_engine(
        world,
        list(chunks),
        settings,
        run_dir=folder,
        decode=lambda ids: "",
        vocabulary=chunks[0].config.shape.vocab_size,
        logprobs=lambda tokens, prompt: logprobs(chunks, tokens, prompt),
        precision="fp32",
        tool_calls=1,
    )
    assert isinstance(engine, ServerEngine)
    return engine


def rollouts(engine: ServerEngine, vocabulary: int) -> list[Completion]:
    prompts = [tuple(draw_tokens(vocabulary, 5 + 11 * i, seed=i).tolist()) for i in range(8)]
    requests = [Request(2 * p + k, prompts[p]) for p in range(8) for k in range(2)]
    found = list(engine.run(requests, Sampling(max_tokens=40, seed=7)))
    assert sorted(c.request.id for c in found) == [r.id for r in requests]
    return found


def differences(found: Sequence[Completion], chunks: Sequence[CascadeModel]) -> Tensor:
    parts = []
    for c in found:
        prompt = len(c.request.prompt)
        parts.append(c.logprob[prompt:] - logprobs(chunks, c.tokens, prompt))
    return torch.cat(parts).abs()


@pytest.mark.parametrize("weights", ["gloo", "disk"])
@pytest.mark.parametrize("name", SHAPES)
def test_log_probabilities_over_updates(
    world: World, name: str, weights: str, tmp_path: Path
) -> None:
    shape = SHAPES[name]
    chunks = model(world, shape, seed=1)
    folder = export(world, chunks, tmp_path)
    with vllm_server(folder, tmp_path / "servers"):
        engine = engine_of(world, chunks, tmp_path, weights)
        for update in range(3):
            if update:
                before = rollouts(engine, shape.vocab_size)
                fill(chunks, model(world, shape, seed=1 + update))
                assert differences(before, chunks).max() > 0.1
                engine.weights_changed()
            found = differences(rollouts(engine, shape.vocab_size), chunks)
            print(
                f"{name} {weights} update {update}: mean {found.mean():.1e} max {found.max():.1e}"
            )
            print({k: round(v, 3) for k, v in engine.metrics().items()})
            assert found.mean() <= MEAN
            assert found.max() <= LARGEST
            assert engine.updates is not None
            assert engine.updates.probe <= LARGEST
        engine.close()


@pytest.mark.parametrize("resets", [True, False])
def test_the_probe_rejects_a_stale_cache(
    world: World, resets: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the reset an update passes; without it the server continues from the old weights."""
    if not resets:
        calls: dict[str, tuple[str, ...]] = {"pause": (), "resume": ()}
        monkeypatch.setitem(weight_updates._CALLS, "vllm", calls)
    shape = SHAPES["qwen3-moe"]
    chunks = model(world, shape, seed=1)
    folder = export(world, chunks, tmp_path)
    with vllm_server(folder, tmp_path / "servers", "--enable-prefix-caching"):
        engine = engine_of(world, chunks, tmp_path, "disk", pause="keep")
        assert differences(rollouts(engine, shape.vocab_size), chunks).max() <= LARGEST
        fill(chunks, model(world, shape, seed=2))
        engine.weights_changed()
        if resets:
            assert differences(rollouts(engine, shape.vocab_size), chunks).max() <= LARGEST
        else:
            with pytest.raises(ServerError, match=r"differ from the trainer's by up to 0\.\d+"):
                rollouts(engine, shape.vocab_size)
            assert engine.pool.counts["failed_updates"] == 2
        engine.close()


def test_an_abort_in_mid_answer_never_ends_a_text(world: World, tmp_path: Path) -> None:
    shape = SHAPES["nemotron"]
    chunks = model(world, shape, seed=1)
    folder = export(world, chunks, tmp_path)
    with vllm_server(folder, tmp_path / "servers"):
        engine = engine_of(world, chunks, tmp_path, "gloo", retries=5)
        rollouts(engine, shape.vocab_size)
        requests = [Request(i, (i + 3, i + 5, i + 7)) for i in range(4)]
        found: list[Completion] = []
        thread = threading.Thread(
            target=lambda: found.extend(engine.run(requests, Sampling(max_tokens=400, seed=3)))
        )
        thread.start()
        (server,) = engine.pool.use(engine.pool.named())
        for _ in range(2):
            time.sleep(1.0)
            server.call("/abort_requests", {}, 30.0)
        thread.join(300)
        print("aborted", engine.pool.counts)
        assert engine.pool.counts["aborted"] >= 1
        assert [c.finish for c in found] == ["length"] * 4
        assert {len(c.response) for c in found} == {400}
        assert differences(found, chunks).max() <= LARGEST
        engine.close()
