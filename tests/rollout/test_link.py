"""The group that sends weights to the servers, whose processes start with other settings."""

from __future__ import annotations

import os

import pytest
from helpers.ranks import run_ranks


def join_and_broadcast(lazy_rank: int) -> list[float]:
    """The tensor that this rank has; one of the two connects its other groups lazily."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from nemocascade_vllm.link import Link

    rank, limit = int(os.environ["RANK"]), timedelta(seconds=20)
    os.environ["TORCH_GLOO_LAZY_INIT"] = str(int(rank == lazy_rank))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, timeout=limit)
    link = Link("gloo", store, "weights", rank, 2, timeout_s=120, peer=address)
    # The sender waits until all have joined, so nobody may wait for its first message to join.
    store.set(f"joined {rank}", "")
    store.wait([f"joined {1 - rank}"], limit)
    tensor = torch.full((3,), float(rank + 1))
    link.broadcast(tensor)
    store.set(f"done {rank}", "")
    store.wait([f"done {1 - rank}"], limit)
    found: list[float] = tensor.tolist()
    return found


@pytest.mark.parametrize("lazy_rank", [0, 1])
def test_a_trainer_and_a_server_may_connect_other_groups_differently(lazy_rank: int) -> None:
    assert run_ranks(join_and_broadcast, 2, {"lazy_rank": lazy_rank}) == [[1.0] * 3] * 2
