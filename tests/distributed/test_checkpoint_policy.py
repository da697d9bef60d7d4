"""Checkpoint policy of a run: retention, resuming, and rejected starts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoint_jobs import make_trainer
from helpers.kill_jobs import Position

from nemocascade.megatron.artifact import Provenance, write_artifact
from nemocascade.megatron.checkpoint import (
    CheckpointError,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from nemocascade.megatron.world import start_world
from nemocascade.recipe import CheckpointConfig, EngineConfig, ParallelConfig
from nemocascade.runtime.world import World
from nemocascade.train.checkpointing import Checkpoints
from nemocascade.train.trainer import Trainer


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.fixture
def trainer(world: World) -> Trainer:
    return make_trainer({}, world)


def saved(
    run_dir: Path, world: World, trainer: Trainer, steps: list[int], *, keep: int = 0
) -> Checkpoints:
    checkpoints = Checkpoints(run_dir, CheckpointConfig(keep=keep), world)
    for step in steps:
        trainer.step_number = step
        checkpoints.save(trainer, loader())
    return checkpoints


def loader() -> Any:
    return Position()


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_the_newest_are_kept(tmp_path: Path, world: World, trainer: Trainer) -> None:
    saved(tmp_path, world, trainer, [2, 4, 6, 8], keep=2)
    assert names(tmp_path) == ["latest", "step_00000006", "step_00000008"]
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints/step_00000008"


def test_a_step_is_saved_once(tmp_path: Path, world: World, trainer: Trainer) -> None:
    checkpoints = saved(tmp_path, world, trainer, [2])
    assert checkpoints.save(trainer, loader()) is None
    with pytest.raises(CheckpointError, match="is the newest checkpoint already"):
        save_checkpoint(checkpoints.root, 2, world, trainer.chunks, trainer.optimizer, {})


def test_without_a_pointer_the_newest_complete_one_counts(
    tmp_path: Path, world: World, trainer: Trainer
) -> None:
    root = saved(tmp_path, world, trainer, [2, 4]).root
    (root / "latest").unlink()
    (root / "step_00000006").mkdir()
    assert latest_checkpoint(root) == root / "step_00000004"
    assert latest_checkpoint(tmp_path / "nothing") is None


def test_a_pointer_to_nothing_is_refused(tmp_path: Path, world: World, trainer: Trainer) -> None:
    root = saved(tmp_path, world, trainer, [2]).root
    for name in ("step_00000009", "../elsewhere", ""):
        (root / "latest").write_text(name)
        with pytest.raises(CheckpointError, match="complete: step_00000002"):
            latest_checkpoint(root)
        with pytest.raises(CheckpointError, match="complete: step_00000002"):
            saved(tmp_path, world, trainer, [4])


def test_rolling_back_by_the_pointer(tmp_path: Path, world: World, trainer: Trainer) -> None:
    """A newer checkpoint that the pointer left behind is replaced when the run gets there again."""
    root = saved(tmp_path, world, trainer, [2, 4]).root
    (root / "latest").write_text("step_00000002\n")
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), world)
    checkpoints.start(trainer, loader(), resume=True)
    assert trainer.step_number == 2
    with torch.no_grad():
        next(trainer.modules[0].parameters()).fill_(0.5)
    trainer.step_number = 4
    checkpoints.save(trainer, loader())
    other = make_trainer({"seed": 9}, world)
    load_checkpoint(root / "step_00000004", world, other.chunks, other.optimizer)
    assert bool((next(other.modules[0].parameters()) == 0.5).all())


def test_resume_off_refuses_a_used_folder(tmp_path: Path, world: World, trainer: Trainer) -> None:
    checkpoints = saved(tmp_path, world, trainer, [2])
    with pytest.raises(CheckpointError, match="step_00000002 exists and resume is off"):
        checkpoints.start(trainer, loader(), resume=False)
    fresh = Checkpoints(tmp_path / "new", CheckpointConfig(), world)
    assert fresh.start(trainer, loader(), resume=False) is None


def test_a_run_keeps_its_parent(tmp_path: Path, world: World, trainer: Trainer) -> None:
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for step, folder in enumerate(folders):
        write_artifact(Path(folder), world, trainer.chunks, Provenance("s", step, {}, {}, {}))
    run = tmp_path / "run"
    checkpoints = Checkpoints(run, CheckpointConfig(), world)
    checkpoints.start(trainer, loader(), resume=True, init_from=folders[0])
    trainer.step_number = 2
    checkpoints.save(trainer, loader())
    again = Checkpoints(run, CheckpointConfig(), world)
    again.start(trainer, loader(), resume=True, init_from=folders[0])
    assert again.parent == checkpoints.parent
    for init_from in (folders[1], ""):
        with pytest.raises(CheckpointError, match="started from the artifact"):
            again.start(trainer, loader(), resume=True, init_from=init_from)


@pytest.mark.parametrize("extra", [{"a": (1, 2)}, {1: 2}, {"a": float("nan")}, {"a": {1}}])
def test_what_json_would_change_is_refused(
    extra: dict[Any, Any], tmp_path: Path, world: World, trainer: Trainer
) -> None:
    with pytest.raises(CheckpointError, match="extra"):
        save_checkpoint(tmp_path, 1, world, trainer.chunks, trainer.optimizer, extra)
    assert list(tmp_path.iterdir()) == []


def test_weights_alone_leave_the_rest(tmp_path: Path, world: World, trainer: Trainer) -> None:
    root = saved(tmp_path, world, trainer, [2]).root
    other = make_trainer({"seed": 9}, world)
    before = torch.get_rng_state()
    load_checkpoint(root / "step_00000002", world, other.chunks, None)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(trainer.modules[0].parameters(), other.modules[0].parameters(), strict=True):
        assert torch.equal(a, b)
