"""rms_norm, forward and backward, beside torch's own operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from nemocascade_kernels import rms_norm
from nemocascade_kernels.testing import random_normal
from torch import Tensor

from benchmarks.measure import Case, Goal, Row

TORCH = "torch's rms_norm"
EPS = 1e-5
# Rows and columns: the tiny model, a small one, Nemotron 3 Nano.
CPU = ((8192, 128), (8192, 512), (8192, 2688))
GPU = ((8192, 2688), (131_072, 2688))

Norm = Callable[[Tensor, Tensor], Tensor]


def cases(suite: str, device: torch.device, tiny: bool) -> list[Case]:
    """Each matrix forward alone, and with its backward."""
    sizes = ((64, 40),) if tiny else {"cpu": CPU, "gpu": GPU}[suite]
    dtypes = (torch.float32, torch.bfloat16) if suite == "cpu" else (torch.bfloat16,)
    return [
        case(device, *size, dtype, training)
        for size in sizes
        for dtype in dtypes
        for training in (False, True)
    ]


def case(device: torch.device, rows: int, width: int, dtype: torch.dtype, training: bool) -> Case:
    x, upstream = (random_normal(rows, width, seed=s, dtype=dtype, device=device) for s in (1, 2))
    weight = random_normal(width, seed=3, dtype=dtype, device=device)

    def prepare(norm: Norm) -> Callable[[], Callable[[], Tensor]]:
        def make() -> Callable[[], Tensor]:
            leaves = [t.clone().requires_grad_(training) for t in (x, weight)]

            def call() -> Tensor:
                y = norm(*leaves)
                if training:
                    torch.autograd.grad(y, leaves, upstream)
                return y.detach()

            return call

        return make

    what = "forward and backward" if training else "forward"
    name = str(dtype).split(".")[1]
    # x is read and y written; backward reads x and the gradient and writes one.
    moved = (5 if training else 2) * x.numel() * x.element_size()
    return Case(
        f"{what}, {rows} x {width}, {name}",
        {"rows": rows, "columns": width, "dtype": name},
        [
            Row("ours", "ours", prepare(lambda a, w: rms_norm(a, w, EPS)), bytes=moved),
            Row(TORCH, "peer", prepare(lambda a, w: F.rms_norm(a, (width,), w, EPS)), bytes=moved),
        ],
        # torch's forward alone is fused on every device.
        [Goal("not slower than torch", "ours", 1.0, TORCH)] if training else [],
        calls=10,
    )
