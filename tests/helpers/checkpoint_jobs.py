"""Multi-rank jobs of the checkpoint tests: short training runs on any layout, saved and resumed."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from helpers.ranks import join_group
from nemocascade.megatron.checkpoint import (
    CheckpointError,
    load_checkpoint,
    save_checkpoint,
)
from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
)
from nemocascade.runtime.world import World
from nemocascade.train.trainer import Trainer
from nemocascade.train.weight_swap import live_tensors
from nemocascade.types import Document, PackedBatch, pack_documents

CAPACITY = 64
SEQUENCES = 4
SHAPES: dict[str, dict[str, Any]] = {
    "relu2": {"pattern": "ME*-"},
    "swiglu": {"pattern": "E*-M", "activation": "swiglu", "qk_norm": True},
    "tied": {"pattern": "ME*-", "tie_embeddings": True, "rope": True},
}


def small_model(shape: str, **changes: Any) -> ModelConfig:
    """All kinds of layer, a few thousand parameters."""
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "vocab_size": 96,
        "num_heads": 4,
        "head_dim": 8,
        "mamba_heads": 4,
        "mamba_head_dim": 8,
        "mamba_state": 8,
        "mamba_chunk": 16,
        "num_experts": 4,
        "expert_width": 16,
        "shared_expert_width": 32,
        "mlp_width": 48,
    }
    return ModelConfig(**{**sizes, **SHAPES[shape], **changes})


def batches_of(step: int, world: World) -> list[PackedBatch]:
    """This rank's micro-batches of a step; all ranks together always train on the same ones."""
    batches = []
    for sequence in range(world.dp_rank, SEQUENCES, world.dp_size):
        generator = torch.Generator().manual_seed(1000 * step + sequence)
        documents = []
        for length in (23, 5, 30):
            tokens = torch.randint(0, 96, (length,), generator=generator, dtype=torch.int32)
            documents.append(Document(tokens, torch.ones(length, dtype=torch.bool), "test"))
        whole = pack_documents(documents, CAPACITY)
        batches.append(whole.shard(world.cp_rank, world.parallel.cp))
    return batches


def make_trainer(job: dict[str, Any], world: World) -> Trainer:
    """The trainer that a job describes."""
    return Trainer(
        world,
        small_model(job.get("shape", "relu2"), **job.get("model", {})),
        engine=EngineConfig(precision=job.get("precision", "fp32")),
        moe=MoeTrainingConfig(freeze_router=job.get("freeze_router", False)),
        optimizer=OptimizerConfig(
            lr=1e-2,
            warmup_steps=2,
            distributed=job.get("distributed", True),
            moments=job.get("moments", "fp32"),
        ),
        accelerators=Accelerators(),
        seed=job.get("seed", 7),
        run_dir=Path(tempfile.gettempdir()),
        initialise=job.get("initialise", True),
    )


@torch.no_grad()
def poison(trainer: Trainer) -> None:
    """Fill with NaN whatever a trainer without initial values may leave undefined."""
    live = live_tensors(trainer.modules)
    for tensor in (*live, *trainer.optimizer.state_tensors()):
        tensor.fill_(float("nan"))


def run_jobs(jobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Run each job in a world of its own; what each gave, in order.

    A job: parallel, shape, precision, distributed, moments, seed; load: checkpoint to go on from;
    resave: root to save to right after loading; steps: train until this many are done;
    save_at: steps after which to save to `root`.
    """
    return [_run_job(job, f"job {i}") for i, job in enumerate(jobs)]


def _run_job(job: dict[str, Any], name: str) -> dict[str, Any]:
    join_group(name)
    parallel = ParallelConfig(**job.get("parallel", {}))
    world = start_world(parallel, EngineConfig(timeout_s=300))
    try:
        trainer = make_trainer({**job, "initialise": "load" not in job}, world)
        if "load" in job:
            poison(trainer)
        return _train(job, world, trainer)
    except CheckpointError as error:
        return {"rejected": error.problems}
    finally:
        world.close()


def _train(job: dict[str, Any], world: World, trainer: Trainer) -> dict[str, Any]:
    extra: dict[str, Any] = {}
    if "load" in job:
        extra = load_checkpoint(Path(job["load"]), world, trainer.chunks, trainer.optimizer)
        trainer.step_number = extra["step"]
    else:
        # Generators of equal seed on every rank would hide a mix-up of their states.
        torch.manual_seed(100 + world.rank)
    first = trainer.step_number
    if "resave" in job:
        _save(Path(job["resave"]), world, trainer)
    losses, noise = [], []
    for step in range(first, job.get("steps", first)):
        losses.append(trainer.train_step(batches_of(step, world)).loss)
        noise.append(float(torch.rand(())))
        if trainer.step_number in job.get("save_at", []):
            _save(Path(job["root"]), world, trainer)
    return {"losses": losses, "noise": noise, "first": first, "extra": extra}


def _save(root: Path, world: World, trainer: Trainer) -> None:
    extra = {"step": trainer.step_number, "position": [trainer.step_number, "x"]}
    save_checkpoint(root, trainer.step_number, world, trainer.chunks, trainer.optimizer, extra)
