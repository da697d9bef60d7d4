"""Copies of a packed batch to its device."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from helpers.transfers import Transfers
from torch import Tensor

from nemocascade.megatron.layers.rope import rotary_tables
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.replay import RouteReplay
from nemocascade.recipe import tiny
from nemocascade.types import Document, PackedBatch, pack_documents

CUDA = torch.device("cuda", 0)


def batch() -> PackedBatch:
    documents = [Document(torch.arange(n), torch.ones(n, dtype=torch.bool), "x") for n in (5, 9)]
    packed = pack_documents(documents, 16)
    return replace(packed, advantage=torch.randn(16), rollout_logprob=torch.randn(16))


def test_the_host_waits_for_no_copy_to_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor is copied once; the documents' boundaries are those of the batch."""
    host = batch()
    tensors = {f.name: t for f in fields(host) if isinstance(t := getattr(host, f.name), Tensor)}
    transfers = Transfers(monkeypatch)
    packed = Microbatch.from_batch(host, CUDA)
    assert transfers.copies == [True] * len(tensors)
    assert packed.batch is not None
    assert packed.cu_seqlens is packed.batch.cu_seqlens
    for name, value in tensors.items():
        assert torch.equal(getattr(packed.batch, name), value), name


def test_tables_of_a_micro_batch_are_copied_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(tiny(), pattern="ME")
    packed = Microbatch.from_batch(batch(), torch.device("cpu"))
    cos, sin = rotary_tables(packed, 8, 1e4)
    choices = torch.randint(0, shape.num_experts, (16, 1, shape.experts_per_token))
    monkeypatch.setattr(Microbatch, "device", CUDA)
    transfers = Transfers(monkeypatch)
    packed._cache.clear()
    tables = rotary_tables(packed, 8, 1e4)
    replay = RouteReplay.from_choices(shape, choices, 14, CUDA)
    assert transfers.copies == [True, True]
    assert torch.equal(tables[0], cos)
    assert torch.equal(tables[1], sin)
    assert torch.equal(replay.choices.long(), choices)
