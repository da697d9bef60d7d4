"""vLLM's weight transfer engine for NemoCascade: tensors arrive by broadcast, one after another.

Every training rank that sends has a group of its own with all workers, so that each serves its own
experts. A worker holds one tensor at a time besides its model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from nemocascade_vllm.link import Link


@dataclass
class InitInfo(WeightTransferInitInfo):
    """How to join the groups.

    host, port: of the trainer's store. name: of the groups. links: number of groups. rank_offset:
    rank of this server's first worker in each. size: number of ranks in each. timeout_s: of the
    meeting and of every broadcast.
    """

    transport: str
    host: str
    port: int
    name: str
    links: int
    rank_offset: int
    size: int
    timeout_s: float


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """The tensors of an update, in the order in which they are sent: name, dtype as torch names it,
    shape, and the number of the group that sends it."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    links: list[int]


class NemoCascadeTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Receives the weights of a model."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    _links: tuple[Link, ...] = ()

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Join the groups, instead of those before."""
        self.shutdown()
        parallel: Any = self.parallel_config
        rank = parallel.data_parallel_index * parallel.world_size + parallel.rank
        timeout = timedelta(seconds=init_info.timeout_s)
        store = dist.TCPStore(init_info.host, init_info.port, is_master=False, timeout=timeout)
        self._links = tuple(
            Link(
                init_info.transport,
                store,
                f"{init_info.name}/{number}",
                init_info.rank_offset + rank,
                init_info.size,
                timeout_s=init_info.timeout_s,
                peer=init_info.host,
            )
            for number in range(init_info.links)
        )

    def start_weight_update(self) -> None:
        """Prepare the model's layers to be loaded again."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load every tensor as it arrives; after a failure the groups are left, so that no sender
        waits for this worker."""
        try:
            self.model.load_weights(self._arriving(update_info))
        except BaseException:
            self.shutdown()
            raise

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive one update and wait for the device."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def finish_weight_update(self) -> None:
        """Bring the layers into the form in which they compute."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Leave the groups."""
        for link in self._links:
            link.close()
        self._links = ()

    def _arriving(self, info: UpdateInfo) -> Iterator[tuple[str, Tensor]]:
        if not self._links:
            raise RuntimeError("no group to receive weights from: init_transfer_engine first")
        for name, dtype, shape, number in zip(
            info.names, info.dtypes, info.shapes, info.links, strict=True
        ):
            link = self._links[number]
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=link.device)
            link.broadcast(tensor)
            yield name, tensor
