"""Problems of the end-to-end benchmarks: shapes, documents, shared initial weights, measurement of
the cases."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import torch  # noqa: E402
from helpers.transformers_weights import from_nemotron_h, load_into, nemotron_h  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import measure, run  # noqa: E402
from benchmarks.measure import Case  # noqa: E402
from nemocascade.megatron.accelerators import detect  # noqa: E402
from nemocascade.megatron.world import start_world  # noqa: E402
from nemocascade.recipe import (  # noqa: E402
    EngineConfig,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    tiny,
)
from nemocascade.runtime.world import World  # noqa: E402
from nemocascade.train.trainer import Trainer  # noqa: E402
from nemocascade.types import Document, PackedBatch, pack_documents  # noqa: E402

ENGINE = EngineConfig(precision="fp32")
OPTIMIZER = OptimizerConfig(lr=1e-3, min_lr=1e-3, warmup_steps=0, schedule="constant")

# Lengths of GSM8K's training questions and answers in a BPE of 2,048 ids: the median, the standard
# deviation of the logarithm, and the fraction of trained tokens.
MEDIAN_LENGTH, LOG_SIGMA, TRAINED = 205, 0.34, 0.59


def small() -> ModelConfig:
    """About 100 M parameters with the three main kinds of layer."""
    return ModelConfig(
        pattern="MEM*EMEM*E",
        hidden_size=512,
        vocab_size=16_384,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        mamba_heads=16,
        mamba_head_dim=64,
        mamba_state=64,
        mamba_groups=4,
        num_experts=32,
        experts_per_token=4,
        expert_width=512,
        shared_expert_width=1024,
    )


@dataclass(frozen=True)
class Problem:
    """Sizes of one problem. capacity: slots of a packed sequence. sequences: per optimizer step."""

    make_shape: Callable[[], ModelConfig]
    capacity: int
    sequences: int


PROBLEMS = {
    "tiny/2048": Problem(tiny, 2048, 4),
    "tiny/4096": Problem(tiny, 4096, 4),
    "small/2048": Problem(small, 2048, 2),
}


def draw_batches(vocabulary: int, capacity: int, sequences: int) -> list[PackedBatch]:
    """Packed sequences of documents whose lengths are evenly spaced quantiles of GSM8K's.

    First fit, longest first; at least 2 % of the slots stay free.
    """
    mean = MEDIAN_LENGTH * torch.tensor(LOG_SIGMA**2 / 2).exp()
    count = int(0.98 * capacity * sequences / mean)
    quantiles = (torch.arange(count) + 0.5) / count
    lengths = MEDIAN_LENGTH * (LOG_SIGMA * torch.special.ndtri(quantiles)).exp()
    random = torch.Generator().manual_seed(0)
    bins: list[list[Document]] = [[] for _ in range(sequences)]
    free = [capacity] * sequences
    for number, length in enumerate(reversed(lengths.int().tolist())):
        place = next((i for i, left in enumerate(free) if left >= length), None)
        if place is None:
            raise ValueError(f"{sequences} x {capacity} slots are too few for document {number}")
        free[place] -= length
        tokens = torch.randint(vocabulary, (length,), generator=random, dtype=torch.int32)
        trained = torch.arange(length) >= int((1 - TRAINED) * length)
        bins[place].append(Document(tokens, trained, f"document {number}"))
    return [pack_documents(documents, capacity) for documents in bins]


def documents_of(batches: Sequence[PackedBatch]) -> list[tuple[Tensor, Tensor]]:
    """Tokens [n] and labels [n] of every document; labels are -100 for untrained tokens."""
    found = []
    for batch in batches:
        bounds = batch.cu_seqlens.tolist()
        for index in range(batch.num_documents):
            rows = slice(bounds[index], bounds[index + 1])
            tokens = batch.tokens[rows]
            labels = torch.full_like(tokens, -100)
            trained = batch.token_weight[rows][:-1] != 0
            labels[1:][trained] = tokens[1:][trained]
            found.append((tokens, labels))
    return found


@functools.cache
def world() -> World:
    """A world of this process alone, shared by all problems."""
    return start_world(ParallelConfig(), ENGINE)


def initial(shape: ModelConfig) -> nn.Module:
    """transformers' model of `shape`, with the initial weights of every model."""
    torch.manual_seed(0)
    return nemotron_h(shape)


def make_trainer(shape: ModelConfig) -> Trainer:
    """Our trainer with the recipes' defaults, from the weights of `initial`."""
    trainer = Trainer(
        world(),
        shape,
        engine=ENGINE,
        moe=MoeTrainingConfig(),
        optimizer=OPTIMIZER,
        accelerators=detect(ENGINE, world().device).accelerators,
        seed=0,
        run_dir=Path("runs/benchmark"),
    )
    weights = from_nemotron_h(dict(initial(shape).state_dict()), shape)
    load_into(trainer.modules[0], weights, shape, world())
    return trainer


def measure_cases(
    op: str,
    tests: str,
    cases: Iterable[tuple[Case, dict[str, Any]]],
    options: argparse.Namespace,
) -> int:
    """Time the cases, print each and write the record; returns the exit code.

    tests: the check of their results, for the record. cases: each with a dict that it fills while
    it runs: the fastest settings of its rows.
    """
    device = world().device
    ceilings = measure.ceilings(device, tiny=options.dry_run)
    records: list[dict[str, Any]] = []
    for case, ways in cases:
        outcomes = measure.measure(case, device, 0.0 if options.dry_run else options.seconds)
        records.append(run.case_record(case, outcomes, ceilings) | {"ways": ways})
        run.print_case(records[-1])
    ops = {op: {"tests": tests, "cases": records}}
    return run.finish(run.new_record("end_to_end", device, ceilings=ceilings, ops=ops), options)
