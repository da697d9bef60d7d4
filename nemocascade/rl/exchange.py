"""Exchange of rollouts between ranks.

Every rank gets the outcome of every rollout: its lengths, flags, reward, and the numbers in its
verdict that metrics need. Tokens and texts stay on the rank that verified the rollout. Once the
batches are laid out, each sequence goes once, as bytes of tensors, to the ranks that train it.
Texts go to the ranks that judge or log them.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import torch

from nemocascade.rl.batches import PlannedSequence, TrainingSequence
from nemocascade.rl.rollouts import (
    DROPPED,
    NOT_SCORED,
    ChoiceShape,
    Rollout,
    TokenSequence,
    Transcript,
    packed_bytes,
)
from nemocascade.runtime.world import World
from nemocascade.types import Fault, Verdict

DETAILS = ("unanswered", "unparsed", "pairs")
"""Numbers in a verdict's details that every rank gets, for metrics."""
OUTCOME_BYTES = 8 * (9 + len(DETAILS))
"""Size of an outcome."""

_FAULTS: tuple[Fault | None, ...] = (None, *get_args(Fault))
_TRUNCATED, _DROPPED, _SCORED, _REWARDED = 1, 2, 4, 8
_FAULT_SHIFT = 4


def share_outcomes(
    world: World, numbers: Sequence[int], found: Mapping[int, Rollout], *, partial: bool = False
) -> dict[int, Rollout]:
    """The outcomes of the rollouts `numbers`, by number, the same on every rank.

    found: this rank's rollouts, by number. It stays their owner and keeps their sequences and
    transcripts. Every rank calls it with the same numbers. Raises RuntimeError if a rollout is on
    no rank, unless `partial`.
    """
    table = np.zeros((len(numbers), OUTCOME_BYTES // 8), dtype=np.int64)
    for row, number in enumerate(numbers):
        if number in found:
            table[row] = _row(found[number], world.rank)
    # Ranks may finish further apart than the timeout of a collective.
    world.watch.meet()
    # Each row has one writer, so the sum of the bits is exact.
    world.sum_over_ranks(torch.from_numpy(table))
    known = {n: row for n, row in zip(numbers, table, strict=True) if row[0]}
    if len(known) < len(numbers) and not partial:
        missing = [n for n in numbers if n not in known]
        raise RuntimeError(f"no rank has the rollouts {missing[:5]}")
    return {
        number: replace(_outcome(row), sequence=mine.sequence, transcript=mine.transcript)
        if (mine := found.get(number)) is not None
        else _outcome(row)
        for number, row in known.items()
    }


def _row(rollout: Rollout, rank: int) -> list[int]:
    verdict = rollout.verdict
    flags = _TRUNCATED * rollout.truncated | _DROPPED * rollout.dropped
    flags |= _SCORED * rollout.is_scored | _REWARDED * (verdict.reward is not None)
    flags |= _FAULTS.index(verdict.fault) << _FAULT_SHIFT
    details = (verdict.details.get(name, np.nan) for name in DETAILS)
    numbers = [verdict.reward or 0.0, rollout.repetition, *details]
    return [
        rank + 1,
        rollout.tokens,
        rollout.length,
        rollout.turns,
        flags,
        rollout.choices.code(),
        rollout.error_kind,
        *np.array(numbers, dtype=np.float64).view(np.int64).tolist(),
    ]


def _outcome(row: np.ndarray[Any, np.dtype[np.int64]]) -> Rollout:
    owner, tokens, length, turns, flags, choices, kind = row[:7].tolist()
    reward, repetition, *details = row[7:].view(np.float64).tolist()
    known = {n: v for n, v in zip(DETAILS, details, strict=True) if not np.isnan(v)}
    fault = _FAULTS[flags >> _FAULT_SHIFT]
    if flags & _REWARDED:
        verdict = Verdict(reward, details=known, fault=fault)
    elif flags & _DROPPED:
        verdict = DROPPED
    elif flags & _SCORED:
        verdict = Verdict(None, f"an error of kind {kind:x}", known, fault)
    else:
        verdict = NOT_SCORED
    return Rollout(
        tokens=tokens,
        length=length,
        turns=turns,
        verdict=verdict,
        truncated=bool(flags & _TRUNCATED),
        dropped=bool(flags & _DROPPED),
        repetition=repetition,
        choices=ChoiceShape.of_code(choices),
        error_kind=kind,
        owner=owner - 1,
    )


def send_transcripts(
    world: World, rollouts: Sequence[Rollout], receivers: Sequence[Collection[int]]
) -> dict[int, Transcript]:
    """Send the text of rollout k from its owner to the ranks `receivers[k]`; returns those for this
    rank, by number. Every rank calls it with the same outcomes."""
    mine = {k: r.transcript for k, r in enumerate(rollouts) if r.owner == world.rank}
    return send_objects(world, [r.owner for r in rollouts], mine, receivers)


def send_objects(
    world: World,
    owners: Sequence[int],
    mine: Mapping[int, Any],
    receivers: Sequence[Collection[int]],
) -> dict[int, Any]:
    """Send object k from rank `owners[k]` to the ranks `receivers[k]`, pickled; returns those for
    this rank, by number.

    mine: this rank's objects; those that it does not own are ignored. They hold texts and numbers,
    no tokens.
    """
    if not owners:
        return {}
    own = {k for k, rank in enumerate(owners) if rank == world.rank}
    packed = {k: pickle.dumps(mine[k]) for k in sorted(own) if set(receivers[k]) - {world.rank}}
    sizes = torch.zeros(len(owners), dtype=torch.int64)
    for k, data in packed.items():
        sizes[k] = len(data)
    world.watch.meet()
    world.sum_over_ranks(sizes)
    arrived = world.deliver(
        owners,
        sizes.tolist(),
        receivers,
        lambda k: torch.frombuffer(bytearray(packed[k]), dtype=torch.uint8),
    )
    found = {k: mine[k] for k in own if world.rank in receivers[k]}
    # The bytes are another rank's of this job.
    found |= {k: pickle.loads(data.numpy().tobytes()) for k, data in arrived.items()}
    return dict(sorted(found.items()))


def send_sequences(
    world: World,
    planned: Sequence[PlannedSequence],
    layouts: Iterable[Sequence[Sequence[list[int]]]],
) -> dict[int, TrainingSequence]:
    """The sequences that this rank needs, by number.

    layouts: from `lay_out`, numbers of `planned` by data-parallel rank and micro-batch. Each
    sequence goes once to every rank of the data-parallel ranks that a layout gives it to. Every
    rank calls it with the same plans and layouts.
    """
    replicas = world.replicas()
    receivers: list[set[int]] = [set() for _ in planned]
    for layout in layouts:
        for ranks, bins in zip(replicas, layout, strict=True):
            for number in (number for bin_ in bins for number in bin_):
                receivers[number].update(ranks)
    rollouts = [p.rollout for p in planned]

    def packed(number: int) -> torch.Tensor:
        sequence = rollouts[number].sequence
        assert sequence is not None
        return sequence.packed()

    arrived = world.deliver(
        [r.owner for r in rollouts],
        [packed_bytes(r.tokens, r.choices) for r in rollouts],
        [sorted(to) for to in receivers],
        packed,
    )
    found = {}
    for number, plan in enumerate(planned):
        if number in arrived:
            r = plan.rollout
            sequence = TokenSequence.unpacked(arrived.pop(number), r.tokens, r.choices)
            found[number] = plan.filled(sequence)
        elif world.rank in receivers[number]:
            assert plan.rollout.sequence is not None
            found[number] = plan.filled(plan.rollout.sequence)
    return found
