"""The FLOP count of a training step against torch's own counter, term by term.

The counter runs on transformers' NemotronH, whose operations are all plain matrix products. It
counts executed operations, which differ from our count in these ways, each stated exactly:

- attention: all of Q K^T and P V; we count the causal half;
- scan, within chunks: all of C B^T, once per head instead of per group, and all of its product
  with x; we count the causal half, once per group;
- scan, between chunks: a matrix product over all pairs of chunks; we count none, since the
  recurrence costs one multiply-add per state and chunk;
- convolution: K - 1 rows of padding;
- LM head: every row; we count the trained rows.

torch's formula for the backward of a depthwise convolution ignores that it is depthwise, so the
backward is checked on matrix products only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.transformers_weights import nemotron_h
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import build_model
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    ModelConfig,
    MoeTrainingConfig,
    ParallelConfig,
    nemotron3_nano_30b,
    tiny,
)
from nemocascade.runtime.world import World
from nemocascade.train.flops import batch_flops, layer_flops, peak_tflops, step_flops
from nemocascade.types import Document, PackedBatch, pack_documents

pytest.importorskip("transformers")

CHUNKS, CHUNK = 3, 32
LENGTH = CHUNKS * CHUNK
SHAPE = replace(tiny(), pattern="ME*-", vocab_size=96, mamba_chunk=CHUNK, mamba_conv=3)


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    model: Any = nemotron_h(SHAPE)
    # Plain products: the counter does not know torch's attention and grouped products on CPUs.
    model.set_attn_implementation("eager")
    model.set_experts_implementation("eager")
    found: nn.Module = model
    return found


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


def counted(work: Callable[[], Any]) -> dict[str, dict[str, int]]:
    """FLOPs by module, named from the model on or "Global", and by kind of product."""
    with FlopCounterMode(display=False) as counter:
        work()
    return {
        module.split(".", 1)[-1]: {str(op).removeprefix("aten."): n for op, n in ops.items()}
        for module, ops in counter.get_flop_counts().items()
    }


def forward(model: nn.Module) -> torch.Tensor:
    logits: torch.Tensor = model(torch.zeros(1, LENGTH, dtype=torch.int64)).logits
    return logits


def causal_excess(symbol: str) -> int:
    """FLOPs of attention or scan that the counter sees beyond ours, forward."""
    m = SHAPE
    if symbol == "*":
        return 2 * m.num_heads * m.head_dim * LENGTH**2
    if symbol == "M":
        scores = CHUNK * m.mamba_state * (2 * m.mamba_heads - m.mamba_groups)
        between = 2 * (CHUNKS + 1) ** 2 * m.mamba_inner * m.mamba_state
        return LENGTH * (scores + CHUNK * m.mamba_inner) + between
    return 0


def convolution(rows: int) -> int:
    width = SHAPE.mamba_inner + 2 * SHAPE.mamba_groups * SHAPE.mamba_state
    return 2 * width * SHAPE.mamba_conv * rows


@pytest.mark.parametrize("symbol", SHAPE.pattern)
def test_each_kind_of_layer_counts_what_the_counter_sees(theirs: nn.Module, symbol: str) -> None:
    seen = counted(lambda: forward(theirs))[f"model.layers.{SHAPE.pattern.index(symbol)}"]
    expected = layer_flops(SHAPE, symbol, LENGTH) + causal_excess(symbol)
    if symbol == "M":
        assert seen.pop("convolution") == convolution(LENGTH + SHAPE.mamba_conv - 1)
        expected -= convolution(LENGTH)
    assert sum(seen.values()) == expected


def test_a_training_step_is_three_forward_passes(theirs: nn.Module) -> None:
    seen = counted(lambda: forward(theirs).sum().backward())["Global"]
    excess = sum(causal_excess(symbol) for symbol in SHAPE.pattern) - convolution(LENGTH)
    expected = step_flops(SHAPE, [LENGTH], trained_tokens=LENGTH) + 3 * excess
    assert seen["mm"] + seen["bmm"] == expected


def pack(lengths: list[int], capacity: int, trained: float = 1.0) -> PackedBatch:
    random = torch.Generator().manual_seed(0)
    documents = [
        Document(
            tokens=torch.zeros(n, dtype=torch.int32),
            trained=torch.rand(n, generator=random) < trained,
            source="test",
        )
        for n in lengths
    ]
    return pack_documents(documents, capacity)


def test_our_model_runs_the_products_that_are_counted(world: World) -> None:
    """Linears and LM head of our own model, whose widths could differ from transformers'."""
    config = make_config(
        SHAPE, world.parallel, EngineConfig(precision="fp32"), MoeTrainingConfig(), seed=0
    )
    [model] = build_model(world, config, Accelerators())
    batch = pack([LENGTH], LENGTH, trained=0.5)
    packed = Microbatch.from_batch(batch, world.device)
    seen = counted(lambda: model(packed))
    m, hidden = SHAPE, SHAPE.hidden_size
    inner, states = m.mamba_inner, m.mamba_groups * m.mamba_state
    queries, keys = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    widths = {
        "0.mixer.in_proj": (hidden, 2 * inner + 2 * states + m.mamba_heads),
        "0.mixer.out_proj": (inner, hidden),
        "1.mixer.router": (hidden, m.num_experts),
        "1.mixer.shared_experts": (2 * hidden, m.shared_expert_width),
        "2.mixer.linear_qkv": (hidden, queries + 2 * keys),
        "2.mixer.linear_proj": (queries, hidden),
        "3.mixer": (2 * hidden, m.mlp_width),
    }
    for name, (rows, columns) in widths.items():
        assert seen[f"decoder.layers.{name}"] == {"mm": 2 * LENGTH * rows * columns}, name


def test_packing_and_padding_cost_what_the_documents_cost() -> None:
    lengths = [40, 7, 33]
    batch = pack(lengths, sum(lengths))
    trained = sum(lengths) - len(lengths)
    expected = step_flops(SHAPE, lengths, trained)
    assert batch_flops(SHAPE, batch) == expected
    assert batch_flops(SHAPE, pack(lengths, sum(lengths) + 50)) == expected
    alone = [batch_flops(SHAPE, pack([n], n)) for n in lengths]
    assert sum(alone) == pytest.approx(expected, rel=1e-12)
    assert step_flops(SHAPE, [sum(lengths)], trained) > expected


def test_rows_that_do_not_train_cost_no_lm_head() -> None:
    whole, part = pack([LENGTH], LENGTH), pack([LENGTH], LENGTH, trained=0.5)
    untrained = whole.num_trained() - part.num_trained()
    assert untrained > 10
    saved = batch_flops(SHAPE, whole) - batch_flops(SHAPE, part)
    assert saved == 6 * SHAPE.hidden_size * SHAPE.vocab_size * untrained


def test_gated_activations_have_a_third_matrix() -> None:
    gated = replace(SHAPE, activation="swiglu")
    assert layer_flops(gated, "-", 5) == 1.5 * layer_flops(SHAPE, "-", 5)
    router = 5 * 2 * SHAPE.hidden_size * SHAPE.num_experts
    assert layer_flops(gated, "E", 5) - router == 1.5 * (layer_flops(SHAPE, "E", 5) - router)


def test_nemotron_3_nano_costs_what_its_true_mamba_width_gives() -> None:
    """20.8 GFLOP a token at 8192 tokens, with an inner width of 4096 and not of 2 x 2688."""
    model: ModelConfig = nemotron3_nano_30b()
    per_token = step_flops(model, [8192], 8192) / 8192
    assert per_token / 1e9 == pytest.approx(20.8, abs=0.05)


def test_the_peak_of_a_cpu_is_not_known() -> None:
    assert peak_tflops(torch.device("cpu")) is None
