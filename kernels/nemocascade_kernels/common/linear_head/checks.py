"""Checks of the arguments that the ops on a linear head share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade_kernels.backends import BackendUnavailableError
from nemocascade_kernels.common.linear_head.chunks import look_ahead

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_head(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> None:
    """Raise ValueError, naming every fault, if the arguments are inconsistent."""
    faults = []
    if hidden.dim() != 2 or weight.dim() != 2 or target.dim() != 1:
        faults.append("shapes must be hidden [T, H], weight [V, H], target [T]")
    elif hidden.shape[1] != weight.shape[1]:
        faults.append("hidden and weight must have the same H")
    elif hidden.shape[0] != target.shape[0]:
        faults.append("hidden and target must have the same T")
    elif 0 in (weight.shape[0], weight.shape[1]):
        faults.append("V and H must be at least 1")
    if hidden.dtype != weight.dtype or hidden.dtype not in _DTYPES:
        faults.append("hidden and weight must share one dtype: float32, bfloat16 or float16")
    if target.dtype != torch.int64:
        faults.append("target must be int64")
    if not hidden.device == weight.device == target.device:
        faults.append("hidden, weight and target must be on one device")
    if not temperature > 0:
        faults.append(f"temperature must be > 0, and is {temperature}")
    if faults:
        given = ", ".join(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}"
            for name, tensor in (("hidden", hidden), ("weight", weight), ("target", target))
        )
        raise ValueError(f"{'; '.join(faults)}. Got {given}")


def check_reference(op: str, group: dist.ProcessGroup | None, accumulate_main_grad: bool) -> None:
    """Raise BackendUnavailableError for settings that no reference of a head's op has."""
    if look_ahead(group) or accumulate_main_grad:
        raise BackendUnavailableError(
            f"{op}: backend 'reference' knows neither tp_group nor accumulate_main_grad: use "
            "another"
        )


def check_targets(
    target: Tensor, weight: Tensor, group: dist.ProcessGroup | None
) -> tuple[int, int]:
    """First id of this rank's shard and the size of the full vocabulary.

    Every rank of `group` must hold a shard of the same size. On a CPU, raises IndexError for a
    target outside the vocabulary.
    """
    ranks = 1 if group is None else group.size()
    vocabulary = weight.shape[0] * ranks
    if target.device.type == "cpu":
        outside = ((target < 0) | (target >= vocabulary)).nonzero()[:, 0]
        if outside.numel():
            row = int(outside[0])
            raise IndexError(
                f"{outside.numel()} targets are outside the vocabulary [0, {vocabulary}); the "
                f"first is {int(target[row])}, in row {row}: give rows that do not count weight 0"
            )
    return (0 if group is None else group.rank() * weight.shape[0]), vocabulary
