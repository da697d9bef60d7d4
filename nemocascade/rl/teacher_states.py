"""Teachers' hidden states in place of their log-probabilities: what an exact divergence needs.

A state of H numbers represents the distribution over the vocabulary that the teacher's LM head
makes of it. Only rows that train are kept, on the host of the last pipeline stage's ranks; the
heads stay on their devices from scoring to the end of the step.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade.rl.batches import PlannedSequence, TrainingSequence
from nemocascade.rl.policy import PolicyRun
from nemocascade.train.evaluation import last_states
from nemocascade.types import PackedBatch, TeacherStates


class StateScores:
    """Scores of documents: the last hidden states of the rows that train, [n, H]."""

    def __init__(self, run: PolicyRun) -> None:
        self.run = run
        world = run.world
        table = torch.zeros(world.size, dtype=torch.int64)
        table[world.rank] = int(world.is_last_stage)
        self.holders = set(world.sum_over_ranks(table).nonzero()[:, 0].tolist())
        """The ranks that need states: those of the last pipeline stage."""
        self._heads: dict[str, Tensor] = {}
        self._dtype: torch.dtype = run.trainer.config.params_dtype

    def score(
        self,
        name: str,
        batches: Sequence[PackedBatch],
        sequences: Mapping[int, TrainingSequence],
    ) -> dict[int, Tensor]:
        """States of the documents of this rank's batches under the weights in place, by document.

        name: of the teacher, whose head is kept. Every rank calls it; the result is {} on all but
        the last pipeline stage.
        """
        run = self.run
        states = last_states(run.world, run.trainer.config, run.trainer.chunks, batches)
        if not run.world.is_last_stage:
            return {}
        self._heads[name] = run.trainer.modules[-1].lm_head().detach().clone()
        found: dict[int, Tensor] = {}
        for batch, own in zip(batches, states, strict=True):
            found |= self._by_document(batch, own, sequences)
        return found

    def _by_document(
        self, batch: PackedBatch, own: Tensor, sequences: Mapping[int, TrainingSequence]
    ) -> dict[int, Tensor]:
        """States of whole documents from those of this rank's rows that train, `own` [N, H]."""
        number = torch.full(batch.tokens.shape, -1)
        number[batch.token_weight != 0] = torch.arange(own.shape[0])
        places = list(_own_rows(batch, sequences))
        counts = [total for _, _, _, total in places]
        whole = own.new_zeros(sum(counts), own.shape[1])
        for start, (_, rows, slots, _) in zip(_starts(counts), places, strict=True):
            whole[start + slots] = own[number[rows]]
        if batch.cp_size > 1 and whole.numel():
            # Every row has one writer, so a sum of bytes is exact.
            dist.all_reduce(whole.view(torch.uint8), group=self.run.world.groups.cp)
        parts = whole.split(counts) if counts else ()
        return {i: part for (i, _, _, _), part in zip(places, parts, strict=True)}

    def bytes_of(self, planned: PlannedSequence) -> int:
        """Size of a document's states."""
        width = self.run.trainer.config.shape.hidden_size
        return planned.rollout.length * width * self._dtype.itemsize

    def read(self, data: Tensor) -> Tensor:
        """States from their bytes."""
        return data.view(self._dtype).view(-1, self.run.trainer.config.shape.hidden_size)

    def attached(
        self,
        batches: Sequence[PackedBatch],
        found: Mapping[int, Tensor],
        sequences: Mapping[int, TrainingSequence],
        teacher_of: Mapping[int, str],
    ) -> list[PackedBatch]:
        """Batches of training with the states of their rows, by teacher, which alone hold the
        heads then. teacher_of: by document."""
        if not self.run.world.is_last_stage:
            return list(batches)
        heads, self._heads = self._heads, {}
        return [self._taught(b, found, sequences, teacher_of, heads) for b in batches]

    @staticmethod
    def _taught(
        batch: PackedBatch,
        found: Mapping[int, Tensor],
        sequences: Mapping[int, TrainingSequence],
        teacher_of: Mapping[int, str],
        heads: Mapping[str, Tensor],
    ) -> PackedBatch:
        rows: dict[str, list[Tensor]] = {}
        states: dict[str, list[Tensor]] = {}
        for i, own, slots, _ in _own_rows(batch, sequences):
            if own.numel():
                rows.setdefault(teacher_of[i], []).append(own)
                states.setdefault(teacher_of[i], []).append(found[i][slots])
        taught = tuple(
            TeacherStates(torch.cat(rows[name]), torch.cat(states[name]), heads[name])
            for name in rows
        )
        return replace(batch, taught=taught)


def _own_rows(
    batch: PackedBatch, sequences: Mapping[int, TrainingSequence]
) -> Iterator[tuple[int, Tensor, Tensor, int]]:
    """For each document: its id, this rank's rows that train, their numbers among the document's
    rows that train, and the number of these."""
    own = torch.full((batch.capacity,), -1)
    own[torch.cat([torch.arange(s.start, s.stop) for s in batch.segments])] = torch.arange(
        batch.tokens.numel()
    )
    bounds = itertools.pairwise(batch.cu_seqlens.tolist())
    for i, (start, _) in zip(batch.document_ids, bounds, strict=False):
        trained = sequences[i].written[1:].nonzero()[:, 0]
        rows = own[start + trained]
        yield i, rows[rows >= 0], (rows >= 0).nonzero()[:, 0], trained.numel()


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)][: len(counts)]
