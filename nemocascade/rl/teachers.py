"""Teachers of a distillation stage: artifacts that score by weight swap on the training model.

They need no extra process and no second model. Each rank's shard of a teacher is swapped in and
scores the step's tokens of its own domains. The student's weights are then restored bit for bit.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemocascade.rl.batches import (
    PlannedSequence,
    TrainingSequence,
    capacity_grain,
    fit_capacity,
    microbatch_multiple,
)
from nemocascade.rl.exchange import send_sequences
from nemocascade.rl.policy import PolicyRun, layout_of, logprobs_of, packed_bins
from nemocascade.rl.teacher_states import StateScores
from nemocascade.runtime.logging import LOGGER
from nemocascade.train.evaluation import whole_rows
from nemocascade.train.weight_swap import WeightSwap
from nemocascade.types import Artifact, PackedBatch


class Teachers:
    """The teachers of a run, ready to score.

    by_domain: the teacher artifact of each domain. Domains with the same artifact share its
    weights. states: keep last hidden states for an exact divergence in place of log-probabilities.
    """

    def __init__(
        self, run: PolicyRun, by_domain: dict[str, Artifact], keep: str, *, states: bool = False
    ) -> None:
        self.run = run
        self.scores: LogprobScores | StateScores
        self.scores = StateScores(run) if states else LogprobScores(run)
        folder = Path(run.recipe.run_dir) / "teachers" if keep == "disk" else None
        self.swap = WeightSwap(run.world, run.trainer.chunks, folder)
        self.by_domain = {domain: a.digest for domain, a in by_domain.items()}
        for digest, artifact in {a.digest: a for a in by_domain.values()}.items():
            self.swap.load(digest, artifact)
            taught = ", ".join(d for d, name in self.by_domain.items() if name == digest)
            LOGGER.info("teacher of %s: %s (%s)", taught, artifact.folder, digest[:12])

    @property
    def names(self) -> list[str]:
        """Digests, in the order of their first domain: the order of the weight swaps."""
        return list(dict.fromkeys(self.by_domain.values()))

    def prefetch(self) -> None:
        """Read the first teacher in the background, if its weights are offloaded to a file."""
        self.swap.prefetch(self.names[0])

    def batches(
        self, planned: Sequence[PlannedSequence]
    ) -> tuple[list[PackedBatch], dict[str, float]]:
        """This rank's micro-batches of training with the teachers' scores, and the fraction of
        their rows that hold tokens, `fill`, beside that of the teachers' own, `teacher_fill`.

        Training packs all sequences at once. Each teacher packs its own, on all data-parallel
        ranks, and its scores go by sequence to the batches of training. The `document_ids` are
        numbers of `planned`.
        """
        run, mine = self.run, self.run.world.dp_rank
        training = self._fitted(list(range(len(planned))), planned)
        taught: dict[str, _Packing] = {}
        for name in self.names:
            numbers = [i for i, p in enumerate(planned) if self.by_domain[p.domain] == name]
            if numbers:
                taught[name] = self._fitted(numbers, planned)
        every = [training, *taught.values()]
        sequences = send_sequences(run.world, planned, [packing.layout for packing in every])
        found: dict[int, torch.Tensor] = {}
        with self.swap.away() as place:
            for number, (name, packing) in enumerate(taught.items()):
                place(name)
                if number + 1 < len(taught):
                    self.swap.prefetch([*taught][number + 1])
                batches = packed_bins(run, sequences, packing.layout[mine], packing.capacity)
                found |= self.scores.score(name, batches, sequences)
        self._send(found, planned, training, taught.values())
        batches = packed_bins(run, sequences, training.layout[mine], training.capacity)
        names = {i: self.by_domain[p.domain] for i, p in enumerate(planned)}
        fills = {"fill": training.fill, "teacher_fill": _fill(taught.values())}
        return self.scores.attached(batches, found, sequences, names), fills

    def _fitted(self, numbers: Sequence[int], planned: Sequence[PlannedSequence]) -> _Packing:
        """A packing of some sequences, with the smallest capacity for its number of rounds."""
        run = self.run
        chosen = [planned[i] for i in numbers]
        lengths = [p.rollout.tokens for p in chosen]
        capacity = fit_capacity(
            lengths,
            run.recipe.capacity,
            ranks=run.world.dp_size,
            multiple=microbatch_multiple(run.world.parallel),
            grain=capacity_grain(
                run.recipe.capacity, run.world.parallel, run.trainer.config.shape.mamba_conv
            ),
        )
        layout = [
            [[numbers[i] for i in bin_] for bin_ in bins]
            for bins in layout_of(run, chosen, capacity)
        ]
        return _Packing(layout, capacity, sum(lengths))

    def _send(
        self,
        found: dict[int, torch.Tensor],
        planned: Sequence[PlannedSequence],
        training: _Packing,
        taught: Iterable[_Packing],
    ) -> None:
        """Add the scores of the sequences that this rank trains and did not score."""
        world, scores = self.run.world, self.scores
        holders = scores.holders
        replicas = [[rank for rank in ranks if rank in holders] for ranks in world.replicas()]
        scored = {i: ranks for p in taught for i, ranks in p.ranks(replicas).items()}
        trained = training.ranks(replicas)
        order = sorted(trained)
        arrived = world.deliver(
            [scored[i][0] for i in order],
            [scores.bytes_of(planned[i]) for i in order],
            [set(trained[i]) - set(scored[i]) for i in order],
            lambda k: found[order[k]].contiguous().view(torch.uint8),
        )
        found |= {order[k]: scores.read(data) for k, data in arrived.items()}

    def close(self) -> None:
        """Drop the teachers' weights."""
        self.swap.close()


@dataclass(frozen=True)
class _Packing:
    """A layout from `lay_out`, the capacity of its batches, and the number of its tokens."""

    layout: list[list[list[int]]]
    capacity: int
    tokens: int

    @property
    def rows(self) -> int:
        """Rows of all batches."""
        return self.capacity * sum(map(len, self.layout))

    @property
    def fill(self) -> float:
        """Fraction of the rows that hold tokens."""
        return self.tokens / self.rows

    def ranks(self, replicas: Sequence[list[int]]) -> dict[int, list[int]]:
        """The ranks that each sequence is on."""
        placed = zip(replicas, self.layout, strict=True)
        return {i: ranks for ranks, bins in placed for bin_ in bins for i in bin_}


def _fill(packings: Collection[_Packing]) -> float:
    return sum(p.tokens for p in packings) / sum(p.rows for p in packings)


class LogprobScores:
    """Scores of documents: the log-probability of each row's target, [n]; 0 in untrained rows."""

    def __init__(self, run: PolicyRun) -> None:
        self.run = run
        self.holders = set(range(run.world.size))
        """The ranks that need scores."""

    def score(
        self,
        name: str,
        batches: Sequence[PackedBatch],
        sequences: Mapping[int, TrainingSequence],
    ) -> dict[int, torch.Tensor]:
        """Scores of the documents of this rank's batches under the weights in place, by document.
        Every rank calls it."""
        found: dict[int, torch.Tensor] = {}
        for batch, rows in zip(batches, logprobs_of(self.run, batches), strict=True):
            found |= _by_document(batch, whole_rows(self.run.world, rows, batch))
        return found

    def bytes_of(self, planned: PlannedSequence) -> int:
        """Size of a document's scores."""
        return 4 * planned.rollout.tokens

    def read(self, data: torch.Tensor) -> torch.Tensor:
        """Scores from their bytes."""
        return data.view(torch.float32)

    def attached(
        self,
        batches: Sequence[PackedBatch],
        found: Mapping[int, torch.Tensor],
        sequences: Mapping[int, TrainingSequence],
        teacher_of: Mapping[int, str],
    ) -> list[PackedBatch]:
        """A rank's rows of packs with the scores of their documents. teacher_of: by document."""
        return [_taught(batch, found) for batch in batches]


def _by_document(batch: PackedBatch, rows: torch.Tensor) -> dict[int, torch.Tensor]:
    """The rows [C] of each document of a batch, by its id."""
    bounds = itertools.pairwise(batch.cu_seqlens.tolist())
    return {i: rows[a:b] for i, (a, b) in zip(batch.document_ids, bounds, strict=False)}


def _taught(batch: PackedBatch, found: Mapping[int, torch.Tensor]) -> PackedBatch:
    """A rank's rows of a pack with the teachers' log-probabilities of its documents."""
    teacher = torch.zeros(batch.capacity)
    for i, rows in _by_document(batch, teacher).items():
        rows.copy_(found[i])
    return replace(batch, teacher_logprob=torch.cat([teacher[s] for s in batch.segments]))
