"""Gather of the updated weights that overlaps with the forward pass that follows.

Megatron's own hooks wait for the weights of each module that is called. Our mixers read weights of
modules that they never call, so whole layers wait here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import nn


class ParameterGather:
    """Starts the gathers of all chunks' weights after an update, and waits where they are used.

    chunks: wrapped with `overlap_param_gather`. A layer waits for its own weights. Whoever reads
    weights outside of a forward pass calls `finish` before.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel]) -> None:
        self._groups: list[Any] = []
        for chunk in chunks:
            chunk.disable_forward_pre_hook(param_sync=False)
            # Buckets are in the order of backward, and forward begins with the last ones.
            self._groups += reversed(chunk.bucket_groups + chunk.expert_parallel_bucket_groups)
            self._hook(chunk)

    def _hook(self, chunk: DistributedDataParallel) -> None:
        model: Any = chunk.module
        units = [*model.decoder.layers]
        if model.pre_process:
            units.append(model.embedding.word_embeddings)
        if model.post_process:
            units.append(model.decoder.final_norm)
        for unit in units:
            groups = _groups_of(chunk, unit)
            unit.register_forward_pre_hook(lambda *_call, groups=groups: _wait(groups))
        # Computation after the layers, such as the LM head, is not a call of a module.
        rest = _groups_of(chunk, model)
        model.decoder.register_forward_hook(lambda *_call: _wait(rest))

    def start(self) -> None:
        """Start the gathers; the optimizer has updated this rank's shards."""
        for group in self._groups:
            group.start_param_sync()

    def finish(self) -> None:
        """Wait for every gather that has started."""
        _wait(self._groups)


def _groups_of(chunk: DistributedDataParallel, module: nn.Module) -> list[Any]:
    """The groups of buckets that hold the module's trained weights, each once."""
    known = chunk.param_to_bucket_group
    found = {id(known[p]): known[p] for p in module.parameters() if p in known}
    return list(found.values())


def _wait(groups: Iterable[Any]) -> None:
    for group in groups:
        if group.param_gather_handle is not None:
            group.finish_param_sync(skip_next_bucket_dispatch=True)
