"""Rules of a packed batch."""

from __future__ import annotations

import itertools
from dataclasses import fields

import torch
from torch import Tensor

from nemocascade.types import PackedBatch


def check_batch(batch: PackedBatch) -> None:
    """Raise AssertionError naming every broken rule of the layout."""
    problems = []
    cu = batch.cu_seqlens.tolist()
    if cu[:1] != [0] or cu[-1] != batch.capacity:
        problems.append(f"cu_seqlens runs {cu[:1]}..{cu[-1:]}, it must run 0..{batch.capacity}")
    if any(b <= a for a, b in itertools.pairwise(cu)):
        problems.append("cu_seqlens must rise: an empty document is not allowed")
    for f in fields(batch):
        value = getattr(batch, f.name)
        counted = isinstance(value, Tensor) and f.name != "cu_seqlens"
        if counted and value.shape != batch.tokens.shape:
            rows = batch.tokens.numel()
            problems.append(f"{f.name} has shape {tuple(value.shape)}, not [{rows}]")
    if not problems:
        ends = set(cu[1:])
        trained = (batch.token_weight != 0).nonzero().flatten()
        places = torch.cat([torch.arange(s.start, s.stop) for s in batch.segments])
        if ends & set((places[trained] + 1).tolist()):
            problems.append("a document's last row has no target, so its weight must be 0")
        if bool((batch.token_weight[batch.num_own_tokens :] != 0).any()):
            problems.append("padding must have weight 0")
    assert not problems, "; ".join(problems)
