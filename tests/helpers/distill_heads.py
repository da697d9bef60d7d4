"""Problems of two linear heads, and the results of `linear_distill_loss` to compare."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from nemocascade_kernels import DIVERGENCES, Divergence, linear_distill_loss
from nemocascade_kernels.common.linear_head import chunks
from nemocascade_kernels.testing import PoisonedMemory, random_integers, random_normal
from torch import Tensor

from helpers.heads import device_for
from helpers.interpreter import accelerate

RANK_SHAPE = (37, 16, 12, 262)
"""T, H, G, V of the test on two ranks: two shards of 131."""


@dataclass(frozen=True)
class TwoHeads:
    """hidden [T, H], weight [V, H], teacher_hidden [T, G], teacher_weight [V, G], in the dtype
    under test; token_weight [T] float32, target [T]."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    token_weight: Tensor
    target: Tensor


def make_heads(
    tokens: int,
    width: int,
    teacher_width: int,
    vocabulary: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    trained: float = 1.0,
) -> TwoHeads:
    """Logits of standard deviation about 2; a fraction `trained` of the rows has a weight."""

    def normal(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
        return random_normal(*shape, seed=seed, dtype=dtype, device=device, scale=scale)

    drawn = torch.rand(tokens, generator=torch.Generator().manual_seed(9)) < trained
    weight = torch.where(drawn, random_normal(tokens, seed=5).abs() + 0.1, 0.0)
    return TwoHeads(
        normal(0, tokens, width),
        normal(1, vocabulary, width, scale=2 * width**-0.5),
        normal(2, tokens, teacher_width),
        normal(3, vocabulary, teacher_width, scale=2 * teacher_width**-0.5),
        weight.to(device),
        random_integers(tokens, high=vocabulary, seed=4, device=device),
    )


class Distilled(NamedTuple):
    """Results of one evaluation."""

    loss: Tensor
    divergence: Tensor
    logprob: Tensor
    hidden_grad: Tensor
    weight_grad: Tensor


def distilled(
    heads: TwoHeads,
    divergence: Divergence,
    backend: str,
    dtype: torch.dtype | None = None,
    upstream: float = 1.0,
    **settings: Any,
) -> Distilled:
    """Loss, rows and gradients, in another dtype if one is given, on poisoned memory."""
    dtype = dtype or heads.hidden.dtype
    hidden, weight = (
        t.detach().to(dtype, copy=True).requires_grad_() for t in (heads.hidden, heads.weight)
    )
    with PoisonedMemory():
        out = linear_distill_loss(
            hidden,
            weight,
            heads.teacher_hidden.to(dtype),
            heads.teacher_weight.to(dtype),
            heads.token_weight,
            divergence=divergence,
            target=heads.target,
            backend=backend,
            **settings,
        )
        (out.loss * upstream).backward()
    assert out.logprob is not None
    assert hidden.grad is not None
    assert weight.grad is not None
    return Distilled(out.loss.detach(), out.divergence, out.logprob, hidden.grad, weight.grad)


def run_distill_rank(folder: str, backends: list[str]) -> None:
    """Evaluate each backend and divergence on this rank's shard; save what came out."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if "triton" in backends:
        accelerate(load=True)
    try:
        found = {
            f"{backend}-{kind}": _on_shard(rank, world, backend, kind)
            for backend in backends
            for kind in DIVERGENCES
        }
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def _on_shard(rank: int, world: int, backend: str, kind: Divergence) -> dict[str, Tensor]:
    whole = make_heads(*RANK_SHAPE, device=device_for(backend), trained=0.7)
    shard = RANK_SHAPE[3] // world
    mine = slice(rank * shard, (rank + 1) * shard)
    heads = TwoHeads(
        whole.hidden,
        whole.weight[mine],
        whole.teacher_hidden,
        whole.teacher_weight[mine],
        whole.token_weight,
        whole.target,
    )
    # Several chunks, two of them in flight.
    chunks.LOGITS_BYTES = {"cpu": 4 * 6 * shard * 4}
    group = dist.group.WORLD
    found = distilled(heads, kind, backend, tp_group=group, temperature=0.8)._asdict()
    part = distilled(
        heads, kind, backend, tp_group=group, temperature=0.8, reduce_hidden_grad=False
    )
    return found | {"partial_hidden_grad": part.hidden_grad}
