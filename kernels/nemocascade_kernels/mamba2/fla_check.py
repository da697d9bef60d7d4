"""Checks of the installed fla-core: its functions, and its results for the shapes of a model.

The results are computed with the configurations that a run will use: the first call of a kernel
with new sizes measures dozens of them, which takes minutes. Triton keeps the fastest on disk, so
later calls, also by other processes, only read it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.mamba2 import fla, fla_kernels
from nemocascade_kernels.mamba2 import torch as own
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes
from nemocascade_kernels.mamba2.op import Mixer

# Largest errors, of the largest value. The kernels multiply in TF32, or round to bfloat16 between
# their steps; the sums over all rows collect those errors.
_TOLERANCES = {torch.float32: 2e-2, torch.bfloat16: 0.1}
_SUMS = ("conv_weight", "dt_bias", "A")


def check_version() -> None:
    """Raise RuntimeError if the installed fla-core lacks a function or an argument."""
    missing = fla_kernels.missing_arguments()
    if missing:
        raise RuntimeError(
            f"this version has no {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            + ": install fla-core 0.6 or newer"
        )


def tuning_cache() -> str:
    """The folder where Triton keeps the tuned configurations; empty if they are not kept."""
    import triton
    from fla.utils import FLA_CACHE_RESULTS

    return str(triton.knobs.cache.dir) if FLA_CACHE_RESULTS else ""


def shapes(s: Sizes, rows: int) -> list[Sizes]:
    """Sizes whose kernels a mixer of sizes `s` runs on up to `rows` rows: those of all heads, and
    those of one part of the scan."""
    part = fla.parts(rows, s)[0]
    heads = part.heads.stop - part.heads.start
    alone = replace(s, heads=heads, groups=part.groups.stop - part.groups.start)
    return [s] if alone == s else [s, alone]


def check_shape(
    device: torch.device, s: Sizes, *, window: int, rows: int, dtype: torch.dtype
) -> None:
    """Compare fla-core with torch's operators on a pack of `rows` rows, forward and backward.

    window: K, the rows of the convolution. dtype: of the activations; time steps are float32.
    Raises RuntimeError if they disagree, and whatever fla-core raises.
    """
    ends = sorted({0, rows, *(n for n in (1, 70, 200, 203) if n < rows)})
    packed = PackedSeq.from_cu_seqlens(ends, device)
    inputs = _draw_inputs(packed, s, window, dtype)
    upstream = torch.randn(
        rows, s.inner, generator=torch.Generator().manual_seed(1), dtype=torch.float32
    ).to(device, dtype)
    results = []
    for module in (fla, own):
        i = Inputs(*(t.clone().requires_grad_() for t in inputs))
        out = Mixer.apply(module, packed, s, *i)
        results.append([out.detach(), *torch.autograd.grad(out, i, upstream)])
    for name, a, b in zip(("output", *Inputs._fields), *results, strict=True):
        a, b = a.float(), b.float()
        error = float((a - b).abs().max() / b.abs().max())
        if not error < _TOLERANCES[dtype] * (3 if name in _SUMS else 1):
            what = name if name == "output" else f"gradient of {name}"
            raise RuntimeError(
                f"its {what} differs from torch's by {error:.1e} of the largest value"
            )


def _draw_inputs(packed: PackedSeq, s: Sizes, window: int, dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(packed.device)

    return Inputs(
        zxbcdt=draw(packed.total, s.inner + s.channels + s.heads).to(dtype),
        conv_weight=draw(s.channels, window).to(dtype),
        conv_bias=draw(s.channels).to(dtype),
        dt_bias=draw(s.heads) - 1,
        A=-draw(s.heads).exp(),
        D=draw(s.heads),
        norm_weight=draw(s.inner).to(dtype),
    )
