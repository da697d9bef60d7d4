"""Records copies to a GPU on a machine without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor


class Transfers:
    """While patched, copies to a CUDA device stay on the CPU and are recorded.

    copies: for each, True if it was asynchronous: from pinned memory, with `non_blocking`.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.copies: list[bool] = []
        self._pinned: list[Tensor] = []
        to = Tensor.to

        def pin_memory(tensor: Tensor) -> Tensor:
            self._pinned.append(tensor.clone())
            return self._pinned[-1]

        def recorded(tensor: Tensor, *args: Any, **settings: Any) -> Tensor:
            target = args[0] if args else settings["device"]
            if isinstance(target, torch.device) and target.type == "cuda":
                pinned = any(tensor is p for p in self._pinned)
                self.copies.append(pinned and bool(settings.get("non_blocking")))
                return tensor.clone()
            return to(tensor, *args, **settings)

        patch.setattr(Tensor, "pin_memory", pin_memory)
        patch.setattr(Tensor, "to", recorded)
