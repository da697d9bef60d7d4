"""Prompts with their token ids, held as arrays. The ranks of a job encode a share each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe import RolloutConfig
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.world import World
from nemocascade.types import Prompt

TokenIds = NDArray[np.int32]
"""Token ids, [n]."""
Counts = NDArray[np.int64]
"""Number of tokens of each prompt, or REJECTED or TOO_LONG; [P]."""

REJECTED, TOO_LONG = -1, -2


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


def encode_prompts(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    rollout: RolloutConfig,
    world: World | None = None,
) -> EncodedPrompts:
    """Prompts with their ids. Dropped and counted: prompts that the chat template rejects, and
    prompts longer than `max_prompt_tokens`.

    world: its ranks encode a share each, and every rank gets all; None: every prompt is encoded
    here.

    Raises DataError if all are rejected, or if calls of the prompts' tools could not be parsed.
    """
    if any(prompt.tools for prompt in prompts) and not tokenizer.template.reads_calls:
        raise DataError(
            f"{tokenizer.path}: tool calls in the form of its chat template cannot be parsed: use "
            "a template with <tool_call> blocks, or domains without tools"
        )

    def encoded(prompt: Prompt) -> list[int]:
        return tokenizer.prompt_ids(prompt.messages, prompt.tools, thinking=rollout.thinking)

    ids, counts = _encode_together(prompts, encoded, rollout.max_prompt_tokens, world)
    rejected, reason = int((counts == REJECTED).sum()), ""
    if rejected:
        first = prompts[int((counts == REJECTED).argmax())]
        try:
            encoded(first)
        except DataError as error:
            reason = f"{first.source}: {error}"
    kept = EncodedPrompts(
        [p for p, count in zip(prompts, counts.tolist(), strict=True) if count >= 0],
        ids,
        counts[counts >= 0],
    )
    if rejected and rejected == len(prompts):
        raise DataError(f"{prompts[0].domain}: no prompt can be rendered: {reason}")
    if rejected:
        LOGGER.warning(
            "%s: %d of %d prompts cannot be rendered and are dropped, the first: %s",
            prompts[0].domain,
            rejected,
            len(prompts),
            reason,
        )
    if len(kept) + rejected < len(prompts):
        LOGGER.warning(
            "%s: %d of %d prompts are longer than rollout.max_prompt_tokens(%d) and are dropped",
            prompts[0].domain,
            len(prompts) - rejected - len(kept),
            len(prompts),
            rollout.max_prompt_tokens,
        )
    return kept


def _encode_together(
    prompts: Sequence[Prompt],
    encoded: Callable[[Prompt], Sequence[int]],
    most: int,
    world: World | None,
) -> tuple[TokenIds, Counts]:
    """The ids of all prompts of at most `most` tokens, end to end, and the count of each prompt.

    encoded: raises DataError for a prompt that is rejected. world: see `encode_prompts`.
    """
    rank, ranks = (0, 1) if world is None else (world.rank, world.size)
    bounds = [len(prompts) * r // ranks for r in range(ranks + 1)]
    counts = np.zeros(len(prompts), dtype=np.int64)
    mine: list[TokenIds] = [np.zeros(0, dtype=np.int32)]
    for number in range(bounds[rank], bounds[rank + 1]):
        try:
            found = encoded(prompts[number])
        except DataError:
            counts[number] = REJECTED
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
