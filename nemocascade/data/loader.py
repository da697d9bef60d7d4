"""Packed batches for each optimizer step of each rank, and the position in the data.

The packed sequences of all epochs form one stream. Each optimizer step takes the next
`sequences_per_step` of it; rank r of R data-parallel ranks takes every R-th one, from the r-th on.
Context-parallel ranks each take their rows of the same ones.
The stream, and so the data of each step, does not depend on R. Neighbours in the stream run at
the same time, and the planner has made their work equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

from nemocascade.data.documents import DocumentSet
from nemocascade.data.epoch import pack_sequence, plan_epoch
from nemocascade.data.packing import PackingPlan, WorkModel
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import PackedBatch, pack_documents


@dataclass(frozen=True)
class Position:
    """Start of the next step, and the totals consumed before it, over all ranks."""

    epoch: int = 0
    sequence: int = 0
    """Packed sequences of `epoch` already consumed."""

    step: int = 0
    documents: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    """Documents truncated to their first `capacity` tokens."""

    dropped: int = 0
    """Documents dropped because they were too long, or trained only past `capacity`."""


@dataclass(frozen=True)
class StepInfo:
    """Statistics of one optimizer step over all data-parallel ranks."""

    epoch: int
    """Epoch of the step's first packed sequence."""

    tokens: int
    trained_tokens: int
    """Trained tokens: the divisor of the loss."""

    documents: int
    truncated: int
    fill: float
    """Fraction of the step's capacity filled by documents."""


@dataclass(frozen=True)
class _Step:
    batches: list[PackedBatch]
    info: StepInfo
    after: Position


class PackedLoader:
    """Micro-batches of one data-parallel rank."""

    def __init__(
        self,
        documents: DocumentSet,
        config: DataConfig,
        *,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        pad_id: int = 0,
        work: WorkModel | None = None,
        prefetch: bool = True,
    ) -> None:
        """Set up the loader of data-parallel rank `dp_rank` and context-parallel rank `cp_rank`.

        work: cost model of a packed sequence, used to balance ranks; None = `WorkModel()`.
        prefetch: build the next step's batches in a thread while this step trains. The batches do
            not depend on it.

        Raises DataError if the settings don't fit `dp_size`.
        """
        if config.sequences_per_step % dp_size:
            raise DataError(
                f"data.sequences_per_step ({config.sequences_per_step}) is not a multiple of the "
                f"data-parallel size ({dp_size}): change one of them"
            )
        self._documents = documents
        self._config = config
        self._seed = seed
        self._rank, self._size = dp_rank, dp_size
        self._context = cp_rank, cp_size
        self._pad_id = pad_id
        self._work = work or WorkModel()
        self._plans: dict[int, PackingPlan] = {}
        self._thread = ThreadPoolExecutor(1, "data") if prefetch else None
        self._next: Future[_Step] | None = None
        self.position = Position()
        self.info: StepInfo | None = None
        """Statistics of the step that `next_step` returned last."""

    def next_step(self) -> list[PackedBatch]:
        """Return this rank's micro-batches of the next optimizer step, equally many on every rank.

        Raises DataError if documents are too long and the settings forbid that, or drop them all.
        """
        waiting, self._next = self._next, None
        step = waiting.result() if waiting else self._make(self.position)
        self.position, self.info = step.after, step.info
        if self._thread:
            self._next = self._thread.submit(self._make, step.after)
        return step.batches

    def state_dict(self) -> dict[str, Any]:
        """The position as plain JSON. Prefetched steps do not count as consumed."""
        return {"made_from": self._made_from(), "position": asdict(self.position)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state`, on any number of ranks.

        Raises DataError that names the differences if `state` is from other packed sequences.
        """
        try:
            theirs, position = state["made_from"], Position(**state["position"])
        except (KeyError, TypeError) as error:
            raise DataError(f"not a position in the data: {error!r}") from None
        ours = self._made_from()
        different = [
            f"{name} is {ours[name]!r}, the checkpoint has {theirs.get(name)!r}"
            for name in ours
            if theirs.get(name) != ours[name]
        ]
        if different:
            raise DataError(
                "the position in the checkpoint is of other data: "
                + "; ".join(different)
                + ". Set these as they were, or start a new run from the checkpoint's weights"
            )
        self._cancel()
        self.position = position
        self.info = None

    def close(self) -> None:
        """Stop the prefetching thread."""
        self._cancel()
        if self._thread:
            self._thread.shutdown()
            self._thread = None

    def _cancel(self) -> None:
        if self._next:
            # Wait for a running prefetch: only one thread may plan epochs at a time.
            if not self._next.cancel():
                self._next.exception()
            self._next = None

    def _made_from(self) -> dict[str, Any]:
        """Everything that determines the stream of packed sequences."""
        return {
            "seed": self._seed,
            "documents": self._documents.fingerprint,
            "data.capacity": self._config.capacity,
            "data.over_long": self._config.over_long,
            "data.balance_group": self._config.balance_group,
            "work": [self._work.linear, self._work.quadratic],
        }

    def _plan(self, epoch: int) -> PackingPlan:
        plan = self._plans.get(epoch)
        if plan is None:
            plan = plan_epoch(
                self._documents, self._config, self._work, seed=self._seed, epoch=epoch
            )
            LOGGER.info("epoch %d: %s", epoch, plan.describe())
            # A step needs one epoch, or two where it crosses the boundary between them.
            self._plans = {e: p for e, p in self._plans.items() if e == epoch - 1} | {epoch: plan}
        return plan

    def _make(self, start: Position) -> _Step:
        config = self._config
        batches: list[PackedBatch] = []
        now = start
        for i in range(config.sequences_per_step):
            plan = self._plan(now.epoch)
            if i % self._size == self._rank:
                whole = pack_sequence(self._documents, plan, now.sequence, pad_id=self._pad_id)
                batches.append(whole.shard(*self._context))
            now = self._after(now, plan)
        now = replace(now, step=start.step + 1)
        tokens = now.tokens - start.tokens
        info = StepInfo(
            epoch=start.epoch,
            tokens=tokens,
            trained_tokens=now.trained_tokens - start.trained_tokens,
            documents=now.documents - start.documents,
            truncated=now.truncated - start.truncated,
            fill=tokens / (config.sequences_per_step * config.capacity),
        )
        return _Step(batches, info, now)

    def _after(self, position: Position, plan: PackingPlan) -> Position:
        """Return the position after the packed sequence at `position`."""
        numbers = plan.bin(position.sequence)
        counted = replace(
            position,
            sequence=position.sequence + 1,
            documents=position.documents + len(numbers),
            tokens=position.tokens + int(plan.fills[position.sequence]),
            trained_tokens=position.trained_tokens
            + int(self._documents.trained_tokens(numbers, plan.capacity).sum()),
            truncated=position.truncated
            + int((self._documents.lengths[numbers] > plan.capacity).sum()),
        )
        if counted.sequence < len(plan):
            return counted
        return replace(
            counted,
            epoch=counted.epoch + 1,
            sequence=0,
            dropped=counted.dropped + len(plan.dropped),
        )


class HeldoutLoader:
    """Every held-out document once, in a fixed order. Iteration yields steps of micro-batches."""

    def __init__(
        self,
        documents: DocumentSet,
        config: DataConfig,
        *,
        dp_rank: int = 0,
        dp_size: int = 1,
        cp_rank: int = 0,
        cp_size: int = 1,
        pad_id: int = 0,
        microbatch_multiple: int = 1,
    ) -> None:
        """Set up the loader of data-parallel rank `dp_rank` and context-parallel rank `cp_rank`.

        microbatch_multiple: the pipeline schedule needs a multiple of this many micro-batches.

        A rank without sequences left gets batches of padding, so all ranks run equally many
        micro-batches.
        """
        self._documents = documents
        self._config = config
        self._rank, self._size = dp_rank, dp_size
        self._context = cp_rank, cp_size
        self._pad_id = pad_id
        self._multiple = microbatch_multiple
        self._plan = plan_epoch(documents, config, WorkModel(), seed=0, epoch=0)
        LOGGER.info("held out: %s", self._plan.describe())

    def __len__(self) -> int:
        """Number of steps."""
        return -(-len(self._plan) // self._config.sequences_per_step)

    def __iter__(self) -> Iterator[list[PackedBatch]]:
        per_step, total = self._config.sequences_per_step, len(self._plan)
        for start in range(0, total, per_step):
            count = min(per_step, total - start)
            rounds = -(-count // (self._size * self._multiple)) * self._multiple
            mine = (start + i * self._size + self._rank for i in range(rounds))
            yield [self._batch(i if i < start + count else None) for i in mine]

    def _batch(self, index: int | None) -> PackedBatch:
        if index is None:
            whole = pack_documents([], self._config.capacity, pad_id=self._pad_id)
        else:
            whole = pack_sequence(self._documents, self._plan, index, pad_id=self._pad_id)
        return whole.shard(*self._context)
