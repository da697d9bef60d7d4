"""An adapter in the format of Hugging Face's PEFT: adapter_config.json and
adapter_model.safetensors.

Factors are named by the linears of the Hugging Face model. Where that one splits a fused linear of
ours, such as the query, key and value projections, the linears get the same A and their rows of B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nemocascade.megatron.adapter_artifact import (
    StoredAdapter,
    factors_of,
    index_problems,
    open_adapter,
)
from nemocascade.megatron.artifact import artifact_model
from nemocascade.megatron.checkpoint.boxes import Box
from nemocascade.megatron.checkpoint.folder import flush, fresh_folder, write_durably
from nemocascade.megatron.checkpoint.index import StoredTensor
from nemocascade.megatron.checkpoint.state import MODEL
from nemocascade.megatron.checkpoint.storage import Outgoing, Reader, write_tensors
from nemocascade.megatron.convert.conversion import Conversion, names_to_write
from nemocascade.megatron.convert.folder import ConversionError, json_bytes
from nemocascade.megatron.convert.merge import read_box
from nemocascade.megatron.convert.names import Family, Move, NameMap

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""PEFT's wrapper of a causal language model."""


@dataclass(frozen=True)
class _Rows:
    """Rows of a linear of theirs: the same rows of our factors. lead: the expert, or nothing."""

    a: str
    b: str
    lead: tuple[int, ...]
    ours: int
    theirs: int
    count: int


def export_peft(
    source: Path,
    target: Path,
    *,
    family: Family | Literal["auto"] = "auto",
    base_model: str = "",
) -> Conversion:
    """Write the PEFT folder `target` from the adapter `source`, of any layout.

    family: as in `export_huggingface`. base_model: name or folder of the Hugging Face model, for
    PEFT; empty writes none.

    Raises ConversionError if `target` exists, if the family cannot express the model, or if it
    stores the experts of a layer as one tensor, which has no place for their factors.
    """
    adapter, index = open_adapter(source)
    shape = artifact_model(adapter.artifact)
    chosen, names = names_to_write(source, shape, family)
    base = _base_shapes(names)
    rows = _rows_of(names, factors_of(index, base))
    problems = index_problems(index, base)
    problems += [
        f"{name} holds all experts of a layer in one tensor, and PEFT has factors for linears: "
        "merge the adapter instead (nemocascade merge), and convert the result"
        for name, parts in rows.items()
        if len(names.theirs[name]) != 2
    ]
    if target.exists():
        problems.append(f"{target} exists already: name a folder that does not")
    if problems:
        raise ConversionError(source, problems)
    temporary = fresh_folder(target)
    with Reader(source, index) as reader:
        tensors = [
            tensor
            for name, parts in rows.items()
            for tensor in _factors(reader, names, name, parts)
        ]
        _, size = write_tensors(temporary / WEIGHTS, tensors, {"format": "pt"})
    config = _config(adapter, _target_modules(names, rows), base_model)
    write_durably(temporary / CONFIG, json_bytes(config))
    flush(temporary)
    temporary.rename(target)
    flush(target.parent)
    return Conversion(target, chosen, adapter.artifact.precision, len(tensors), size)


def _base_shapes(names: NameMap) -> dict[str, StoredTensor]:
    return {MODEL + name: StoredTensor(shape, "", ()) for name, shape in names.ours.items()}


def _rows_of(names: NameMap, factors: Mapping[str, tuple[str, str]]) -> dict[str, list[_Rows]]:
    """The rows of our factors that make those of every adapted linear of theirs."""
    found: dict[str, list[_Rows]] = {}
    for move in names.moves:
        if MODEL + move.ours in factors:
            found.setdefault(move.theirs, []).append(_rows(move, *factors[MODEL + move.ours]))
    return found


def _rows(move: Move, a: str, b: str) -> _Rows:
    *lead, first, _ = move.our_box.offset
    return _Rows(a, b, tuple(lead), first, move.their_box.offset[-2], move.our_box.size[-2])


def _factors(
    reader: Reader, names: NameMap, name: str, parts: Sequence[_Rows]
) -> Iterable[Outgoing]:
    """A and B of a linear of theirs."""
    outputs, inputs = names.theirs[name]
    entry = reader.index[parts[0].a]
    rank, linear = entry.shape[-2], PREFIX + name.removesuffix(".weight")

    def box(part: _Rows, first: int, *size: int) -> Box:
        return Box((*part.lead, first, 0), (*(1 for _ in part.lead), *size))

    def read_a(wanted: Box) -> Tensor:
        part = parts[0]
        values = read_box(reader, part.a, box(part, 0, rank, inputs))
        return values.view(rank, inputs)[wanted.slices()]

    def read_b(wanted: Box) -> Tensor:
        values = torch.zeros(outputs, rank, dtype=read_a(Box((0, 0), (1, 1))).dtype)
        for part in parts:
            own = read_box(reader, part.b, box(part, part.ours, part.count, rank))
            values[part.theirs : part.theirs + part.count] = own.view(part.count, rank)
        return values[wanted.slices()]

    yield Outgoing(f"{linear}.lora_A.weight", entry.dtype, (rank, inputs), read_a)
    yield Outgoing(f"{linear}.lora_B.weight", entry.dtype, (outputs, rank), read_b)


def _target_modules(names: NameMap, adapted: Iterable[str]) -> list[str]:
    """Names for PEFT's search: the last part where all linears of that name are adapted, and full
    names otherwise."""
    chosen = {name.removesuffix(".weight") for name in adapted}
    ending: dict[str, set[str]] = {}
    for name, shape in names.theirs.items():
        if len(shape) > 1 and name.endswith(".weight"):
            linear = name.removesuffix(".weight")
            ending.setdefault(linear.rpartition(".")[2], set()).add(linear)
    found: set[str] = set()
    for last, linears in ending.items():
        found |= {last} if linears <= chosen else linears & chosen
    return sorted(found)


def _config(adapter: StoredAdapter, targets: list[str], base_model: str) -> dict[str, Any]:
    alpha = adapter.lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model or None,
        "r": adapter.lora.rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "inference_mode": True,
    }
