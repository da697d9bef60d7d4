"""Work of the accelerators before the first step, for the shapes of the run's model."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import torch
from nemocascade_kernels.mamba2 import fla_check

from nemocascade.megatron.accelerators import AcceleratorError
from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.workspace import mixer_sizes
from nemocascade.recipe import EngineConfig, ModelConfig
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World

# Rows of the packs that kernels are measured on.
_ROWS = 4096


def warm_up(
    accelerators: Accelerators,
    model: ModelConfig,
    engine: EngineConfig,
    world: World,
    capacity: int,
) -> Accelerators:
    """Let fla-core choose its kernels' configurations, and compare its results with torch's.

    On every node one rank measures the configurations; the others read them from Triton's cache.
    capacity: the largest number of rows of a pack on a rank. Every rank calls this and gets the
    accelerators that all ranks can use.

    Raises AcceleratorError if fla-core fails and its setting is "on".
    """
    if not accelerators.fla or "M" not in model.pattern:
        return accelerators
    world.watch.enter("tuning of fla-core's kernels")
    started = time.perf_counter()
    first = os.environ.get("LOCAL_RANK", "0") == "0"
    failure = _tune(model, engine, world, capacity) if first else ""
    world.watch.meet()
    if not first:
        failure = _tune(model, engine, world, capacity)
    failures = world.all_gather_object(failure)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]
    if found:
        if engine.fla == "on":
            raise AcceleratorError(
                f"fla-core is set to on, but {'; '.join(found)}: set --engine.fla to auto or off"
            )
        LOGGER.warning("fla-core is not used, torch's scan runs instead: %s", "; ".join(found))
        return replace(accelerators, fla=False)
    cache = fla_check.tuning_cache()
    LOGGER.info(
        "fla-core: its kernels were tuned and checked in %.1f s; %s",
        time.perf_counter() - started,
        f"the configurations are kept in {cache}"
        if cache
        else "the configurations are not kept: unset FLA_CACHE_RESULTS",
    )
    return accelerators


def _tune(model: ModelConfig, engine: EngineConfig, world: World, capacity: int) -> str:
    """Run the mixer once for each shape; returns why it fails, or an empty text."""
    dtype = torch.bfloat16 if engine.precision == "bf16" else torch.float32
    try:
        for shape in fla_check.shapes(mixer_sizes(model, world.parallel.tp), capacity):
            fla_check.check_shape(
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
