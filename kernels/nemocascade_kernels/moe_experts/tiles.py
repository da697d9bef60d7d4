"""Tiles of the expert products, and the number of programs that a persistent launch has."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton

from nemocascade_kernels.backends import interpreting

#: Rows of a tile in every kernel that loops over rows: they share one plan.
ROWS_OF_TILE = 128
#: Number of programs in the interpreter, instead of a device's multiprocessors.
_INTERPRETED_PROGRAMS = 3
#: Registers of a thread with which two blocks of eight warps fit on a multiprocessor of Hopper.
_HALF_OF_HOPPER = 128
#: Shared memory that the driver takes of each block, in bytes.
_RESERVED_SHARED = 1024


class Tile(NamedTuple):
    """Tile of a product, and its launch settings."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None


def product_tile(width: int, dtype: torch.dtype, arch: int, *, gated: bool = False) -> Tile:
    """Tile for `width` columns: 256 wide if no more is wasted than with 128.

    Wide tiles read less; of 128 x 128, two fit on a multiprocessor of Hopper. Two products side by
    side (gated) have half the columns each.
    """
    if dtype == torch.float32:
        return Tile(ROWS_OF_TILE, 64, 32, 8, 3)
    if gated:
        return Tile(ROWS_OF_TILE, 64, 64, 8, 3, _half(arch))
    if arch >= 90 and _waste(width, 256) <= _waste(width, 128):
        return Tile(ROWS_OF_TILE, 256, 64, 8, 3)
    return Tile(ROWS_OF_TILE, 128, 64, 8, 3, _half(arch))


def _waste(width: int, block: int) -> float:
    return triton.cdiv(width, block) * block / max(width, 1)


def _half(arch: int) -> int | None:
    return _HALF_OF_HOPPER if arch == 90 else None


def gradient_tile(dtype: torch.dtype, arch: int, *, gated: bool) -> Tile:
    """Tile of `down_gradient_kernel`; a gated epilogue needs more than half of the registers."""
    if dtype == torch.float32:
        return Tile(ROWS_OF_TILE, 64, 32, 8, 3)
    return (
        Tile(ROWS_OF_TILE, 128, 64, 8, 4)
        if gated
        else Tile(ROWS_OF_TILE, 128, 64, 8, 3, _half(arch))
    )


def weight_tile(dtype: torch.dtype, arch: int) -> Tile:
    """Tile of a weight's gradient; BLOCK_K counts rows.

    It is not wider for any width: reading and writing the main gradient takes half as long as the
    products, so two blocks must share a multiprocessor.
    """
    if dtype == torch.float32:
        return Tile(128, 64, 32, 8, 3)
    return Tile(128, 128, 64, 8, 3 if arch >= 90 else 4, _half(arch))


_RESIDENT: dict[tuple[object, ...], int] = {}
"""Programs of a launch, by its kernel, device, constants and types: looking a compiled kernel up
costs the host as much as the launch."""


def launch(kernel: Any, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Launch a persistent kernel with as many programs as fit on the device."""
    if interpreting():
        programs = _INTERPRETED_PROGRAMS
    else:
        types = (getattr(argument, "dtype", type(argument)) for argument in arguments)
        key = (kernel, device, *constants.values(), *types)
        if key not in _RESIDENT:
            compiled = kernel.warmup(*arguments, grid=(1,), **constants)
            _RESIDENT[key] = resident_programs(compiled, device)
        programs = _RESIDENT[key]
    kernel[(programs,)](*arguments, **constants)


def resident_programs(compiled: Any, device: torch.device) -> int:
    """Programs of a compiled kernel that run at once on a device.

    compiled: Triton's compiled kernel, such as `kernel.warmup(...)` returns.
    """
    compiled._init_handles()  # loads the binary, which tells its registers
    # The type's stub does not declare the registers.
    properties: Any = torch.cuda.get_device_properties(device)
    threads = 32 * compiled.metadata.num_warps
    # Registers are allocated to warps in groups of 8 a thread.
    registers = triton.cdiv(max(compiled.n_regs, 1), 8) * 8 * threads
    shared = compiled.metadata.shared + _RESERVED_SHARED
    blocks = min(
        properties.regs_per_multiprocessor // registers,
        properties.shared_memory_per_multiprocessor // shared,
        properties.max_threads_per_multi_processor // threads,
    )
    return max(blocks, 1) * int(properties.multi_processor_count)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
