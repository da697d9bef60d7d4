"""fla-core's kernels are tuned and checked before the first step."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.fla import FlaDouble
from helpers.mamba2 import Shape
from nemocascade_kernels import PackedSeq
from nemocascade_kernels.mamba2 import fla, fla_check
from nemocascade_kernels.mamba2.op import Mixer

from nemocascade.megatron.accelerators import AcceleratorError
from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.warm_up import warm_up
from nemocascade.megatron.workspace import mixer_sizes
from nemocascade.recipe import EngineConfig, ModelConfig, ParallelConfig
from nemocascade.runtime.world import World

MODEL = ModelConfig(
    pattern="M", mamba_heads=8, mamba_head_dim=4, mamba_state=8, mamba_groups=4, mamba_conv=3
)
ON = Accelerators(fla=True)
ENGINE = EngineConfig(precision="fp32")
PHASE = "tuning of fla-core's kernels"


class Meetings:
    """A watchdog that records its calls in order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def enter(self, phase: str) -> None:
        self.events.append(phase)

    def progress(self, progress: str) -> None:
        self.events.append(progress)

    def meet(self) -> None:
        self.events.append("meeting")


def world_of(tp: int = 1, other: str = "") -> tuple[World, Meetings]:
    """Rank 0 of two, whose neighbour reports `other`."""

    class OneOfTwo(World):
        def all_gather_object(self, value: Any) -> list[Any]:
            return [value, other]

    watch: Any = Meetings()
    groups: Any = None
    return OneOfTwo(0, 2, torch.device("cpu"), ParallelConfig(tp=tp), groups, watch), watch


def test_a_step_meets_no_kernel_that_was_not_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the run's capacity, where the heads are scanned in parts, and below it."""
    double = FlaDouble()
    double.install(monkeypatch)
    capacity = 100
    monkeypatch.setattr(fla, "_PART_ELEMENTS", capacity * 8)
    monkeypatch.setattr("nemocascade.megatron.warm_up._ROWS", 20)
    world, watch = world_of(tp=2)
    assert warm_up(ON, MODEL, ENGINE, world, capacity) == ON
    assert watch.events == [PHASE, "4 heads", "1 heads", "meeting"]
    tuned, sizes = set(double.keys), mixer_sizes(MODEL, 2)
    shape = Shape(sizes.heads, sizes.head_dim, sizes.groups, sizes.state, MODEL.mamba_conv)
    for rows, parts in ((capacity, 4), (20, 1)):
        assert len(fla.parts(rows, sizes)) == parts
        packed = PackedSeq.from_cu_seqlens([0, rows // 3, rows])
        leaves = [t.requires_grad_() for t in shape.inputs(rows, torch.float32)]
        Mixer.apply(fla, packed, sizes, *leaves).sum().backward()
    assert double.keys == tuned


def test_one_rank_of_a_node_tunes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    world, watch = world_of()
    monkeypatch.setattr(fla_check, "check_shape", lambda *_a, **_k: watch.events.append("check"))
    monkeypatch.setattr(fla_check, "tuning_cache", lambda: "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    warm_up(ON, MODEL, ENGINE, world, 64)
    assert watch.events == [PHASE, "check", "8 heads", "meeting"]
    watch.events.clear()
    monkeypatch.setenv("LOCAL_RANK", "3")
    warm_up(ON, MODEL, ENGINE, world, 64)
    assert watch.events == [PHASE, "meeting", "check", "8 heads"]


@pytest.mark.parametrize(
    ("folder", "text"), [("/cache", "kept in /cache"), ("", "not kept: unset FLA_CACHE_RESULTS")]
)
def test_the_log_says_where_the_configurations_are(
    folder: str, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fla_check, "check_shape", lambda *_a, **_k: None)
    monkeypatch.setattr(fla_check, "tuning_cache", lambda: folder)
    caplog.set_level(logging.INFO)
    warm_up(ON, MODEL, ENGINE, world_of()[0], 64)
    assert text in caplog.text


@pytest.mark.parametrize("here", [True, False])
def test_a_failure_on_any_rank_gives_torch_on_all(
    here: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check(*_arguments: Any, **_settings: Any) -> None:
        if here:
            raise RuntimeError("its gradient of A differs from torch's")

    monkeypatch.setattr(fla_check, "check_shape", check)
    world, _ = world_of(other="" if here else "OSError: no disk")
    reason = "rank 0: RuntimeError: its gradient of A" if here else "rank 1: OSError: no disk"
    assert warm_up(ON, MODEL, ENGINE, world, 64) == replace(ON, fla=False)
    assert "torch's scan runs instead" in caplog.text
    assert reason in caplog.text
    with pytest.raises(AcceleratorError, match=rf"{reason}.*set --engine\.fla to auto or off"):
        warm_up(ON, MODEL, replace(ENGINE, fla="on"), world, 64)


def test_nothing_is_tuned_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_arguments: Any, **_settings: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(fla_check, "check_shape", check)
    world, watch = world_of()
    off = Accelerators()
    assert warm_up(off, MODEL, ENGINE, world, 64) is off
    assert warm_up(ON, replace(MODEL, pattern="*E"), ENGINE, world, 64) is ON
    assert watch.events == []
