"""Detection of stop sequences."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemocascade.rollout.engine import Sampling

Decode = Callable[[Sequence[int]], str]


class Stops:
    """The stop sequences of a run, checked on the host.

    A table finds single stop tokens. `reached` checks only rows whose token may end a longer stop
    sequence, or all rows if there are stop strings.

    decode: token ids to text; needed for stop strings.
    Raises ValueError for a stop token outside the vocabulary, or stop strings without `decode`.
    """

    def __init__(self, sampling: Sampling, vocabulary: int, decode: Decode | None) -> None:
        foreign = {t for s in sampling.stop_tokens for t in s if not 0 <= t < vocabulary}
        if foreign:
            raise ValueError(
                f"stop tokens {sorted(foreign)} are not below the vocabulary of {vocabulary}"
            )
        if sampling.stop_strings and decode is None:
            raise ValueError("stop strings need the engine's `decode`: ids to text")
        self._ends = torch.zeros(vocabulary, dtype=torch.bool)
        self._suspects = torch.zeros_like(self._ends)
        for sequence in sampling.stop_tokens:
            table = self._ends if len(sequence) == 1 else self._suspects
            table[sequence[-1]] = True
        self._sequences = [list(s) for s in sampling.stop_tokens if len(s) > 1]
        self._strings = sampling.stop_strings
        self._decode = decode

    def certain(self, tokens: Tensor) -> Tensor:
        """[n] bool: rows whose token is a stop sequence by itself."""
        return self._ends[tokens]

    def doubtful(self, tokens: Tensor) -> Tensor | None:
        """[n] bool: rows to be checked with `reached`; None if there are never any."""
        if self._strings:
            return torch.ones_like(tokens, dtype=torch.bool)
        return self._suspects[tokens] if self._sequences else None

    def reached(self, written: Tensor) -> bool:
        """True if the policy's last turn, [m] ids, ends with a stop sequence."""
        longest = max((len(s) for s in self._sequences), default=0)
        tail = written[-longest:].tolist() if longest else []
        if any(tail[-len(s) :] == s for s in self._sequences):
            return True
        if not self._strings or self._decode is None:
            return False
        # A stop string may begin inside a token, and a token may add no text. So the search covers
        # as many tokens as the string has bytes, plus a few.
        reach = max(len(s.encode()) for s in self._strings) + 4
        ids = written[-reach:].tolist()
        text = self._decode(ids)
        return any(s in text for s in self._strings)
