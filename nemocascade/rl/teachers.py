"""Teachers of a distillation stage: artifacts that score by weight swap on the training model.

They need no extra process and no second model. Each rank's shard of a teacher is swapped in and
scores the step's tokens of its own domains. The student's weights are then restored bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from nemocascade.rl.batches import TrainingSequence
from nemocascade.rl.policy import PolicyRun, logprobs_of, my_batches
from nemocascade.runtime.logging import LOGGER
from nemocascade.train.weight_swap import WeightSwap
from nemocascade.types import Artifact, PackedBatch


class Teachers:
    """The teachers of a run, ready to score.

    by_domain: the teacher artifact of each domain. Domains with the same artifact share its
    weights.
    """

    def __init__(self, run: PolicyRun, by_domain: dict[str, Artifact], keep: str) -> None:
        self.run = run
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

    def read_ahead(self) -> None:
        """Prefetch the first teacher in the background, if its weights are offloaded to a file."""
        self.swap.read_ahead(self.names[0])

    def in_turn(self, sequences: Sequence[TrainingSequence]) -> list[TrainingSequence]:
        """Sort the sequences by teacher; the sort is stable."""
        order = {name: i for i, name in enumerate(self.names)}
        return sorted(sequences, key=lambda s: order[self.by_domain[s.domain]])

    def batches(self, sequences: Sequence[TrainingSequence]) -> list[PackedBatch]:
        """This rank's micro-batches with teacher log-probabilities.

        sequences: sorted by `in_turn`. A batch holds sequences of one teacher, and its
        `document_ids` are their indices. Data-parallel ranks have equally many batches of each
        teacher.
        """
        parts: list[tuple[str, list[PackedBatch]]] = []
        first = 0
        for name in self.names:
            mine = [s for s in sequences if self.by_domain[s.domain] == name]
            if mine:
                parts.append((name, my_batches(self.run, mine, first=first)))
            first += len(mine)
        done: list[PackedBatch] = []
        with self.swap.away() as place:
            for number, (name, batches) in enumerate(parts):
                place(name)
                if number + 1 < len(parts):
                    self.swap.read_ahead(parts[number + 1][0])
                found: list[torch.Tensor] = logprobs_of(self.run, batches)
                done += [replace(b, teacher_logprob=t) for b, t in zip(batches, found, strict=True)]
        return done

    def close(self) -> None:
        """Drop the teachers' weights."""
        self.swap.close()
