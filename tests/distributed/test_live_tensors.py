"""Hugging Face tensors of a live model are those of its export, on every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tp": 2}),
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}),
    "EP2": (2, {"ep": 2}),
    "ETP2": (2, {"etp": 2}),
    "DP2": (2, {}),
    "TP2 EP2": (4, {"tp": 2, "ep": 2}),
    "PP2 EP2": (4, {"pp": 2, "ep": 2}),
}
SMALL = 10_000  # bytes of a bucket: several tensors, and less than the largest


def stream_each(layouts: dict[str, dict[str, Any]], folder: str) -> dict[str, list[str]]:
    """Faults of each layout, and of each family of models, against the export."""
    return {name: stream(parallel, Path(folder) / name) for name, parallel in layouts.items()}


def stream(parallel: dict[str, Any], folder: Path) -> list[str]:
    from dataclasses import replace

    from helpers.rollout import EVEN, QWEN3, make_model

    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, LoraConfig, ParallelConfig

    world = start_world(ParallelConfig(**parallel), EngineConfig(precision="fp32"))
    qwen = replace(
        EVEN,
        pattern="*E*E",
        **QWEN3,
    )
    found = []
    for name, shape in {"nemotron": EVEN, "qwen": qwen}.items():
        for bucket in (SMALL, 1 << 30):
            faults = compare(world, make_model(world, shape), folder / f"{name}_{bucket}", bucket)
            found += [f"{name}, {bucket}: {fault}" for fault in faults]
    lora = LoraConfig(rank=4, targets=("linear_qkv", "linear_proj", "in_proj", "experts"))
    chunks = make_model(world, EVEN, lora=lora)
    found += [f"adapters: {fault}" for fault in compare(world, chunks, folder / "lora", SMALL)]
    world.close()
    return found


def compare(world: Any, chunks: Any, folder: Path, bucket: int) -> list[str]:
    """Faults of the stream against the export of an artifact with the same weights."""
    import functools

    import torch
    from safetensors.torch import load_file

    from nemocascade.megatron.artifact import Provenance, write_artifact
    from nemocascade.megatron.convert import LiveTensors, export_huggingface

    made_by = Provenance(stage="sft", step=1, recipe={}, data={}, scores={})
    write_artifact(folder / "artifact", world, chunks, made_by)
    if world.is_main:
        export_huggingface(folder / "artifact", folder / "hf")
    world.barrier()
    wanted = load_file(folder / "hf" / "model.safetensors")
    # Weights with adapters are merged by other boxes here and there.
    adapted = chunks[0].config.lora.rank > 0
    close = functools.partial(torch.allclose, rtol=1e-6, atol=1e-6) if adapted else torch.equal
    live = LiveTensors(world, chunks)
    faults: list[str] = []
    mine: dict[str, Any] = {}
    for numbers, tensors in zip(live.buckets(bucket), live.stream(bucket), strict=True):
        specs = [live.specs[number] for number in numbers]
        if len(specs) > 1 and sum(spec.num_bytes for spec in specs) > bucket:
            faults.append(f"a bucket of {len(specs)} tensors is too large")
        if [s for s, _ in tensors] != [s for s in specs if s.owner == world.rank]:
            faults.append("a bucket holds other tensors than its own")
        mine |= {spec.name: tensor.cpu() for spec, tensor in tensors}
    counts = world.all_gather_object(sorted(mine))
    if sorted(name for names in counts for name in names) != sorted(wanted):
        faults.append("the ranks' tensors are not those of the export, each once")
    faults += [
        f"{name} differs"
        for name, tensor in mine.items()
        if tensor.dtype != wanted[name].dtype or not close(tensor, wanted[name])
    ]
    experts = {s.owner for s in live.specs if ".experts." in s.name}
    if world.parallel.ep > 1 and len(experts) < world.parallel.ep:
        faults.append(f"the experts of {world.parallel.ep} ranks are assembled on {experts}")
    return faults


@pytest.mark.parametrize("ranks", [2, 4])
def test_live_tensors_are_those_of_the_export(ranks: int, tmp_path: Path) -> None:
    layouts = {name: parallel for name, (size, parallel) in LAYOUTS.items() if size == ranks}
    for found in run_ranks(stream_each, ranks, {"layouts": layouts, "folder": str(tmp_path)}):
        assert found == {name: [] for name in layouts}
