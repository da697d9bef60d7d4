"""Time of the host in a training step: it launches every operator, and waits for some results.

The host runs ahead of the device, so a micro-batch takes whichever of them takes longer. At a
synchronisation the device waits for the host's next launch.
"""

from __future__ import annotations

from nemocascade.recipe import EngineConfig, ParallelConfig

OPERATORS = {"M": 320, "*": 240, "E": 440, "-": 180}
"""Operators of a layer's forward and backward that the host dispatches, views among them: of the
dry run of one layer at the 30B model's widths (`tests/gpu_dry/budgets.json`, `nano-mamba`,
`nano-attention` and `nano-moe`), rounded to tens. Those of an MLP are counted by hand."""
DISPATCH_OPERATORS = 110
"""Further operators of an MoE layer that shares its experts with other ranks: `sft-ep2` beside
`sft` in the dry run."""
RECOMPUTED = 0.48
"""Share of a layer's operators that its recomputation repeats: `nano-moe-recompute`."""
OPERATOR_S = 10e-6
"""Seconds of the host for an operator."""
SYNCHRONISATION_S = 20e-6
"""Seconds in which a device has no work after the host has waited for it: a copy of a few bytes and
a launch, of 10 us each. Assumed."""
SYNCHRONISATIONS = {"direct": 1, "hierarchical": 2, "deepep": 1}
"""Waits of the host in an MoE layer's exchange, for the sizes of its messages; none in its
recomputation."""
EXCHANGES = {"direct": 5, "hierarchical": 13, "deepep": 4}
"""All-to-alls of a layer's forward and backward: rows and results both ways, and their counts; over
two hops also their routing (`megatron/layers/dispatch.py`, `node_dispatch.py`)."""
REPEATED = {"direct": 2, "hierarchical": 5, "deepep": 2}
"""Those of a recomputed forward: the counts are kept."""


def operators(symbol: str, parallel: ParallelConfig, engine: EngineConfig) -> float:
    """Operators of a layer's forward and backward, and of its recomputation."""
    found = float(OPERATORS[symbol])
    if symbol == "E" and parallel.ep * parallel.etp > 1:
        found += DISPATCH_OPERATORS
    return found * (1.0 + RECOMPUTED * (symbol in engine.recomputed))


def exchanges(kind: str, *, recomputed: bool) -> int:
    """All-to-alls of an MoE layer for a micro-batch. kind: a key of `EXCHANGES`."""
    return EXCHANGES[kind] + REPEATED[kind] * recomputed
