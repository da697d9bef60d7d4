"""Known accelerators: memory and ceilings, extendable by a JSON file."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from nemocascade.plan.errors import PlanError


@dataclass(frozen=True)
class Gpu:
    """Memory and ceilings of an accelerator.

    memory_gib: memory that torch can allocate, without the driver's share. matmul_tflops: bf16
    matrix products as reached at good sizes, below the datasheet's peak. memory_gb_s, link_gb_s,
    network_gb_s: bandwidth of its memory, of a rank to its neighbours in a node, and of a rank to
    other nodes, in each direction. per_node: accelerators connected by the link. fp8_experts: the
    routed experts' FP8 products run on it.
    """

    name: str
    memory_gib: float
    matmul_tflops: float
    memory_gb_s: float
    link_gb_s: float
    network_gb_s: float
    per_node: int = 8
    fp8_experts: bool = False


# Datasheet figures times the shares that large transfers and products reach in practice: 0.8 of the
# matrix peak, 0.85 of memory, 0.8 of links. The matrix rate of the H200 is measured.
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-80gb", 78.0, 250, 1730, 240, 20),
        Gpu("h100", 78.0, 720, 2850, 360, 40, fp8_experts=True),
        Gpu("h200", 139.0, 790, 4080, 360, 40, fp8_experts=True),
        Gpu("b200", 178.0, 1750, 6800, 720, 40),
        Gpu("cpu", 16.0, 0.1, 20, 5, 1, per_node=64, fp8_experts=True),
    )
}


_OPTIONAL = {"per_node", "fp8_experts"}


def find_gpu(name: str) -> Gpu:
    """The accelerator of that name, or of a JSON file with the fields of `Gpu`.

    Raises PlanError for an unknown name, listing the known ones.
    """
    if name in GPUS:
        return GPUS[name]
    fields = {f.name for f in dataclasses.fields(Gpu)}
    if name.endswith(".json") and Path(name).is_file():
        values = json.loads(Path(name).read_bytes())
        if wrong := sorted((fields - _OPTIONAL - set(values)) | (set(values) - fields)):
            raise PlanError(f"{name}: fields {', '.join(wrong)} are unknown or missing")
        return Gpu(**values)
    raise PlanError(
        f"--gpu {name!r} is not known: use {', '.join(GPUS)}, or a JSON file with "
        f"{', '.join(sorted(fields))}"
    )
