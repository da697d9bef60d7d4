"""The process group of a weight transfer: a training rank that sends, and workers that receive.

Both sides use this module. It is not one of torch.distributed's groups, because its ranks belong to
different jobs.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

TRANSPORTS = ("nccl", "gloo")


class Link:
    """A group of `size` ranks, of which rank 0 sends to all others.

    store: the meeting point of the group. name: of this group in the store; another group needs
    another name. peer: host whose direction decides the network interface of gloo.

    Raises ValueError for an unknown transport, and torch's errors after `timeout_s` seconds
    without all ranks.
    """

    def __init__(
        self,
        transport: str,
        store: dist.Store,
        name: str,
        rank: int,
        size: int,
        *,
        timeout_s: float,
        peer: str,
    ) -> None:
        if transport not in TRANSPORTS:
            raise ValueError(f"transport({transport!r}) is unknown: use {' or '.join(TRANSPORTS)}")
        self.transport, self.rank = transport, rank
        prefix, timeout = dist.PrefixStore(name, store), timedelta(seconds=timeout_s)
        # torch's types lack the options of gloo and the methods of both groups.
        gloo: Any = dist.ProcessGroupGloo
        self._group: Any
        if transport == "gloo":
            options = gloo._Options()
            options._timeout = timeout
            # Trainers set TORCH_GLOO_LAZY_INIT and servers do not; the two do not connect.
            device = gloo.create_device(hostname=address_towards(peer), lazy_init=False)
            options._devices = [device]
            self._group = gloo(prefix, rank, size, options)
        else:
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = timeout
            self._group = dist.ProcessGroupNCCL(prefix, rank, size, nccl)

    @property
    def device(self) -> torch.device:
        """Where tensors must be."""
        on_gpu = self.transport == "nccl"
        return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")

    def broadcast(self, tensor: Tensor) -> None:
        """Copy the contiguous `tensor` of rank 0 into those of the others, and wait."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._group.broadcast([tensor], options).wait()

    def close(self) -> None:
        """Leave the group; the others' transfers fail."""
        if self.transport == "nccl":
            self._group.abort()
        del self._group


def address_towards(host: str) -> str:
    """This machine's address on the network that reaches `host`."""
    family, *_, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        # Nothing is sent: connecting a datagram socket chooses its route.
        probe.connect(target)
        return str(probe.getsockname()[0])
