"""Cost of ranks that run the bins of a packing in lockstep."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def lockstep_cost(costs: NDArray[np.float64], ranks: int) -> float:
    """Time of `ranks` ranks that run bins of costs [B] in parallel, relative to the ideal: 1 is
    perfect, and that of no work.

    `sum_k ranks * max(costs of bins k*ranks .. (k+1)*ranks - 1) / sum(costs)`: in each round all
    ranks wait for the slowest. A last round with too few bins counts in full.
    """
    total = float(costs.sum())
    if total == 0:
        return 1.0
    padded = np.zeros(-(-costs.size // ranks) * ranks)
    padded[: costs.size] = costs
    return ranks * float(padded.reshape(-1, ranks).max(axis=1).sum()) / total
