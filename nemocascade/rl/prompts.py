"""Prompts with their token ids, held as arrays. The ranks of a job encode a share each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.world import World
from nemocascade.types import Prompt

TokenIds = NDArray[np.int32]
"""Token ids, [n]."""
Counts = NDArray[np.int64]
"""Number of tokens of each prompt, or REFUSED or TOO_LONG; [P]."""

REFUSED, TOO_LONG = -1, -2


class EncodedPrompts:
    """Prompts with their token ids, 4 bytes each.

    ids: of all prompts, end to end. counts: tokens of each.
    """

    def __init__(self, prompts: Sequence[Prompt], ids: TokenIds, counts: Counts) -> None:
        self.prompts = list(prompts)
        self._ids, self._counts = ids, counts
        self._ends = np.concatenate([[0], np.cumsum(counts)]).tolist()

    @classmethod
    def joined(cls, parts: Sequence[EncodedPrompts]) -> EncodedPrompts:
        """The prompts of all parts, in order; at least one part."""
        return cls(
            [prompt for part in parts for prompt in part.prompts],
            np.concatenate([part._ids for part in parts]),
            np.concatenate([part._counts for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[Prompt, TokenIds]:
        return self.prompts[index], self._ids[self._ends[index] : self._ends[index + 1]]

    def __iter__(self) -> Iterator[tuple[Prompt, TokenIds]]:
        for prompt, (start, end) in zip(self.prompts, pairwise(self._ends), strict=True):
            yield prompt, self._ids[start:end]


def encode_together(
    prompts: Sequence[Prompt],
    encode: Callable[[Prompt], Sequence[int]],
    most: int,
    world: World | None,
) -> tuple[TokenIds, Counts]:
    """The ids of all prompts of at most `most` tokens, end to end, and the count of each prompt.

    encode: raises DataError for a prompt that is refused. world: each of its ranks encodes a share,
    and every rank gets all; None: this process encodes every prompt.
    """
    rank, ranks = (0, 1) if world is None else (world.rank, world.size)
    bounds = [len(prompts) * r // ranks for r in range(ranks + 1)]
    counts = np.zeros(len(prompts), dtype=np.int64)
    mine: list[TokenIds] = [np.zeros(0, dtype=np.int32)]
    for number in range(bounds[rank], bounds[rank + 1]):
        try:
            found = encode(prompts[number])
        except DataError:
            counts[number] = REFUSED
            continue
        counts[number] = len(found) if len(found) <= most else TOO_LONG
        if len(found) <= most:
            mine.append(np.array(found, dtype=np.int32))
    if world is None or ranks == 1 or not prompts:
        return np.concatenate(mine), counts
    # Ranks may finish further apart than the timeout of a collective.
    world.watch.meet()
    world.sum_over_ranks(torch.from_numpy(counts))
    ends = np.concatenate([[0], np.cumsum(np.maximum(counts, 0))])[bounds]
    ids = np.zeros(int(ends[-1]), dtype=np.int32)
    ids[ends[rank] : ends[rank + 1]] = np.concatenate(mine)
    for source, (start, end) in enumerate(pairwise(ends.tolist())):
        if end > start:
            world.broadcast(torch.from_numpy(ids[start:end]), source)
    return ids, counts
