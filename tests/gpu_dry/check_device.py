"""Prints what the played device counts for single operations, as JSON, for the tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch
from gpu_dry import device as dry
from gpu_dry import played


def counts(call: Callable[[], object]) -> dict[str, int]:
    """The counts of a call by kind and name, without operators."""
    dry.RECORD.taken()
    call()
    return {
        f"{kind} {n}": c for (kind, n, _), c in dry.RECORD.taken().items() if kind != "operator"
    }


def main() -> dict[str, Any]:
    with played.dry_run():
        x = torch.ones(4, 4, device="cuda")
        mask = torch.ones(4, dtype=torch.bool, device="cuda")
        sent = torch.tensor([3, 1, 2], device="cuda")
        found: dict[str, Any] = {
            "item": counts(lambda: x.sum().item()),
            "float of each": counts(lambda: [float(v) for v in x[0]]),
            "tolist": counts(x.tolist),
            "cpu": counts(x.cpu),
            "copy into host memory": counts(lambda: torch.empty(4, 4).copy_(x)),
            "list of scalars": counts(lambda: torch.tensor([x.sum(), x.sum()])),
            "nonzero": counts(x.nonzero),
            "rows by mask": counts(lambda: x[mask]),
            "fill by mask": counts(lambda: x.__setitem__(mask, 0.0)),
            "repeats of unknown size": counts(lambda: mask.repeat_interleave(mask.long())),
            "repeats of known size": counts(
                lambda: mask.repeat_interleave(mask.long(), output_size=4)
            ),
            "pageable": counts(lambda: torch.ones(3).to("cuda", non_blocking=True)),
            "pinned": counts(lambda: torch.ones(3).pin_memory().to("cuda", non_blocking=True)),
            "from a list": counts(lambda: torch.tensor([1, 2], device="cuda")),
            "synchronize": counts(torch.cuda.synchronize),
        }
        found["known values"] = (sent.cumsum(0) + 1).tolist()
        found["unknown values"] = x.sum(1).tolist()
        found["graph pools"] = _pools()
        found["peak"] = _peak()
        found["faults"] = _faults(x)
    return found


def _pools() -> dict[str, int]:
    """Growth of memory by the capture of two graphs, with and without a common pool."""
    grown = {}
    for name, pool in (("own", None), ("common", torch.cuda.graph_pool_handle())):
        before, kept = dry.MEMORY.live, []
        for _ in range(2):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool):
                torch.empty(1 << 20, dtype=torch.uint8, device="cuda")
            kept.append(graph)
        grown[name] = dry.MEMORY.live - before
        del graph, kept
        grown[f"{name}, freed"] = dry.MEMORY.live - before
    return grown


def _peak() -> list[int]:
    before = dry.MEMORY.live
    dry.MEMORY.reset_peak()
    x = torch.empty(1000, dtype=torch.uint8, device="cuda")
    y = x[:500]
    z = torch.empty(512, dtype=torch.uint8, device="cuda")
    del x, y, z
    return [dry.MEMORY.peak - before, dry.MEMORY.live - before]


def _faults(x: torch.Tensor) -> list[str]:
    dry.RECORD.faults.clear()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.sum().item()
    return [fault.partition(", at")[0] for fault in dry.RECORD.faults]


if __name__ == "__main__":
    print(json.dumps(main()))
