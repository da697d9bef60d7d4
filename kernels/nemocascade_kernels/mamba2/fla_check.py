"""Checks of the installed fla-core: its functions, and the shapes for which it is tuned.

The first call of a kernel with new sizes measures dozens of configurations, which takes minutes.
Triton keeps the fastest on disk, so later calls, also by other processes, only read it.
"""

from __future__ import annotations

from dataclasses import replace

from nemocascade_kernels.mamba2 import fla, fla_kernels
from nemocascade_kernels.mamba2.arguments import Sizes


def check_version() -> None:
    """Raise RuntimeError if a function or argument is missing in the installed fla-core."""
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
