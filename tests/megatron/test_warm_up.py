"""The kernels of Mamba-2's mixer are tuned and checked before the first step."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.fla import FlaDouble
from helpers.mamba2 import Shape
from nemocascade_kernels import PackedSeq
from nemocascade_kernels.backends import interpreting
from nemocascade_kernels.mamba2 import check, fla, fla_check, triton_launch
from nemocascade_kernels.mamba2.op import Mixer

from nemocascade.megatron import warm_up as warm_up_module
from nemocascade.megatron.accelerators import AcceleratorError
from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.warm_up import warm_up
from nemocascade.megatron.workspace import mixer_sizes
from nemocascade.recipe import EngineConfig, ModelConfig, ParallelConfig
from nemocascade.runtime.world import World

MODEL = ModelConfig(
    pattern="M", mamba_heads=8, mamba_head_dim=4, mamba_state=8, mamba_groups=4, mamba_conv=3
)
FLA = Accelerators(mamba2="fla")
TRITON = Accelerators(mamba2="triton")
ENGINE = EngineConfig(precision="fp32")
PHASE = "check of fla-core"


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


@pytest.fixture(autouse=True)
def works(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla-core is installed, and its device is one that it takes."""
    monkeypatch.setattr(warm_up_module, "fla_limitation", lambda *_a: "")


def world_of(tp: int = 1, other: str = "", has: str | None = None) -> tuple[World, Meetings]:
    """Rank 0 of two, whose neighbour reports `other`, and has the implementation `has`, or that of
    rank 0."""

    class OneOfTwo(World):
        def all_gather_object(self, value: Any) -> list[Any]:
            if value in ("triton", "fla", "torch"):
                return [value, has or value]
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
    assert warm_up(FLA, MODEL, ENGINE, world, capacity) == FLA
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
    monkeypatch.setattr(check, "check_shape", lambda *_a, **_k: watch.events.append("check"))
    monkeypatch.setattr(fla_check, "tuning_cache", lambda: "")
    monkeypatch.setenv("LOCAL_RANK", "0")
    warm_up(FLA, MODEL, ENGINE, world, 64)
    assert watch.events == [PHASE, "check", "8 heads", "meeting"]
    watch.events.clear()
    monkeypatch.setenv("LOCAL_RANK", "3")
    warm_up(FLA, MODEL, ENGINE, world, 64)
    assert watch.events == [PHASE, "meeting", "check", "8 heads"]


@pytest.mark.parametrize(
    ("folder", "text"), [("/cache", "kept in /cache"), ("", "not kept: unset FLA_CACHE_RESULTS")]
)
def test_the_log_says_where_the_configurations_are(
    folder: str, text: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(check, "check_shape", lambda *_a, **_k: None)
    monkeypatch.setattr(fla_check, "tuning_cache", lambda: folder)
    caplog.set_level(logging.INFO)
    warm_up(FLA, MODEL, ENGINE, world_of()[0], 64)
    assert text in caplog.text


@pytest.mark.parametrize("here", [True, False])
def test_a_failure_on_any_rank_gives_torch_on_all(
    here: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_arguments: Any, **_settings: Any) -> None:
        if here:
            raise RuntimeError("its gradient of A differs from torch's")

    monkeypatch.setattr(check, "check_shape", fail)
    world, _ = world_of(other="" if here else "OSError: no disk")
    reason = "rank 0: RuntimeError: its gradient of A" if here else "rank 1: OSError: no disk"
    assert warm_up(FLA, MODEL, ENGINE, world, 64) == replace(FLA, mamba2="torch")
    assert "torch's scan runs instead" in caplog.text
    assert reason in caplog.text
    with pytest.raises(AcceleratorError, match=rf"{reason}.*set --engine\.fla to auto or off"):
        warm_up(FLA, MODEL, replace(ENGINE, fla="on"), world, 64)


def test_nothing_is_tuned_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: Any, **_settings: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(check, "check_shape", fail)
    world, watch = world_of()
    off = Accelerators()
    assert warm_up(off, MODEL, ENGINE, world, 64) is off
    torch_only = Accelerators(mamba2="torch")
    assert warm_up(torch_only, MODEL, ENGINE, world, 64) is torch_only
    assert warm_up(FLA, replace(MODEL, pattern="*E"), ENGINE, world, 64) is FLA
    assert watch.events == []


WIDE = replace(MODEL, mamba_heads=2, mamba_head_dim=16, mamba_state=16, mamba_groups=1)


@pytest.mark.skipif(not interpreting(), reason="on a GPU the kernels need tensors there")
def test_triton_is_checked_by_its_results(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its kernels run, and a wrong one is replaced by fla-core, on every rank."""
    monkeypatch.setattr(warm_up_module, "_ROWS", 20)
    world, watch = world_of()
    assert warm_up(TRITON, WIDE, ENGINE, world, 64) == TRITON
    assert watch.events == ["check of Mamba-2 in Triton", "2 heads", "meeting"]
    scan = triton_launch.Call.scan
    monkeypatch.setattr(triton_launch.Call, "scan", lambda *a: scan(*a) * 1.1)
    found = check.check_shape

    def compare(backend: str, *arguments: Any, **settings: Any) -> None:
        if backend == "triton":
            found(backend, *arguments, **settings)

    monkeypatch.setattr(check, "check_shape", compare)
    monkeypatch.setattr(fla_check, "shapes", lambda s, _rows: [s])
    monkeypatch.setattr(fla_check, "tuning_cache", lambda: "")
    assert warm_up(TRITON, WIDE, ENGINE, world, 64).mamba2 == "fla"
    assert "Mamba-2 in Triton is not used: rank 0: RuntimeError: its output differs" in caplog.text


@pytest.mark.skipif(not interpreting(), reason="on a GPU the kernels need tensors there")
def test_triton_is_checked_with_initial_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that drop the states of documents are right on new ones, and still rejected."""
    places = triton_launch._places
    monkeypatch.setattr(triton_launch, "_places", lambda *a: torch.full_like(places(*a), -1))
    sizes, device = mixer_sizes(WIDE, 1), torch.device("cpu")
    with pytest.raises(RuntimeError, match="its output with initial states differs from torch's"):
        check.check_shape("triton", device, sizes, window=3, rows=20, dtype=torch.float32)


def test_what_triton_cannot_take_falls_to_the_next(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(warm_up_module, "fla_limitation", lambda *_a: "not installed")
    world, _ = world_of()
    assert warm_up(TRITON, MODEL, ENGINE, world, 64).mamba2 == "torch"
    assert "Mamba-2 in Triton is not used: rank 0: head_dim 4 and state 8 must be" in caplog.text
    assert "fla-core is not used: rank 0: not installed" in caplog.text


def test_ranks_check_what_all_of_them_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that lacks Triton must not leave the others waiting."""
    checked: list[str] = []
    monkeypatch.setattr(check, "check_shape", lambda backend, *_a, **_n: checked.append(backend))
    monkeypatch.setattr(fla_check, "shapes", lambda sizes, _: [sizes])
    world, watch = world_of(has="torch")
    assert warm_up(TRITON, MODEL, ENGINE, world, 64).mamba2 == "torch"
    assert (checked, watch.events) == ([], [])
    assert warm_up(TRITON, MODEL, ENGINE, world_of(has="fla")[0], 64).mamba2 == "fla"
    assert warm_up(FLA, MODEL, ENGINE, world_of(has="triton")[0], 64).mamba2 == "fla"
    assert checked == ["fla", "fla"]


def test_fla_that_is_switched_off_is_not_checked(caplog: pytest.LogCaptureFixture) -> None:
    engine = replace(ENGINE, fla="off")
    caplog.set_level(logging.WARNING, "nemocascade")
    found = warm_up(TRITON, MODEL, engine, world_of(other="no kernel")[0], 64)
    assert found.mamba2 == "torch"
    assert "fla-core" not in caplog.text
