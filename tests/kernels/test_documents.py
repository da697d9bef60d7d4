"""The description of a pack."""

from __future__ import annotations

import pytest
import torch
from helpers.layers import LENGTHS, pack
from nemocascade_kernels import PackedSeq


def test_describes_documents() -> None:
    packed = PackedSeq.from_cu_seqlens(torch.tensor([0, 3, 4, 9], dtype=torch.int32))
    assert (packed.total, packed.max_length, packed.num_documents) == (9, 5, 3)
    assert packed.cu_seqlens.dtype == torch.int32
    assert packed.document_of().tolist() == [0, 0, 0, 1, 2, 2, 2, 2, 2]
    assert packed.positions().tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("cu_seqlens", "rule"),
    [
        ([1, 5], "begin with 0"),
        ([0], r"\[D\+1\]"),
        ([[0, 1]], r"\[D\+1\]"),
        ([0, 4, 4, 6], "document 1 of cu_seqlens has length 0"),
        ([0, 4, 3], "document 1 of cu_seqlens has length -1"),
        ([0, 2**31], "int32"),
    ],
)
def test_what_is_not_a_pack_is_rejected(cu_seqlens: list[int], rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        PackedSeq.from_cu_seqlens(cu_seqlens)


def test_tables_are_made_once() -> None:
    packed = pack(LENGTHS)
    made = []
    for _ in range(2):
        packed.cached("key", lambda: made.append(1))
    assert len(made) == 1
    assert packed.positions() is packed.positions()
