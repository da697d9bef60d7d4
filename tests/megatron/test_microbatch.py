"""Copies of a packed batch to its device."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from helpers.packed import check_batch
from helpers.transfers import Transfers
from torch import Tensor

from nemocascade.megatron.context import ContextShard
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


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize(
    "lengths", [(48,), (5, 20, 1, 1, 7), (12, 12, 12, 12), (1,) * 48, (24, 2), (9,), ()], ids=str
)
def test_the_shards_of_a_pack(lengths: tuple[int, ...], size: int) -> None:
    """Every row is on one rank, with its own constants, position, document and keys."""
    documents = [
        Document(torch.full((n,), i), torch.ones(n, dtype=torch.bool), "x")
        for i, n in enumerate(lengths)
    ]
    whole = replace(pack_documents(documents, 48, pad_id=99), advantage=torch.randn(48))
    check_batch(whole)
    seen: list[int] = []
    for rank in range(size):
        own = whole.shard(rank, size)
        check_batch(own)
        rows = [row for s in own.segments for row in range(s.start, s.stop)]
        seen += rows
        assert own.capacity == 48
        assert torch.equal(own.tokens, whole.tokens[rows])
        assert own.advantage is not None
        assert whole.advantage is not None
        assert torch.equal(own.advantage, whole.advantage[rows])
        assert own.num_own_tokens == sum(row < whole.num_tokens for row in rows)
        shard = ContextShard(own, torch.device("cpu"))
        real = own.num_own_tokens
        assert torch.equal(shard.positions[:real], own.positions[:real])
        bounds = own.own_cu_seqlens().tolist()
        for number in range(len(lengths)):
            ids = own.tokens[bounds[number] : bounds[number + 1]]
            assert ids.numel() == (own.tokens == number).sum()
            assert bool((ids == number).all())
        for part, keys in zip(shard.parts, shard.keys, strict=True):
            attended = whole.tokens[keys.rows]
            for mine, theirs in zip(
                keys.queries.documents(), keys.documents.documents(), strict=True
            ):
                document = set(own.tokens[part.rows][mine].tolist())
                assert set(attended[theirs].tolist()) == document
                assert len(document) == 1
    assert sorted(seen) == list(range(48))


def test_the_shards_of_a_million_tokens() -> None:
    """No index or position is cut to 32 bits, and none of the work grows with the square."""
    document = Document(torch.zeros(2**20, dtype=torch.int32), torch.ones(2**20).bool(), "x")
    own = pack_documents([document], 2**20).shard(0, 8)
    shard = ContextShard(own, torch.device("cpu"))
    assert torch.equal(shard.positions, own.positions)
    assert int(shard.positions[-1]) == 2**20 - 1
    assert shard.parts[1].before == 15 * 2**16
    assert shard.keys[1].documents.total == 2**20
    assert [t.dtype for t in (own.tokens, own.positions, own.own_cu_seqlens())] == [torch.int64] * 3


def test_a_pack_that_cannot_be_cut_is_named() -> None:
    with pytest.raises(ValueError, match="16 rows on 1 ranks cannot be cut into 2 x 3"):
        batch().shard(0, 3)
    with pytest.raises(ValueError, match="on 2 ranks cannot be cut"):
        batch().shard(0, 2).shard(0, 2)
