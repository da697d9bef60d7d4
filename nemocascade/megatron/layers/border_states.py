"""States that enter the segments of a pack, from the states that all segments leave.

    E_s = S_{s-1} + A_{s-1} E_{s-1}        for a document that crosses the border before segment s

A segment leaves S [h, p, n] of a zero state, and the share A [h] of the state that entered it. Up
to `MOST_GATHERED` ranks, each gathers all of them and folds those of its documents in order. Above,
an exclusive scan moves at most 2 states a rank in each round: in the first, every segment gets the
state that the previous one leaves; after that of distance d, it holds the fold of 2 d segments.
A product is made only within a document, so that a NaN stays there.

Shape letters: c ranks, h heads, p head dimension, n state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from nemocascade_kernels import PackedSeq
from torch import Tensor

from nemocascade.megatron.context import MOST_GATHERED as MOST_GATHERED
from nemocascade.megatron.context import ContextShard, GatherRanks, tie
from nemocascade.megatron.layers.dispatch import RowExchange


def entering_states(
    left: Tensor, packed: PackedSeq, shard: ContextShard, group: dist.ProcessGroup
) -> tuple[list[Tensor], Tensor]:
    """The states [h, p n] that enter those of the rank's segments that continue a document.

    left: [2, h, p n + 1], the states that the rank's segments leave, with their shares A. Also
    returns a tensor to `tie`, so that every rank runs the same collectives in backward.
    """
    form: Callable[..., Any] = _gathered if shard.size <= MOST_GATHERED else _scanned
    found: list[Tensor]
    found, last = form(left, packed, shard, group)
    return found, last


def _gathered(
    left: Tensor, _packed: PackedSeq, shard: ContextShard, group: dist.ProcessGroup
) -> tuple[list[Tensor], Tensor]:
    gathered: Tensor = GatherRanks.apply(left, group)
    entries = []
    for part in shard.parts:
        state: Tensor | None = None
        for number in range(part.number - shard.span(part.number), part.number):
            own: Tensor = gathered[shard.place(number)]
            new = own[:, :-1]
            state = new if state is None else new + own[:, -1:] * state
        if state is not None:
            entries.append(state)
    return entries, gathered


def _scanned(
    left: Tensor, packed: PackedSeq, shard: ContextShard, group: dist.ProcessGroup
) -> tuple[list[Tensor], Tensor]:
    rounds = packed.cached("rounds of border states", lambda: _rounds(shard))
    current = {p.number: own for p, own in zip(shard.parts, left, strict=True)}
    entries: dict[int, Tensor] = {}
    last = left
    for one in rounds:
        rows = [current[number].reshape(1, -1) for number in one.sources]
        sent = torch.cat(rows) if rows else left.new_empty(0, left[0].numel())
        exchange = RowExchange(list(one.sent), list(one.received), group)
        last = exchange.run(tie(sent, last), len(one.targets))
        arrived = last.view(len(one.targets), *left.shape[1:])
        for number, before in zip(one.targets, arrived, strict=True):
            own = entries.get(number)
            entries[number] = before if own is None else _fold(own, before)
        current = entries.copy()
    return [entries[p.number][:, :-1] for p in shard.parts if p.before], last


def _fold(own: Tensor, before: Tensor) -> Tensor:
    """The state and share of two neighbours, [h, p n + 1] each."""
    share = own[:, -1:]
    return torch.cat([own[:, :-1] + share * before[:, :-1], share * before[:, -1:]], dim=1)


@dataclass(frozen=True)
class _Round:
    """An exchange of the scan, for one rank.

    sources: its segments whose entries it sends, by receiving rank. targets: its segments that get
    one, by sending rank. sent, received: numbers of entries, for each rank.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    sent: tuple[int, ...]
    received: tuple[int, ...]


def _rounds(shard: ContextShard) -> list[_Round]:
    """The exchanges of a pack: as many on every rank."""
    spans = [shard.span(number) for number in range(2 * shard.size)]
    found = [_round(shard, 1, [n for n, span in enumerate(spans) if span])]
    distance = 1
    while distance < max(spans):
        targets = [n for n, span in enumerate(spans) if span > distance]
        found.append(_round(shard, distance, targets))
        distance *= 2
    return found


def _round(shard: ContextShard, distance: int, targets: list[int]) -> _Round:
    moves = [(shard.place(n - distance)[0], shard.place(n)[0], n) for n in targets]
    sent = sorted((to, n - distance) for by, to, n in moves if by == shard.rank)
    received = sorted((by, n) for by, to, n in moves if to == shard.rank)

    def counts(ends: list[tuple[int, int]]) -> tuple[int, ...]:
        return tuple(sum(rank == end for end, _ in ends) for rank in range(shard.size))

    return _Round(
        sources=tuple(n for _, n in sent),
        targets=tuple(n for _, n in received),
        sent=counts(sent),
        received=counts(received),
    )
