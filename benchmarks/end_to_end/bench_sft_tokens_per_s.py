"""Tokens per second of an SFT step in one process, compared with transformers' model.

    python benchmarks/end_to_end/bench_sft_tokens_per_s.py
    python benchmarks/end_to_end/bench_sft_tokens_per_s.py --case tiny/2048 --seconds 60
    python benchmarks/end_to_end/bench_sft_tokens_per_s.py --out benchmarks/results/<record>.json

A step is forward, backward, clipping and AdamW, from the same weights, with the same documents,
shape and settings. Ours is `Trainer.train_step` on packed batches, with everything else in the
recipe (load-balance loss, selection bias, checks). transformers runs in two ways: one document at a
time, and padded batches of documents of similar length. Every row uses its fastest settings, chosen
by trial: our capacity; their slots, chunk and expert products. Losses of the first step must agree.
Only document tokens count, not padding. The goals are to beat both rows of transformers.

Exit code: 0 fine; 1 losses disagree, or slower than the record compared with; 3 a goal is missed
and `--strict` was given.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from benchmarks import run  # noqa: E402
from benchmarks.end_to_end.problems import (  # noqa: E402
    OPTIMIZER,
    PROBLEMS,
    Problem,
    documents_of,
    draw_batches,
    initial,
    make_trainer,
    measure_cases,
    world,
)
from benchmarks.measure import Case, Goal, Row, Unavailable  # noqa: E402
from nemocascade.megatron.parameters import count_parameters  # noqa: E402
from nemocascade.recipe import ModelConfig  # noqa: E402
from nemocascade.train.flops import batch_flops  # noqa: E402
from nemocascade.types import Document, PackedBatch, pack_documents  # noqa: E402

OURS = "ours, packed"
GOAL = 3.0
CHUNKS = (32, 64, 128)  # chunk sizes of transformers' scan
SLOTS = (1024, 2048, 4096, 8192)  # sizes of a padded batch, in ids
EXPERTS = ("grouped_mm", "eager")  # transformers' expert products

Documents = Sequence[tuple[Tensor, Tensor]]
Batch = tuple[Tensor, Tensor, Tensor | None]


def one_at_a_time(documents: Documents) -> list[Batch]:
    """Ids [1, n], labels [1, n] and no mask."""
    return [(tokens[None], labels[None], None) for tokens, labels in documents]


def padded(documents: Documents, slots: int) -> list[Batch]:
    """Batches of documents of similar length, padded to the longest: at most `slots` ids each.

    Ids, labels and mask are [documents, longest].
    """
    ordered = sorted(documents, key=lambda document: -document[0].numel())
    batches: list[Batch] = []
    while ordered:
        longest = ordered[0][0].numel()
        count = max(1, slots // longest)
        chosen, ordered = ordered[:count], ordered[count:]
        ids = torch.zeros(len(chosen), longest, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (tokens, targets) in enumerate(chosen):
            ids[row, : tokens.numel()] = tokens
            labels[row, : tokens.numel()] = targets
            mask[row, : tokens.numel()] = 1
        batches.append((ids, labels, mask))
    return batches


class Peer:
    """transformers' model and torch's fused AdamW."""

    def __init__(self, shape: ModelConfig) -> None:
        try:
            self.model: Any = initial(shape).to(world().device).train()
        except ImportError as error:
            raise Unavailable(str(error)) from error
        parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1]},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=OPTIMIZER.lr,
            betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
            eps=OPTIMIZER.eps,
            weight_decay=OPTIMIZER.weight_decay,
            fused=True,
        )

    def use(self, experts: str, chunk: int) -> None:
        """Choose the expert products and the chunk of the scan."""
        self.model.set_experts_implementation(experts)
        for module in self.model.modules():
            if hasattr(module, "chunk_size"):
                module.chunk_size = chunk

    def gradients(self, batches: Sequence[Batch]) -> Tensor:
        """Run forward and backward of the mean loss; returns the loss, scalar."""
        trained = sum(int((labels[:, 1:] != -100).sum()) for _, labels, _ in batches)
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=world().device)
        for ids, labels, mask in batches:
            out = self.model(
                input_ids=ids, labels=labels, attention_mask=mask, num_items_in_batch=trained
            )
            out.loss.backward()
            total += out.loss.detach()
        return total

    def step(self, batches: Sequence[Batch]) -> Tensor:
        """Run one optimizer step; returns the loss before it."""
        loss = self.gradients(batches)
        nn.utils.clip_grad_norm_(self.model.parameters(), OPTIMIZER.clip_grad)
        self.optimizer.step()
        return loss


def make_peer(
    shape: ModelConfig,
    ways: dict[int, list[Batch]],
    chosen: dict[str, Any],
) -> Callable[[], Tensor]:
    """A step of transformers' model with its fastest settings, which are written to `chosen`.

    ways: the documents' batches by number of slots per batch.
    """
    peer = Peer(shape)
    device = world().device
    moved = {
        slots: [
            (ids.to(device), labels.to(device), None if mask is None else mask.to(device))
            for ids, labels, mask in batches
        ]
        for slots, batches in ways.items()
    }

    def seconds(slots: int, experts: str, chunk: int) -> float:
        peer.use(experts, chunk)
        peer.gradients(moved[slots])  # the first call of a shape is slower
        start = time.perf_counter()
        peer.gradients(moved[slots])
        return time.perf_counter() - start

    # The settings are nearly independent, so they are tuned one after the other.
    slots, experts, chunk = min(ways, key=lambda n: abs(n - 2048)), EXPERTS[0], CHUNKS[0]
    chunk = min(CHUNKS, key=lambda n: seconds(slots, experts, n))
    experts = min(EXPERTS, key=lambda name: seconds(slots, name, chunk))
    if len(ways) > 1:
        slots = min(ways, key=lambda n: seconds(n, experts, chunk))
    peer.use(experts, chunk)
    chosen |= {
        "experts": experts,
        "chunk": chunk,
        "batches": len(ways[slots]),
        "slots": sum(ids.numel() for ids, _, _ in ways[slots]),
    }
    return lambda: peer.step(moved[slots])


def make_ours(
    shape: ModelConfig, ways: dict[int, list[PackedBatch]], chosen: dict[str, Any]
) -> Callable[[], Tensor]:
    """A step of our trainer with its fastest capacity; it returns its loss.

    ways: the same documents in packed sequences, by capacity.
    """
    probe = make_trainer(shape)

    def seconds(capacity: int) -> float:
        probe.train_step(ways[capacity])  # the first call of a shape is slower
        start = time.perf_counter()
        probe.train_step(ways[capacity])
        return time.perf_counter() - start

    capacity = min(ways, key=seconds)
    chosen |= {"capacity": capacity, "sequences": len(ways[capacity])}
    trainer = make_trainer(shape)
    return lambda: torch.tensor(trainer.train_step(ways[capacity]).loss)


def longer(batches: Sequence[PackedBatch], count: int) -> list[PackedBatch]:
    """The same documents in packed sequences that are `count` times as long."""
    found = []
    for start in range(0, len(batches), count):
        few = batches[start : start + count]
        documents = [
            Document(tokens.int(), labels != -100, "document")
            for tokens, labels in documents_of(few)
        ]
        found.append(pack_documents(documents, sum(batch.capacity for batch in few)))
    return found


def make_case(name: str, problem: Problem, chosen: dict[str, dict[str, Any]]) -> Case:
    """One case. chosen: receives the fastest settings of each row of transformers."""
    shape = problem.make_shape()
    batches = draw_batches(shape.vocab_size, problem.capacity, problem.sequences)
    documents = documents_of(batches)
    work: dict[str, Any] = {
        "flops": sum(batch_flops(shape, batch) for batch in batches),
        "tokens": sum(batch.num_tokens for batch in batches),
    }
    peers = {
        "transformers, one document at a time": {0: one_at_a_time(documents)},
        "transformers, padded batches": {slots: padded(documents, slots) for slots in SLOTS},
    }
    rows = []
    for peer, ways in peers.items():
        make = functools.partial(make_peer, shape, ways, chosen.setdefault(peer, {}))
        rows.append(Row(peer, "peer", make, **work))
    ours = {
        problem.capacity * count: longer(batches, count)
        for count in (1, 2, 4)
        if count <= problem.sequences
    }
    make_step = functools.partial(make_ours, shape, ours, chosen.setdefault(OURS, {}))
    rows.append(Row(OURS, "ours", make_step, **work))
    return Case(
        name=name,
        settings={
            "model": asdict(shape),
            "parameters": count_parameters(shape).total,
            "dtype": "float32",
            "capacity": problem.capacity,
            "sequences": problem.sequences,
            "documents": len(documents),
            "tokens": work["tokens"],
            "trained_tokens": sum(batch.num_trained() for batch in batches),
            "threads": torch.get_num_threads(),
        },
        rows=rows,
        goals=[Goal(f"{GOAL:g} x {peer}", OURS, 1 / GOAL, peer) for peer in peers],
        repeats=15,
        agree=1e-5,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = run.measuring_parser(__doc__, seconds=60.0)
    parser.add_argument("--case", choices=PROBLEMS, action="append", help="only this problem")
    options = parser.parse_args(arguments)

    def cases() -> Iterator[tuple[Case, dict[str, Any]]]:
        for name in options.case or PROBLEMS:
            problem = PROBLEMS[name]
            if options.dry_run:
                problem = Problem(problem.make_shape, 1024, 1)
            ways: dict[str, dict[str, Any]] = {}
            yield make_case(name, problem, ways), ways

    checked = "losses of the first step agree"
    return measure_cases("sft_tokens_per_s", checked, cases(), options)


if __name__ == "__main__":
    sys.exit(main())
