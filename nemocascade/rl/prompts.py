"""Prompts with their token ids, held as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from nemocascade.types import Prompt

TokenIds = NDArray[np.int32]
"""Token ids of a prompt, [n]."""


class EncodedPrompts:
    """Prompts with their token ids: 4 bytes a token, in one array."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self._ids = np.zeros(1024, dtype=np.int32)
        self._ends = [0]

    def append(self, prompt: Prompt, ids: Sequence[int] | TokenIds) -> None:
        """Add a prompt."""
        start, end = self._ends[-1], self._ends[-1] + len(ids)
        if end > self._ids.size:
            grown = np.zeros(max(end, 3 * self._ids.size // 2), dtype=np.int32)
            grown[:start] = self._ids[:start]
            self._ids = grown
        self._ids[start:end] = ids
        self._ends.append(end)
        self.prompts.append(prompt)

    def extend(self, others: Iterable[tuple[Prompt, TokenIds]]) -> None:
        """Add prompts."""
        for prompt, ids in others:
            self.append(prompt, ids)

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[Prompt, TokenIds]:
        return self.prompts[index], self._ids[self._ends[index] : self._ends[index + 1]]

    def __iter__(self) -> Iterator[tuple[Prompt, TokenIds]]:
        for prompt, (start, end) in zip(self.prompts, pairwise(self._ends), strict=True):
            yield prompt, self._ids[start:end]
