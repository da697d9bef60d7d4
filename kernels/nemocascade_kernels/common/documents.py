"""Boundaries of the documents of a packed microbatch, and the tables that layers derive.

Everything is computed on the host once per microbatch and shared by all layers in forward,
backward and recompute. Shape letters: T tokens, D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from nemocascade_kernels.common.transfer import to_device

V = TypeVar("V")


@dataclass(frozen=True, eq=False)
class PackedSeq:
    """Consecutive documents in T rows.

    starts, lengths: [D] int64 on the host. Padding is a document like any other.
    cu_seqlens: [D+1] int32 on the device of the activations.
    total: T. max_length: the longest document.
    """

    starts: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    total: int
    max_length: int
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def from_cu_seqlens(
        cls, cu_seqlens: Tensor | Sequence[int], device: torch.device | str | None = None
    ) -> PackedSeq:
        """Describe documents [cu[i], cu[i+1]).

        cu_seqlens: [D+1] integers from 0 to T, strictly increasing. Pass a host tensor or a
            sequence: a CUDA tensor costs a synchronisation.
        device: device of the activations; default: that of `cu_seqlens`.
        Raises ValueError if a rule is broken.
        """
        if device is None:
            device = cu_seqlens.device if isinstance(cu_seqlens, Tensor) else "cpu"
        device = torch.device(device)
        cu = torch.as_tensor(cu_seqlens).to("cpu", torch.int64)
        if cu.dim() != 1 or cu.numel() < 2 or int(cu[0]) != 0:
            raise ValueError(
                f"cu_seqlens must be [D+1] and begin with 0, got {cu.tolist()[:4]}...: "
                "pass the starts of the documents and the total at the end"
            )
        lengths = cu[1:] - cu[:-1]
        shortest = int(lengths.min())
        if shortest < 1:
            at = int(lengths.argmin())
            raise ValueError(
                f"document {at} of cu_seqlens has length {shortest}, documents hold at least one "
                "token: leave empty documents out"
            )
        total = int(cu[-1])
        if total >= 2**31:
            raise ValueError(
                f"{total} tokens in one microbatch; cu_seqlens is int32, so at most {2**31 - 1}: "
                "use a smaller capacity"
            )
        return cls(
            starts=cu[:-1].clone(),
            lengths=lengths,
            cu_seqlens=to_device([cu.to(torch.int32)], device)[0],
            total=total,
            max_length=int(lengths.max()),
        )

    @property
    def num_documents(self) -> int:
        return self.lengths.numel()

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    def cached(self, key: Hashable, make: Callable[[], V]) -> V:
        """The result of `make`, computed once per key and cached in this object."""
        if key not in self._cache:
            self._cache[key] = make()
        value: V = self._cache[key]
        return value

    def documents(self, chosen: Sequence[int] | None = None) -> list[slice]:
        """The rows of each document, or of the chosen ones."""
        starts, lengths = self.starts, self.lengths
        if chosen is not None:
            starts, lengths = starts[list(chosen)], lengths[list(chosen)]
        return [slice(a, a + n) for a, n in zip(starts.tolist(), lengths.tolist(), strict=True)]

    def document_of(self) -> Tensor:
        """The document of each row, [T] int64 on the host."""
        return self.cached(
            "document_of",
            lambda: torch.repeat_interleave(torch.arange(self.num_documents), self.lengths),
        )

    def positions_on_host(self) -> Tensor:
        """Each row's position within its document, from 0: [T] int64 on the host."""
        return self.cached(
            "positions_on_host", lambda: torch.arange(self.total) - self.starts[self.document_of()]
        )

    def positions(self) -> Tensor:
        """Each row's position within its document, from 0: [T] int64 on the device."""
        return self.cached(
            "positions", lambda: to_device([self.positions_on_host()], self.device)[0]
        )

    def check_rows(self, rows: int, what: str) -> None:
        """Raise ValueError unless `rows` is the number of rows of this pack."""
        if rows != self.total:
            raise ValueError(
                f"{what} has {rows} rows, the packed microbatch has {self.total} tokens: "
                "pass the cu_seqlens of the same microbatch"
            )
