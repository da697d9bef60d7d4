"""Rollouts laid into packed batches, with the constants of their objective beside each token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemocascade.data.packing import WorkModel, plan_packing
from nemocascade.types import Document, PackedBatch, pack_documents


@dataclass(frozen=True, eq=False)
class TrainingSequence:
    """One rollout as training sees it; tensors are by token, [n].

    tokens: int64. written: bool, by the model. logprob: float32, of the rollout. weight: of each
    written token; 0 = the sequence does not train. advantage: of each written token.
    domain: of its task.
    """

    tokens: Tensor
    written: Tensor
    logprob: Tensor
    weight: float
    advantage: float = 0.0
    domain: str = ""


def lay_out(
    sequences: Sequence[TrainingSequence],
    capacity: int,
    *,
    ranks: int,
    multiple: int = 1,
    balance_group: int = 16,
) -> list[list[list[int]]]:
    """Which sequences stand in which micro-batch: by rank, then by micro-batch, their indices.

    The packing depends on the sequences alone. ranks: data-parallel ranks, which all get the same
    number of micro-batches, a multiple of `multiple`; some may be empty.
    """
    lengths = [s.tokens.numel() for s in sequences]
    plan = plan_packing(
        lengths,
        capacity,
        group=balance_group,
        work=WorkModel(),
        seed=0,
        over_long="refuse",
    )
    bins = [plan.bin(i).tolist() for i in range(len(plan))]
    rounds = max(1, -(-len(bins) // (ranks * multiple))) * multiple
    bins += [[] for _ in range(rounds * ranks - len(bins))]
    return [bins[rank::ranks] for rank in range(ranks)]


def pack_sequences(
    chosen: Sequence[TrainingSequence],
    capacity: int,
    pad_id: int,
    document_ids: Sequence[int] = (),
) -> PackedBatch:
    """One micro-batch. A row's constants are those of the token that it predicts."""
    documents = [Document(s.tokens.int(), s.written, "rollout") for s in chosen]
    batch = pack_documents(documents, capacity, pad_id=pad_id, document_ids=document_ids)
    weight, advantage, rollout = (torch.zeros(capacity) for _ in range(3))
    start = 0
    for s in chosen:
        rows = slice(start, start + s.tokens.numel() - 1)
        written = s.written[1:].float()
        weight[rows] = s.weight * written
        advantage[rows] = s.advantage * written
        rollout[rows] = s.logprob[1:]
        start += s.tokens.numel()
    return replace(batch, token_weight=weight, advantage=advantage, rollout_logprob=rollout)
