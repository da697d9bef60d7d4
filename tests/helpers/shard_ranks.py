"""Rank functions of the vocabulary-parallel test, each run in its own process."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from nemocascade_kernels import Mopd, Truncation, linear_logprob, linear_policy_loss
from nemocascade_kernels.common.linear_head import chunks
from nemocascade_kernels.testing import random_normal
from torch import Tensor

from helpers.heads import Head, device_for, evaluate, make_head, make_objective
from helpers.interpreter import accelerate

SHAPE = (37, 16, 262)  # two shards of 131


def run_rank(folder: str, cases: list[tuple[str, str]]) -> None:
    """Evaluate each case, a backend and a dtype, on this rank's shard; save what came out."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    if any(backend == "triton" for backend, _ in cases):
        accelerate(load=True)
    try:
        found = [_run(rank, world, backend, getattr(torch, dtype)) for backend, dtype in cases]
        torch.save(found, Path(folder) / f"rank{rank}.pt")
    finally:
        dist.destroy_process_group()


def _run(rank: int, world: int, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    group = dist.group.WORLD
    whole = make_head(*SHAPE, dtype=dtype, device=device_for(backend))
    shard = SHAPE[2] // world
    head = Head(whole.hidden, whole.weight[rank * shard : (rank + 1) * shard], whole.target)
    # Several chunks, two of them in flight.
    chunks.LOGITS_BYTES = {"cpu": 2 * 6 * shard * dtype.itemsize}
    objective = make_objective("mopd", SHAPE[0], head.hidden.device, trained=0.7)
    assert isinstance(objective, Mopd)
    found = evaluate(head, objective, backend, tp_group=group, temperature=0.8)._asdict()

    hidden, weight = head.leaves()
    out = linear_logprob(
        hidden, weight, head.target, return_entropy=True, tp_group=group, backend=backend
    )
    assert out.entropy is not None
    mix = random_normal(SHAPE[0], seed=5) * out.logprob + 0.5 * out.entropy
    mix.sum().backward()
    found |= {
        "row_logprob": out.logprob.detach(),
        "row_entropy": out.entropy.detach(),
        "row_hidden_grad": hidden.grad,
        "row_weight_grad": weight.grad,
    }

    hidden, weight = head.leaves()
    linear_policy_loss(
        hidden, weight, head.target, objective, tp_group=group, temperature=0.8,
        reduce_hidden_grad=False, backend=backend,
    ).loss.backward()  # fmt: skip
    cut = evaluate(
        head, objective, backend, tp_group=group, temperature=0.8, truncation=truncation_for(dtype)
    )
    found |= {f"cut_{name}": value for name, value in cut._asdict().items()}
    return found | {"partial_hidden_grad": hidden.grad}


def truncation_for(dtype: torch.dtype) -> Truncation:
    """Tokens from both shards. In bfloat16 ids alone decide: a product of another shape rounds
    otherwise."""
    return Truncation(60, 0.9, 250) if dtype == torch.float32 else Truncation(vocabulary=200)
