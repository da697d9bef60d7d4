"""Split of a pack into chunks."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import LENGTHS, documents, pack
from helpers.transfers import Transfers
from nemocascade_kernels import PackedSeq
from nemocascade_kernels.mamba2.chunks import ChunkBlock, _on_device, chunk_table


def blocks_of(packed: PackedSeq, size: int, block_slots: int) -> list[ChunkBlock]:
    table = chunk_table(packed, size, block_slots)
    return [block for run in table.runs for block in run.blocks]


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (200,), (1,) * 40, (32, 32, 64), (300, 1, 299)])
@pytest.mark.parametrize("size", [1, 4, 32])
@pytest.mark.parametrize("block_slots", [1, 40, 10_000])
def test_chunks_cover_each_token_once_and_no_boundary(
    lengths: tuple[int, ...], size: int, block_slots: int
) -> None:
    packed = pack(lengths)
    owner = packed.document_of()
    seen = torch.zeros(packed.total, dtype=torch.int64)
    for block in blocks_of(packed, size, block_slots):
        rows = block.rows.view(block.count, block.size)
        assert bool((owner[rows] == owner[rows[:, :1]]).all()), "a chunk crosses a boundary"
        slots = torch.arange(rows.numel()) if block.used_slots is None else block.used_slots
        assert torch.equal(block.rows[slots], block.used_rows)
        pads = 0 if block.pad_slots is None else block.pad_slots.numel()
        assert pads + slots.numel() == rows.numel()
        seen.index_add_(0, block.used_rows, torch.ones_like(block.used_rows))
    assert bool((seen == 1).all())


@pytest.mark.parametrize("block_slots", [1, 40, 10_000])
def test_every_chunk_enters_from_the_rows_before_it(block_slots: int) -> None:
    packed = pack((130, 1, 70, 33, 32, 200))
    size = 16
    ends: dict[int, int] = {}  # body chunk -> its last row
    previous: dict[int, int] = {}  # body chunk -> the body chunk before it
    starts = {document.start for document in documents(packed)}
    for block in blocks_of(packed, size, block_slots):
        rows = block.rows.view(block.count, block.size)
        if block.body is not None:
            for chunk, end in zip(
                range(block.body.start, block.body.stop), rows[:, -1], strict=True
            ):
                ends[chunk] = int(end)
        for i in range(block.count):
            first = int(rows[i, 0])
            if block.enter is None:
                assert first in starts
            else:
                before = int(block.enter[i])
                assert ends[before] == first - 1
                if block.body is not None:
                    previous[block.body.start + i] = before
        carried: dict[int, int] = {}
        for carry in block.carries:
            now, before_slice = carry.slices
            assert now.start >= before_slice.stop, "a step reads what it has not made"
            carried.update(
                zip(
                    range(now.start, now.stop),
                    range(before_slice.start, before_slice.stop),
                    strict=True,
                )
            )
        if block.body is not None and block.enter is not None:
            mine = range(block.body.start, block.body.stop)
            assert carried == {chunk: previous[chunk] for chunk in mine}
    assert len(ends) == chunk_table(packed, size, block_slots).num_body


def test_short_documents_waste_little() -> None:
    packed = pack((5,) * 500)
    slots = sum(block.rows.numel() for block in blocks_of(packed, 32, 512))
    assert slots == 500 * 8


def test_the_table_is_made_once() -> None:
    packed = pack(LENGTHS)
    assert chunk_table(packed, 16, 64) is chunk_table(packed, 16, 64)


def test_a_table_reaches_a_gpu_in_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    table = chunk_table(pack(LENGTHS), 32, 40)
    assert sum(len(run.blocks) for run in table.runs) > 10
    transfers = Transfers(monkeypatch)
    moved = _on_device(table, torch.device("cuda", 0))
    assert transfers.copies == [True]
    assert moved.num_body == table.num_body
    received = moved.runs[0].rows.untyped_storage().data_ptr()

    def assert_moved(found: object, expected: object) -> None:
        for name, value in vars(expected).items():
            other = getattr(found, name)
            if isinstance(value, torch.Tensor):
                assert torch.equal(other, value), name
                assert other.untyped_storage().data_ptr() == received, name
            elif name != "blocks":
                assert other == value, name

    for mine, run in zip(moved.runs, table.runs, strict=True):
        assert_moved(mine, run)
        for own, block in zip(mine.blocks, run.blocks, strict=True):
            assert_moved(own, block)
