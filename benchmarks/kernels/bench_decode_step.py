"""Benchmark of the decode steps against the same steps in plain torch, for two models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from nemocascade_kernels import (
    MambaWeights,
    step_attention,
    step_draw,
    step_experts,
    step_linear,
    step_mamba,
)
from nemocascade_kernels.testing import random_normal
from torch import Tensor

from benchmarks.measure import Case, Goal, Row

PEER = "plain torch"


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model's layers: see `nemocascade.recipe.ModelConfig`."""

    hidden: int
    mamba: tuple[int, int, int, int]  # heads, head dimension, groups, state
    attention: tuple[int, int, int]  # query heads, key/value heads, head dimension
    experts: tuple[int, int, int]  # experts, experts per token, width
    vocabulary: int


SIZES = {
    "tiny": Sizes(128, (8, 32, 2, 32), (4, 2, 32), (8, 2, 128), 2048),
    "small": Sizes(512, (16, 64, 4, 64), (8, 2, 64), (32, 4, 512), 16_384),
}
PAST = 512
BLOCK = 16  # tokens of a block of the KV cache


def cases(suite: str, device: torch.device, tiny: bool) -> list[Case]:
    """Every step, with 1 and with 64 rows, on a CPU."""
    if suite == "gpu":
        return []
    found = []
    for name, sizes in SIZES.items():
        if tiny and name != "tiny":
            continue
        for rows in (1, 64):
            for step, make in STEPS.items():
                settings = {"rows": rows, "model": name, "past": PAST, "dtype": "float32"}
                found.append(make_case(f"{step} {name}/{rows}", settings, make, sizes, rows))
    return found


Make = Callable[[Sizes, int, str | None], Callable[[], Tensor]]


def make_case(
    name: str, settings: Mapping[str, object], make: Make, sizes: Sizes, rows: int
) -> Case:
    return Case(
        name,
        settings,
        [
            Row("ours", "ours", lambda: make(sizes, rows, None)),
            Row(PEER, "peer", lambda: make(sizes, rows, "reference")),
        ],
        [Goal("not slower than torch", "ours", 1.0, PEER)],
        calls=10,
        agree=1e-4,
    )


def linear(sizes: Sizes, rows: int, backend: str | None) -> Callable[[], Tensor]:
    x = random_normal(rows, sizes.hidden, seed=1)
    weight = random_normal(5 * sizes.hidden, sizes.hidden, seed=2)
    return lambda: step_linear(x, weight, backend=backend)


def experts(sizes: Sizes, rows: int, backend: str | None) -> Callable[[], Tensor]:
    count, top_k, width = sizes.experts
    x = random_normal(rows, sizes.hidden, seed=1)
    w_up = random_normal(count, width, sizes.hidden, seed=2, scale=sizes.hidden**-0.5)
    w_down = random_normal(count, sizes.hidden, width, seed=3, scale=width**-0.5)
    chosen = random_normal(rows, count, seed=4).topk(top_k).indices.int()
    weights = random_normal(rows, top_k, seed=5).abs()
    return lambda: step_experts(x, chosen, weights, w_up, w_down, backend=backend)


def mamba(sizes: Sizes, rows: int, backend: str | None) -> Callable[[], Tensor]:
    heads, head_dim, groups, state = sizes.mamba
    inner = heads * head_dim
    channels = inner + 2 * groups * state
    weights = MambaWeights(
        conv_weight=random_normal(channels, 4, seed=1),
        conv_bias=random_normal(channels, seed=2),
        dt_bias=random_normal(heads, seed=3) - 4,
        A=-random_normal(heads, seed=4).abs(),
        D=random_normal(heads, seed=5),
        norm_weight=random_normal(inner, seed=6),
        groups=groups,
        dt_limit=(0.0, float("inf")),
        eps=1e-5,
    )
    zxbcdt = random_normal(rows, inner + channels + heads, seed=7)
    conv, ssm = torch.zeros(rows, 3, channels), torch.zeros(rows, heads, head_dim, state)
    slots = torch.arange(rows)
    return lambda: step_mamba(zxbcdt, conv, ssm, slots, weights, backend=backend)


def attention(sizes: Sizes, rows: int, backend: str | None) -> Callable[[], Tensor]:
    heads, kv_heads, dim = sizes.attention
    q = random_normal(rows, heads, dim, seed=1)
    k, v = random_normal(2, rows, kv_heads, dim, seed=2)
    columns = PAST // BLOCK + 1
    keys, values = random_normal(2, rows * columns, kv_heads, BLOCK, dim, seed=3)
    table = torch.arange(rows * columns, dtype=torch.int32).view(rows, columns)
    slots, cached = torch.arange(rows), torch.full((rows,), PAST)
    return lambda: step_attention(
        q, k, v, keys, values, table, slots, cached, PAST + 1, backend=backend
    )


def draw(sizes: Sizes, rows: int, backend: str | None) -> Callable[[], Tensor]:
    logits = random_normal(rows, sizes.vocabulary, seed=1)
    u = torch.rand(rows, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return lambda: step_draw(logits, u, backend=backend)[1]


STEPS: dict[str, Make] = {
    "linear": linear,
    "experts": experts,
    "mamba": mamba,
    "attention": attention,
    "draw": draw,
}
