"""Layouts and random documents on which a small model is trained, and its losses there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}),
    "EP2": (2, {"ep": 2}),
    "DP2": (2, {}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}),
    "TP2 EP2": (4, {"tp": 2, "ep": 2}),
    "TP2 EP2 on 2": (2, {"tp": 2, "ep": 2}),
    "PP2 EP2": (4, {"pp": 2, "ep": 2}),
    "EP2 ETP2": (4, {"ep": 2, "etp": 2}),
    "TP2 ETP2": (2, {"tp": 2, "etp": 2}),
    "CP2": (2, {"cp": 2}),
    "CP4": (4, {"cp": 4}),
    "CP2 TP2": (4, {"cp": 2, "tp": 2}),
    "CP2 EP2": (2, {"cp": 2, "ep": 2}),
    "CP2 PP2": (4, {"cp": 2, "pp": 2}),
    "CP2 DP2": (4, {"cp": 2}),
}
STEPS = 10
CAPACITY = 384


def train(
    parallel: dict[str, Any],
    *,
    model: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    engine: dict[str, Any] | None = None,
    lora: dict[str, Any] | None = None,
    pattern: str = "MEM*EME*",
    capacity: int = CAPACITY,
    steps: int = STEPS,
) -> list[list[float]]:
    """Loss and gradient norm of each step, from a fresh model on random documents."""
    from dataclasses import replace

    import torch

    from nemocascade.megatron.accelerators import detect
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import (
        EngineConfig,
        LoraConfig,
        MoeTrainingConfig,
        OptimizerConfig,
        ParallelConfig,
        tiny,
    )
    from nemocascade.train.trainer import Trainer

    settings = EngineConfig(**{"precision": "fp32", **(engine or {})})
    world = start_world(ParallelConfig(**parallel), settings)
    cuda: Any = torch.cuda
    cuda.synchronize = _fail_on_wait
    shape = replace(tiny(), pattern=pattern, vocab_size=512, hidden_size=64)
    shape = replace(shape, **(model or {}))
    trainer = Trainer(
        world,
        shape,
        engine=settings,
        moe=MoeTrainingConfig(load_balance_coef=1e-2, z_loss_coef=1e-3),
        optimizer=OptimizerConfig(
            **{"lr": 1e-3, "schedule": "constant", "warmup_steps": 10, **(optimizer or {})}
        ),
        accelerators=detect(settings, world.device).accelerators,
        seed=3,
        run_dir=Path("/nonexistent"),
        lora=LoraConfig(**(lora or {})),
    )
    batches = [
        batch.shard(world.cp_rank, world.parallel.cp)
        for batch in random_batches(4, shape.vocab_size, capacity)[world.dp_rank :: world.dp_size]
    ]
    results = [trainer.train_step(batches) for _ in range(steps)]
    world.barrier()
    # The next layout would share the core with the idle threads of this one's groups.
    world.close()
    return [[r.loss, r.grad_norm] for r in results]


def _fail_on_wait(*_: Any) -> None:
    raise AssertionError("a step waits for all work of the device")


def random_batches(count: int, vocab_size: int, capacity: int = CAPACITY) -> list[Any]:
    """Packed batches with prompts that don't train and padding at the end."""
    import torch

    from nemocascade.types import Document, pack_documents

    generator = torch.Generator().manual_seed(5)
    batches = []
    for _ in range(count):
        documents: list[Document] = []
        left = capacity
        for length in torch.randint(1, 90, (30,), generator=generator).tolist():
            if length > left:
                break
            tokens = torch.randint(vocab_size, (length,), generator=generator, dtype=torch.int32)
            trained = torch.rand(length, generator=generator) < 0.6
            documents.append(Document(tokens, trained, "random"))
            left -= length
        batches.append(pack_documents(documents, capacity))
    return batches
