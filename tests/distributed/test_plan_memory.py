"""The planner's memory against that of a CPU run, on every layout of the equivalence matrix.

Parameters, gradients and optimizer state are equal to the byte. Bytes saved for backward, counted
by autograd's hooks, are within 5 % in the sum over all ranks. A single rank may differ more,
because the data decides how many rows its experts get.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from helpers.equivalence import LAYOUTS
from helpers.ranks import join_group, run_ranks

CAPACITY = 512
DOCUMENT = 128
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512},
    "100M": {
        "pattern": "MEM*EME*",
        "vocab_size": 8192,
        "hidden_size": 512,
        "num_heads": 8,
        "head_dim": 64,
        "mamba_heads": 16,
        "mamba_head_dim": 64,
        "mamba_state": 64,
        "num_experts": 16,
        "expert_width": 1536,
        "shared_expert_width": 1024,
    },
}
TOLERANCE = 0.05


def measure(runs: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Bytes that this rank holds in each run, counted and predicted."""
    found = {}
    for name, run in runs.items():
        join_group(name)
        found[name] = _measure(**run)
    return found


def _measure(parallel: dict[str, Any], model: dict[str, Any]) -> dict[str, float]:
    import gc
    from dataclasses import replace
    from pathlib import Path

    from nemocascade.megatron.checkpoint.state import _main_parameters, _stepping
    from nemocascade.megatron.config import Accelerators
    from nemocascade.megatron.world import start_world
    from nemocascade.plan.gpus import GPUS
    from nemocascade.plan.job import Job
    from nemocascade.plan.memory import stage_memory
    from nemocascade.plan.parameters import place_of
    from nemocascade.recipe import (
        EngineConfig,
        MoeTrainingConfig,
        OptimizerConfig,
        ParallelConfig,
        tiny,
    )
    from nemocascade.train.trainer import Trainer

    engine = EngineConfig(precision="fp32")
    moe = MoeTrainingConfig(load_balance_coef=1e-2, z_loss_coef=1e-3)
    world = start_world(ParallelConfig(**parallel), engine)
    shape = replace(tiny(), **model)
    trainer = Trainer(
        world,
        shape,
        engine=engine,
        moe=moe,
        optimizer=OptimizerConfig(warmup_steps=1),
        accelerators=Accelerators(),
        seed=3,
        run_dir=Path("/nonexistent"),
    )
    buffers = [b for c in trainer.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]
    own = {t.untyped_storage().data_ptr() for b in buffers for t in (b.param_data, b.grad_data)}
    own |= {b.untyped_storage().data_ptr() for m in trainer.modules for b in m.buffers()}
    # Documents lie within segments. Of those that cross them, autograd's hooks do not see what the
    # recomputed mixers keep; the dry run of the GPU path counts it.
    capacity = max(CAPACITY, 2 * DOCUMENT * world.parallel.cp)
    saved = _saved_by_a_step(trainer, own, shape.vocab_size, capacity)
    states = sum(
        2 * 4 * main.numel()
        for inner in _stepping(trainer.optimizer)
        for _, main, _, _ in _main_parameters(inner)
    )
    job = Job(
        model=shape,
        parallel=world.parallel,
        engine=engine,
        moe=moe,
        optimizer=OptimizerConfig(),
        capacity=capacity,
        sequences_per_step=world.dp_size * world.parallel.pp,
        gpu=GPUS["cpu"],
        world_size=world.size,
        document=DOCUMENT,
        imbalance=1.0,
    )
    planned = stage_memory(job, place_of(world.rank, world.parallel, world.size))
    result = {
        "parameters": sum(b.param_data.numel() * 4 for b in buffers),
        "gradients": sum(b.grad_data.numel() * 4 for b in buffers),
        "optimizer": states,
        "activations": saved,
        "planned parameters": planned.parameters,
        "planned gradients": planned.gradients,
        "planned optimizer": planned.optimizer,
        "planned activations": _planned_saved(job, world.pp_rank),
    }
    world.barrier()
    world.close()
    del trainer, buffers
    gc.collect()
    return result


def _planned_saved(job: Any, pp_rank: int) -> float:
    """The planned bytes that hooks see: all but the head's gradient, which the loss keeps."""
    from nemocascade.plan.activations import Activations
    from nemocascade.plan.parameters import stage_chunks

    kept = Activations(job)
    layers = "".join(stage_chunks(job.model, job.parallel, pp_rank))
    total = sum(sum(kept.layer(symbol).values()) for symbol in layers)
    if pp_rank == 0:
        total += sum(kept.embedding().values())
    if pp_rank == job.parallel.pp - 1:
        total += kept.head()["final norm"]
    return total


def _saved_by_a_step(trainer: Any, own: set[int], vocabulary: int, capacity: int) -> float:
    """Bytes that a micro-batch of a step saves for backward, each storage once.

    A tensor that is saved is kept here until the end, so that no two share an address.
    """
    import torch

    from nemocascade.types import Document, pack_documents

    world, generator = trainer.world, torch.Generator().manual_seed(7)
    microbatches: int = world.parallel.pp
    batches = []
    for _ in range(microbatches):
        documents = [
            Document(
                torch.randint(vocabulary, (DOCUMENT,), generator=generator, dtype=torch.int32),
                torch.ones(DOCUMENT, dtype=torch.bool),
                "random",
            )
            for _ in range(capacity // DOCUMENT)
        ]
        batch = pack_documents(documents, capacity)
        batches.append(batch.shard(world.cp_rank, world.parallel.cp))
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.train_step(batches)
    return float(sum(s.nbytes() for s in storages.values())) / microbatches


EVERY_LAYOUT = {"one": (1, {}), **LAYOUTS}


@functools.cache
def results(model: str) -> dict[str, list[dict[str, float]]]:
    """Measurements of each rank of each layout."""
    found: dict[str, list[dict[str, float]]] = {}
    for ranks in (1, 2, 4):
        runs = {
            name: {"parallel": parallel, "model": MODELS[model]}
            for name, (size, parallel) in EVERY_LAYOUT.items()
            if size == ranks
        }
        of_rank = run_ranks(measure, ranks, {"runs": runs}, timeout_s=540)
        for name in runs:
            found[name] = [rank[name] for rank in of_rank]
    return found


@pytest.mark.parametrize("model", ["tiny", pytest.param("100M", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_prediction_against_measurement(layout: str, model: str) -> None:
    ranks = results(model)[layout]
    for rank in ranks:
        for what in ("parameters", "gradients", "optimizer"):
            assert rank[f"planned {what}"] == rank[what]
    measured = sum(rank["activations"] for rank in ranks)
    planned = sum(rank["planned activations"] for rank in ranks)
    error = planned / measured - 1.0
    print(f"| {model} | {layout} | {measured:,.0f} | {planned:,.0f} | {error:+.2%} |")
    assert abs(error) <= TOLERANCE
