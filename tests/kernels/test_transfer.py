"""Copies from the host to a GPU: one for several tensors, from pinned memory."""

from __future__ import annotations

import pytest
import torch
from helpers.transfers import Transfers
from nemocascade_kernels.common.transfer import to_device

CUDA = torch.device("cuda", 0)


def test_one_asynchronous_copy_keeps_values_shapes_and_alignment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = [
        torch.tensor([True, False, True]),
        torch.arange(5),
        torch.randn(2, 3).t(),
        torch.empty(0, 4, dtype=torch.int32),
        torch.tensor(7.5, dtype=torch.bfloat16),
        torch.randn(3, dtype=torch.float64),
    ]
    transfers = Transfers(monkeypatch)
    copies = to_device(tensors, CUDA)
    assert transfers.copies == [True]
    for found, expected in zip(copies, tensors, strict=True):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert found.data_ptr() % 16 == 0
    assert len({t.untyped_storage().data_ptr() for t in copies}) == 1


def test_on_a_cpu_nothing_is_copied() -> None:
    tensors = [torch.arange(3), torch.randn(2)]
    assert all(
        a is b for a, b in zip(to_device(tensors, torch.device("cpu")), tensors, strict=True)
    )
