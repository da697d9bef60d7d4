"""Split of a pack into chunks."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import LENGTHS, documents, pack
from helpers.transfers import Transfers
from nemocascade_kernels import PackedSeq
from nemocascade_kernels.mamba2.chunks import ChunkBlock, _on_device, chunk_table


def blocks_of(packed: PackedSeq, size: int, block_slots: int, widest: int = 1) -> list[ChunkBlock]:
    table = chunk_table(packed, size, block_slots, widest=widest)
    return [block for run in table.runs for block in run.blocks]


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (200,), (1,) * 40, (32, 32, 64), (300, 1, 299)])
@pytest.mark.parametrize("size", [1, 4, 32])
@pytest.mark.parametrize("block_slots", [1, 40, 10_000])
@pytest.mark.parametrize("widest", [1, 32])
def test_chunks_cover_each_token_once_and_no_boundary(
    lengths: tuple[int, ...], size: int, block_slots: int, widest: int
) -> None:
    packed = pack(lengths)
    owner = packed.document_of()
    seen = torch.zeros(packed.total, dtype=torch.int64)
    for block in blocks_of(packed, size, block_slots, widest):
        rows = block.rows.view(block.count, block.size)
        assert bool((owner[rows] == owner[rows[:, :1]]).all()), "a chunk crosses a boundary"
        slots = torch.arange(rows.numel()) if block.used_slots is None else block.used_slots
        assert torch.equal(block.rows[slots], block.used_rows)
        pads = 0 if block.pad_slots is None else block.pad_slots.numel()
        assert pads + slots.numel() == rows.numel()
        seen.index_add_(0, block.used_rows, torch.ones_like(block.used_rows))
    assert bool((seen == 1).all())


def carried(block: ChunkBlock) -> dict[int, int]:
    """The chunk before each of the block's, by the steps of its recurrence."""
    found: dict[int, int] = {}
    for carry in block.carries:
        chunks = range(carry.chunks.start, carry.chunks.stop)
        if isinstance(carry.before, slice):
            assert carry.chunks.start >= carry.before.stop, "a step reads what it has not made"
            before = list(range(carry.before.start, carry.before.stop, carry.before.step))
        else:
            before = carry.before.tolist()
        assert len(before) == carry.count
        for segment, entering in enumerate(before):
            own = chunks[segment * carry.width : (segment + 1) * carry.width]
            found.update(zip(own, (entering, *own[:-1]), strict=True))
    return found


@pytest.mark.parametrize("block_slots", [1, 40, 200, 10_000])
@pytest.mark.parametrize("widest", [1, 2, 32])
def test_every_chunk_enters_from_the_rows_before_it(block_slots: int, widest: int) -> None:
    packed = pack((130, 1, 70, 33, 32, 200, 1000, 520))
    size = 16
    ends: dict[int, int] = {}  # body chunk -> its last row
    starts = {document.start for document in documents(packed)}
    for block in blocks_of(packed, size, block_slots, widest):
        rows = block.rows.view(block.count, block.size)
        entered = {}  # body chunk of the block -> the body chunk before it
        for i in range(block.count):
            chunk = None if block.body is None else block.body.start + i
            if chunk is not None:
                ends[chunk] = int(rows[i, -1])
            if block.enter is None:
                assert int(rows[i, 0]) in starts
            else:
                before = int(block.enter[i])
                assert ends[before] == int(rows[i, 0]) - 1
                if chunk is not None:
                    entered[chunk] = before
        assert carried(block) == entered
    assert len(ends) == chunk_table(packed, size, block_slots, widest=widest).num_body


def test_long_documents_take_few_steps() -> None:
    """A step a segment, not a step a chunk."""
    blocks = blocks_of(pack((16_000, 5_000)), 16, 512, widest=32)
    assert sum(len(block.carries) for block in blocks) < 80
    assert max(carry.width for block in blocks for carry in block.carries) == 32


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
