"""The loader: order, ranks, epochs, resume, counters, held-out pass."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.data import (
    GSM8K_TRAIN,
    needs_gsm8k,
    qa_rows,
    sentencepiece_tokenizer,
    write_jsonl,
)
from helpers.packed import check_batch

from nemocascade.data import loader as loader_module
from nemocascade.data.cache import build_cache
from nemocascade.data.documents import DocumentSet, build_data
from nemocascade.data.epoch import pack_sequence, plan_epoch
from nemocascade.data.loader import HeldoutLoader, PackedLoader
from nemocascade.data.packing import WorkModel
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import PackedBatch

CONFIG = DataConfig(capacity=512, sequences_per_step=8, balance_group=4)
ROWS = 150
PAD = 3


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> DocumentSet:
    folder = tmp_path_factory.mktemp("loader")
    path = write_jsonl(folder / "rows.jsonl", qa_rows(ROWS))
    cache = build_cache(folder, CONFIG, [str(path)], sentencepiece_tokenizer())
    return DocumentSet(cache, np.arange(len(cache)))


def _loader(documents: DocumentSet, config: DataConfig = CONFIG, **more: Any) -> PackedLoader:
    return PackedLoader(documents, config, **{"seed": 1, "pad_id": PAD} | more)


def _equal(a: PackedBatch, b: PackedBatch) -> bool:
    tensors = ("tokens", "targets", "positions", "token_weight", "cu_seqlens")
    return a.document_ids == b.document_ids and all(
        torch.equal(getattr(a, name), getattr(b, name)) for name in tensors
    )


def _same(a: list[PackedBatch], b: list[PackedBatch]) -> bool:
    return len(a) == len(b) and all(map(_equal, a, b))


@pytest.mark.parametrize("size", [2, 4, 8])
def test_a_step_trains_on_the_same_sequences_on_any_number_of_ranks(
    documents: DocumentSet, size: int
) -> None:
    alone = _loader(documents)
    ranks = [_loader(documents, dp_rank=r, dp_size=size) for r in range(size)]
    for _ in range(7):
        whole = alone.next_step()
        parts = [rank.next_step() for rank in ranks]
        assert {len(p) for p in parts} == {8 // size}
        # Micro-batch i of all ranks, side by side, is a run of the stream.
        assert _same([parts[r][i] for i in range(8 // size) for r in range(size)], whole)
        assert {rank.info for rank in ranks} == {alone.info}
        assert [rank.state_dict() for rank in ranks] == [alone.state_dict()] * size


@pytest.mark.parametrize("rows", [ROWS, 5])
def test_every_document_once_an_epoch(documents: DocumentSet, rows: int) -> None:
    """Also where a step holds several epochs."""
    some = DocumentSet(documents.cache, documents.indices[:rows])
    loader = _loader(some)
    seen: list[int] = []
    while len(seen) < 4 * rows:
        for batch in loader.next_step():
            check_batch(batch)
            assert batch.capacity == 512
            seen += batch.document_ids
    for epoch in range(4):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    assert loader.position.documents == len(seen)
    assert loader.position.epoch >= 4


def test_epochs_and_seeds_differ_and_nothing_else_does(documents: DocumentSet) -> None:
    def order(**more: Any) -> list[tuple[int, ...]]:
        loader = _loader(documents, **more)
        return [b.document_ids for _ in range(12) for b in loader.next_step()]

    first = order()
    assert first == order(prefetch=False)
    assert first != order(seed=2)
    per_epoch = next(i for i in range(2, len(first)) if sum(map(len, first[:i])) == ROWS)
    assert first[:per_epoch] != first[per_epoch : 2 * per_epoch]


@pytest.mark.parametrize("steps", [0, 1, 3, 6])
@pytest.mark.parametrize("size", [1, 2])
def test_resumed_equals_uninterrupted(documents: DocumentSet, steps: int, size: int) -> None:
    whole = _loader(documents)
    for _ in range(steps):
        whole.next_step()
    state = json.loads(json.dumps(whole.state_dict()))
    assert state["position"]["step"] == steps
    resumed = [_loader(documents, dp_rank=r, dp_size=size) for r in range(size)]
    for rank in resumed:
        # One that has already run, and holds a prefetched step, is set back all the same.
        rank.next_step()
        rank.load_state_dict(state)
        assert rank.state_dict() == state
    for _ in range(6):
        parts = [rank.next_step() for rank in resumed]
        side_by_side = [parts[r][i] for i in range(8 // size) for r in range(size)]
        assert _same(whole.next_step(), side_by_side)
        assert whole.info == resumed[0].info
    assert whole.state_dict() == resumed[0].state_dict()


def test_the_step_may_grow_on_resume(documents: DocumentSet) -> None:
    """The stream is the same; only how much a step takes of it changes."""
    small, whole = _loader(documents), _loader(documents)
    expected = [b for _ in range(4) for b in whole.next_step()]
    got = small.next_step()
    large = _loader(documents, replace(CONFIG, sequences_per_step=16))
    large.load_state_dict(small.state_dict())
    assert _same(got + large.next_step(), expected[:24])


def test_a_foreign_position_is_rejected_by_name(documents: DocumentSet) -> None:
    state = _loader(documents).state_dict()
    other = _loader(
        DocumentSet(documents.cache, documents.indices[1:]),
        replace(CONFIG, capacity=1024, over_long="drop", balance_group=2),
        seed=5,
        work=WorkModel(1.0, 0.0),
    )
    with pytest.raises(DataError) as error:
        other.load_state_dict(state)
    text = str(error.value)
    for expected in (
        "seed is 5, the checkpoint has 1",
        "documents is ",
        "data.capacity is 1024, the checkpoint has 512",
        "data.over_long is 'drop', the checkpoint has 'truncate'",
        "data.balance_group is 2, the checkpoint has 4",
        "work is [1.0, 0.0]",
    ):
        assert expected in text
    states: tuple[dict[str, Any], ...] = (
        {},
        {"made_from": {}},
        {**state, "position": {"step": 1, "page": 2}},
    )
    for broken in states:
        with pytest.raises(DataError, match="not a position in the data"):
            other.load_state_dict(broken)


def test_counters_are_those_of_the_batches(documents: DocumentSet) -> None:
    config = replace(CONFIG, capacity=128)
    loader = _loader(documents, config)
    truncated = tokens = 0
    for _ in range(6):
        batches = loader.next_step()
        info = loader.info
        assert info is not None
        assert info.tokens == sum(b.num_tokens for b in batches)
        assert info.trained_tokens == sum(b.num_trained() for b in batches)
        assert info.documents == sum(b.num_documents for b in batches)
        assert info.fill == info.tokens / (8 * 128)
        truncated += info.truncated
        tokens += info.tokens
    assert truncated == loader.position.truncated > 0
    assert tokens == loader.position.tokens


def test_batches_hold_the_documents_in_their_rows(documents: DocumentSet) -> None:
    for batch in _loader(documents, replace(CONFIG, capacity=128)).next_step():
        starts = batch.cu_seqlens.tolist()
        for number, a, b in zip(batch.document_ids, starts, starts[1:], strict=False):
            document = documents.document(number, 128)
            assert batch.tokens[a:b].tolist() == document.tokens.tolist()
            weights = batch.token_weight[a : b - 1].tolist()
            assert weights == document.trained[1:].float().tolist()
        assert torch.all(batch.tokens[batch.num_tokens :] == PAD)


def test_documents_that_are_too_long(documents: DocumentSet) -> None:
    config = replace(CONFIG, capacity=128, over_long="drop")
    long = set(np.flatnonzero(documents.lengths > 128).tolist())
    assert long
    loader = _loader(documents, config)
    seen: Counter[int] = Counter()
    while loader.position.epoch < 1:
        for batch in loader.next_step():
            seen.update(batch.document_ids)
    assert not long & set(seen)
    assert loader.position.dropped == len(long) * loader.position.epoch
    assert loader.position.truncated == 0
    for prefetch in (True, False):
        rejecting = _loader(documents, replace(config, over_long="refuse"), prefetch=prefetch)
        with pytest.raises(DataError, match=rf"{len(long)} documents are longer.*\n .*rows.jsonl:"):
            rejecting.next_step()
    with pytest.raises(DataError, match=f"all {ROWS} documents are longer"):
        _loader(documents, replace(config, capacity=4)).next_step()


def test_an_error_while_prefetching_is_raised_in_its_step(
    documents: DocumentSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Threads of loaders of other tests may still be packing: only this loader's calls count.
    mine = replace(documents)
    loader = _loader(mine)
    real, calls = pack_sequence, Counter[str]()

    def fail_later(packed: DocumentSet, *arguments: Any, **more: Any) -> PackedBatch:
        calls["packed"] += packed is mine
        if packed is mine and calls["packed"] > 8:
            raise OSError("the disk is gone")
        return real(packed, *arguments, **more)

    monkeypatch.setattr(loader_module, "pack_sequence", fail_later)
    loader.next_step()
    with pytest.raises(OSError, match="the disk is gone"):
        loader.next_step()
    assert loader.position.step == 1
    loader.close()


def test_ranks_must_share_a_step_evenly(documents: DocumentSet) -> None:
    with pytest.raises(DataError, match=r"sequences_per_step \(8\) is not a multiple of .* \(3\)"):
        _loader(documents, dp_size=3)


def test_sequences_side_by_side_have_equal_work(documents: DocumentSet) -> None:
    work = WorkModel(linear=1.0, quadratic=0.05)
    loader = _loader(documents, replace(CONFIG, capacity=1024, balance_group=4), work=work)
    waiting = []
    for _ in range(2):
        batches = loader.next_step()
        cost = [
            sum(work.linear * n + work.quadratic * n * n for n in b.cu_seqlens.diff().tolist())
            for b in batches
        ]
        waiting += [max(four) / (sum(four) / 4) for four in (cost[:4], cost[4:])]
    assert np.mean(waiting) < 1.15


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("multiple", [1, 3])
def test_the_heldout_pass_sees_every_document_once(
    documents: DocumentSet, size: int, multiple: int
) -> None:
    ranks = [
        HeldoutLoader(
            documents,
            CONFIG,
            dp_rank=r,
            dp_size=size,
            pad_id=PAD,
            microbatch_multiple=multiple,
        )
        for r in range(size)
    ]
    seen: list[int] = []
    padding = 0
    steps = list(zip(*ranks, strict=True))
    assert len(steps) == len(ranks[0])
    for step in steps:
        assert len({len(batches) for batches in step}) == 1
        assert len(step[0]) % multiple == 0
        for batch in (b for batches in step for b in batches):
            check_batch(batch)
            seen += batch.document_ids
            if not batch.document_ids:
                padding += 1
                assert (batch.num_tokens, batch.num_trained(), batch.num_documents) == (0, 0, 0)
                assert torch.all(batch.tokens == PAD)
    assert sorted(seen) == list(range(ROWS))
    again = [b.document_ids for batches in ranks[0] for b in batches]
    assert again == [b.document_ids for step in steps for b in step[0]]
    assert padding < size * multiple * len(steps)


def test_documents_that_truncation_leaves_untrained_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long = {"question": "word " * 300, "answer": "no"}
    cut = {"question": "Hi?", "answer": "yes " * 300}
    path = write_jsonl(tmp_path / "rows.jsonl", [cut, long, *qa_rows(1) * 4, long, cut])
    config = replace(CONFIG, capacity=128, path=(str(path),), heldout_rows=0)
    found = build_data(config, sentencepiece_tokenizer(), tmp_path).train
    with caplog.at_level(logging.INFO, logger="nemocascade"):
        plan = plan_epoch(found, config, WorkModel(), seed=1, epoch=0)
    said = "2 documents have no trained token among their first 128 and are dropped, first: "
    assert f"{said}{path}:2" in caplog.text
    assert plan.dropped.tolist() == [1, 6]
    assert {0, 7} <= set(plan.truncated)
    assert sorted(plan.documents.tolist()) == [n for n in range(8) if n not in (1, 6)]
    for index in range(len(plan)):
        packed = pack_sequence(found, plan, index, pad_id=PAD)
        for number in packed.document_ids:
            assert found.trained_tokens(np.array([number]), 128) > 0
    dropping = replace(config, over_long="drop")
    assert {1, 6} <= set(plan_epoch(found, dropping, WorkModel(), seed=1, epoch=0).dropped)


@pytest.mark.parametrize("field", ["path", "heldout_path"])
def test_data_that_is_all_untrained_is_rejected_when_it_is_built(
    tmp_path: Path, field: str
) -> None:
    long = write_jsonl(tmp_path / "long.jsonl", [{"question": "word " * 300, "answer": "no"}] * 3)
    short = write_jsonl(tmp_path / "short.jsonl", qa_rows(8))
    heldout = (str(long),) if field == "heldout_path" else ()
    train = long if field == "path" else short
    config = replace(CONFIG, capacity=64, path=(str(train),), heldout_path=heldout, heldout_rows=0)
    name = "training" if field == "path" else "held-out"
    with pytest.raises(DataError, match=rf"nothing to train: all 3 {name} documents .*\(64\)"):
        build_data(config, sentencepiece_tokenizer(), tmp_path)
    if field == "heldout_path":
        build_data(replace(config, over_long="drop"), sentencepiece_tokenizer(), tmp_path)


@needs_gsm8k
def test_gsm8k_fills_its_sequences(tmp_path: Path) -> None:
    config = DataConfig(capacity=8192, sequences_per_step=4, max_rows=1500)
    cache = build_cache(tmp_path, config, [str(GSM8K_TRAIN)], sentencepiece_tokenizer())
    loader = _loader(DocumentSet(cache, np.arange(1500)), config)
    fills = []
    for _ in range(8):
        loader.next_step()
        assert loader.info is not None
        fills.append(loader.info.fill)
    assert min(fills) > 0.97
