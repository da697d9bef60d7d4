"""Blocks of the KV cache: which are free, and how many sequences use each of the others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from nemocascade.megatron.generation.kv_cache import blocks_of


class BlockPool:
    """`count` blocks of `size` tokens. Sequences with a common prefix share its full blocks."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._users = [0] * count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        """Number of blocks that nobody uses."""
        return len(self._free)

    def needed(self, tokens: int) -> int:
        """Number of blocks of a sequence of `tokens`."""
        return blocks_of(tokens, self.size)

    def take(self, count: int) -> list[int]:
        """Take `count` free blocks.

        Raises ValueError if there are fewer.
        """
        if count > self.free:
            raise ValueError(f"{count} blocks are wanted, and {self.free} of {self.count} are free")
        found = [self._free.pop() for _ in range(count)]
        for block in found:
            self._users[block] = 1
        return found

    def share(self, blocks: Sequence[int]) -> list[int]:
        """Let one more sequence use `blocks`; returns them.

        Raises ValueError if one of them is free.
        """
        for block in blocks:
            if not self._users[block]:
                raise ValueError(f"block {block} is free: it has no tokens to share")
            self._users[block] += 1
        return list(blocks)

    def fork(self, blocks: Sequence[int], tokens: int) -> list[int]:
        """Blocks of another sequence that starts with the first `tokens` of `blocks`: full ones are
        shared, and the last one, if it is not full, is a block of its own to copy to."""
        whole, rest = divmod(tokens, self.size)
        own = self.take(1 if rest else 0)
        return self.share(blocks[:whole]) + own

    def freed_by(self, sequences: Iterable[Sequence[int]]) -> int:
        """Number of blocks that are free once sequences with these blocks have ended."""
        uses = Counter(block for blocks in sequences for block in blocks)
        return sum(self._users[block] == count for block, count in uses.items())

    def release(self, blocks: Sequence[int]) -> None:
        """End a sequence's use of `blocks`; those that nobody else uses are free.

        Raises ValueError if one of them is free already.
        """
        for block in blocks:
            if not self._users[block]:
                raise ValueError(f"block {block} is released twice")
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)
