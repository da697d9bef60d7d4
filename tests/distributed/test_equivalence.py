"""Every parallel layout trains the same model: the equivalence matrix.

Steps run on the same data in fp32. At each step, a layout's loss and gradient norm must be within
1e-5, relative, of those of one process. The quick tests take three steps of four layers, on layouts
in which each two axes meet. The slow ones take ten steps of eight layers on every layout, and three
on its variants.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from typing import Any

import pytest
from helpers.equivalence import CAPACITY, LAYOUTS, STEPS, train
from helpers.pairs import SMALL, WHOLE, by_size
from helpers.ranks import run_ranks

ALONE = ("TP2", "PP2", "DP2", "CP2")
"""Axes that the quick tests take only beside another one."""
pytestmark = pytest.mark.timeout(2400)  # the first test waits for the runs of them all

FEW = 3
LEARNT = 5
"""Steps of one process after which a model has learnt something."""
TOLERANCE = 1e-5
SIZES: dict[str, dict[str, Any]] = {
    SMALL: {"pattern": "ME*E", "capacity": 128, "steps": FEW},
    WHOLE: {"pattern": "MEM*EME*", "capacity": CAPACITY, "steps": STEPS},
}


def train_each(runs: dict[str, dict[str, Any]]) -> dict[str, list[list[float]]]:
    """`train(**settings)` for each run by name, one after the other in the same ranks."""
    return {name: train(**settings) for name, settings in runs.items()}


# bf16 products are slow where the processor has none.
BF16: dict[str, Any] = {
    "engine": {"precision": "bf16"},
    "steps": FEW,
    "optimizer": {"lr": 1e-2},
}
TIED: dict[str, Any] = {"model": {"tie_embeddings": True}, "steps": FEW}
EVERY_TARGET = ("linear_qkv", "linear_proj", "in_proj", "out_proj", "shared_experts", "experts")
# The first step changes A by nothing, for B is zero: only later ones see the gradient of both.
LORA: dict[str, Any] = {
    "lora": {"rank": 4, "targets": EVERY_TARGET},
    "steps": FEW,
    "optimizer": {"lr": 1e-2},
    "model": {"init_std": 0.1},
}
ATTENTION_ONLY = {**LORA, "lora": {"rank": 4, "targets": ("linear_qkv",)}}
LORA_LAYOUTS = ("TP2", "PP2 VPP2", "TP2 ETP2", "TP2 EP2 on 2", "CP2", "EP2 ETP2")
LORA_QUICK = ("PP2 VPP2", "TP2 EP2 on 2", "CP2", "EP2 ETP2")


def runs_of(size: str) -> dict[int, dict[str, dict[str, Any]]]:
    """Settings of `train` by name, by number of ranks: starting an interpreter costs more than ten
    steps."""
    whole = size == WHOLE
    two_stages = "MEM|*EME*" if whole else "ME|*E"
    empty_chunks = "|MEM*||EME*" if whole else "|ME||*E"
    one = {} if whole else {"steps": LEARNT}
    runs: dict[int, dict[str, dict[str, Any]]] = {
        1: {
            "one": {"parallel": {}, **one},
            "one, tied": {"parallel": {}, **TIED},
            "one, bf16": {"parallel": {}, **BF16, "steps": LEARNT},
            "one, LoRA": {"parallel": {}, **LORA, "steps": LEARNT},
            "one, LoRA of attention": {"parallel": {}, **ATTENTION_ONLY},
        },
        2: {
            "LoRA, PP2 without adapters on the first stage": {
                "parallel": {"pp": 2, "pipeline_layout": two_stages},
                **ATTENTION_ONLY,
            },
            "LoRA, recompute": {"parallel": {"ep": 2}, **LORA, "engine": {"recompute": True}},
            "LoRA, plain optimizer": {
                "parallel": {"tp": 2, "etp": 2},
                **LORA,
                "optimizer": {**LORA["optimizer"], "distributed": False},
            },
            "recompute": {"parallel": {"ep": 2}, "engine": {"recompute": True}, "steps": FEW},
            "recompute ME": {
                "parallel": {"ep": 2},
                "engine": {"recompute_layers": "ME", "gc_every": 3},
                "steps": FEW,
            },
            "bf16 gradients": {
                "parallel": {"ep": 2},
                **BF16,
                "engine": {"precision": "bf16", "gradients": "bf16"},
            },
            "plain optimizer": {
                "parallel": {"ep": 2},
                "optimizer": {"distributed": False},
                "steps": FEW,
            },
            "empty chunks": {
                "parallel": {"pp": 2, "vpp": 2, "pipeline_layout": empty_chunks},
                "steps": FEW,
            },
            "DP2, tied": {"parallel": {}, **TIED},
            "PP2, tied": {"parallel": {"pp": 2}, **TIED},
            "TP2, bf16": {"parallel": {"tp": 2}, **BF16},
            "PP2 VPP2, bf16": {"parallel": {"pp": 2, "vpp": 2}, **BF16},
        },
        4: {},
    }
    for name, (ranks, parallel) in LAYOUTS.items():
        if whole or name not in ALONE:
            runs[ranks][name] = {"parallel": parallel}
    for name in LORA_LAYOUTS if whole else LORA_QUICK:
        ranks, parallel = LAYOUTS[name]
        runs[ranks][f"LoRA, {name}"] = {"parallel": parallel, **LORA}
    return {
        ranks: {name: {**SIZES[size], **settings} for name, settings in named.items()}
        for ranks, named in runs.items()
    }


@functools.cache
def results_of(size: str) -> dict[str, list[list[float]]]:
    """Losses and gradient norms of all runs, after a check that ranks agree on them."""
    found = {}
    for ranks, runs in runs_of(size).items():
        of_rank = run_ranks(train_each, ranks, {"runs": runs}, timeout_s=1200)
        assert all(r == of_rank[0] for r in of_rank), "ranks disagree on the loss"
        found.update(of_rank[0])
    return found


@pytest.fixture
def results(size: str) -> dict[str, list[list[float]]]:
    return results_of(size)


def each(names: Iterable[str], but: Collection[str] = ()) -> pytest.MarkDecorator:
    """A test of every name at each size: quick at the small one, if not in `but`."""
    names = list(names)
    return by_size([name for name in names if name not in but], names)


def worst(ours: list[list[float]], theirs: list[list[float]]) -> tuple[float, float]:
    """Largest relative difference of the losses and of the gradient norms, over steps of `ours`."""
    assert len(theirs) >= len(ours) >= FEW
    pairs = list(zip(ours, theirs[: len(ours)], strict=True))
    loss, norm = (max(abs(a[i] - b[i]) / abs(b[i]) for a, b in pairs) for i in (0, 1))
    return loss, norm


@each(LAYOUTS, but=ALONE)
def test_layout_equals_one_process(
    name: str, size: str, results: dict[str, list[list[float]]], record_property: Any
) -> None:
    loss, norm = worst(results[name], results["one"])
    if size == WHOLE:
        row = f"| {name} | {LAYOUTS[name][0]} | {loss:.1e} | {norm:.1e} |"
        record_property("equivalence", row)
    assert max(loss, norm) <= TOLERANCE


@each(["recompute", "plain optimizer", "empty chunks"])
def test_variant_equals_the_default(name: str, results: dict[str, list[list[float]]]) -> None:
    """Recomputing, not sharding the optimizer, and chunks without layers do not change training."""
    assert max(worst(results[name], results["one"])) <= TOLERANCE


@each(["recompute", "recompute ME"])
def test_recomputed_layers_give_the_same_bits(
    name: str, results: dict[str, list[list[float]]]
) -> None:
    assert results[name] == results["EP2"][:FEW]


@each(["DP2, tied", "PP2, tied"])
def test_tied_embeddings(name: str, results: dict[str, list[list[float]]]) -> None:
    assert max(worst(results[name], results["one, tied"])) <= TOLERANCE
    assert results["one, tied"] != results["one"][:FEW]


@each([*LORA_LAYOUTS, "recompute", "plain optimizer"], but=set(LORA_LAYOUTS) - set(LORA_QUICK))
def test_adapters_of_every_layout_train_alike(
    name: str, results: dict[str, list[list[float]]]
) -> None:
    assert max(worst(results[f"LoRA, {name}"], results["one, LoRA"])) <= TOLERANCE


@each(["LoRA, PP2 without adapters on the first stage"])
def test_a_pipeline_stage_may_have_no_adapter(
    name: str, results: dict[str, list[list[float]]]
) -> None:
    assert max(worst(results[name], results["one, LoRA of attention"])) <= TOLERANCE


@each(["TP2, bf16", "PP2 VPP2, bf16", "bf16 gradients"])
def test_bf16_layouts_agree(name: str, results: dict[str, list[list[float]]]) -> None:
    """bf16 rounds differently in every layout; the losses still agree to its precision."""
    assert worst(results[name], results["one, bf16"])[0] <= 5e-3


@each(["one", "one, bf16", "one, LoRA"])
def test_the_loss_falls(name: str, results: dict[str, list[list[float]]]) -> None:
    """The matrix would hold for a model that learns nothing."""
    assert results[name][-1][0] < results[name][0][0] - 0.1
