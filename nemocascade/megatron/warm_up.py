"""Work of the accelerators before the first step, for the shapes of the run's model."""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from nemocascade_kernels.mamba2 import check, fla_check, limits

from nemocascade.megatron.accelerators import AcceleratorError, fla_limitation
from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.workspace import MixerBackend, mixer_sizes
from nemocascade.recipe import EngineConfig, ModelConfig
from nemocascade.runtime.launcher import local_rank
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World

# Rows of the packs that kernels are measured on.
_ROWS = 4096
_NAMES = {"triton": "Mamba-2 in Triton", "fla": "fla-core"}


def warm_up(
    accelerators: Accelerators,
    model: ModelConfig,
    engine: EngineConfig,
    world: World,
    capacity: int,
) -> Accelerators:
    """Compile and tune the kernels of Mamba-2's mixer, and compare their results with torch's.

    Our Triton kernels are tried before fla-core, and torch's operators remain. On every node one
    rank compiles and measures; the others read the results from Triton's cache. capacity: the
    largest number of rows of a pack on a rank. Every rank calls this and gets the accelerators that
    all ranks can use.

    Raises AcceleratorError if fla-core fails and its setting is "on".
    """
    if "M" not in model.pattern:
        return accelerators
    backends: list[MixerBackend] = ["triton", "fla", "torch"]
    ranks = {found for found in world.all_gather_object(accelerators.mamba2) if found}
    if not ranks:
        return accelerators
    # The ranks check the same ones, from the first that all of them found.
    for backend in backends[max(map(backends.index, ranks)) : -1]:
        if backend == "fla" and engine.fla == "off":
            continue
        started = time.perf_counter()
        found = _failures(backend, model, engine, world, capacity)
        name = _NAMES[backend]
        if not found:
            text = _cache_text() if backend == "fla" else ""
            elapsed = time.perf_counter() - started
            LOGGER.info("%s: its kernels were checked in %.1f s%s", name, elapsed, text)
            return replace(accelerators, mamba2=backend)
        if engine.fla == "on":
            raise AcceleratorError(
                f"{name} is set to on, but {'; '.join(found)}: set --engine.fla to auto or off"
            )
        LOGGER.warning("%s is not used: %s", name, "; ".join(found))
    if accelerators.mamba2 == "torch":
        return accelerators
    LOGGER.warning("Mamba-2: torch's scan runs instead")
    return replace(accelerators, mamba2="torch")


def _failures(
    backend: MixerBackend, model: ModelConfig, engine: EngineConfig, world: World, capacity: int
) -> list[str]:
    """Why ranks cannot use an implementation of the mixer; [] if all can."""
    world.watch.enter(f"check of {_NAMES[backend]}")
    first = local_rank() == 0
    failure = _check(backend, model, engine, world, capacity) if first else ""
    world.watch.meet()
    if not first:
        failure = _check(backend, model, engine, world, capacity)
    failures = world.all_gather_object(failure)
    return [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]


def _cache_text() -> str:
    folder = fla_check.tuning_cache()
    if folder:
        return f"; the configurations are kept in {folder}"
    return "; the configurations are not kept: unset FLA_CACHE_RESULTS"


def _check(
    backend: MixerBackend, model: ModelConfig, engine: EngineConfig, world: World, capacity: int
) -> str:
    """Run the mixer once for each shape; returns why it fails, or an empty text."""
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    sizes = mixer_sizes(model, world.parallel.tp)
    shapes = [sizes]
    try:
        if backend == "fla":
            if reason := fla_limitation(engine, world.device):
                return reason
            shapes = fla_check.shapes(sizes, capacity)
        elif reason := limits.size_limitation(sizes.head_dim, sizes.state) or "":
            return reason
        for shape in shapes:
            check.check_shape(
                backend,
                world.device,
                shape,
                window=model.mamba_conv,
                rows=min(_ROWS, capacity),
                dtype=dtype,
            )
            world.watch.progress(f"{shape.heads} heads")
    except Exception as error:  # a compiler or driver may raise anything; its reason is shown
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return ""
