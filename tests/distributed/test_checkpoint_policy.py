"""Checkpoint policy of a run: retention, resuming, and rejected starts."""

from __future__ import annotations

import errno
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoint_jobs import make_trainer
from helpers.kill_jobs import Position

from nemocascade.megatron.artifact import Provenance, write_artifact
from nemocascade.megatron.checkpoint import (
    CheckpointError,
    Writer,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from nemocascade.megatron.checkpoint.errors import NonFiniteWeightsError
from nemocascade.megatron.checkpoint.storage import write_shards
from nemocascade.megatron.world import start_world
from nemocascade.recipe import CheckpointConfig, EngineConfig, ParallelConfig, SftRecipe
from nemocascade.runtime.world import World
from nemocascade.train.checkpointing import Checkpoints, rejected_changes
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
    checkpoints.finish()
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


def test_a_pointer_to_nothing_is_rejected(tmp_path: Path, world: World, trainer: Trainer) -> None:
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
    checkpoints.finish()
    other = make_trainer({"seed": 9}, world)
    load_checkpoint(root / "step_00000004", world, other.chunks, other.optimizer)
    assert bool((next(other.modules[0].parameters()) == 0.5).all())


def test_resume_off_rejects_a_used_folder(tmp_path: Path, world: World, trainer: Trainer) -> None:
    checkpoints = saved(tmp_path, world, trainer, [2])
    with pytest.raises(CheckpointError, match="step_00000002 exists and resume is off"):
        checkpoints.start(trainer, loader(), resume=False)
    fresh = Checkpoints(tmp_path / "new", CheckpointConfig(), world)
    assert fresh.start(trainer, loader(), resume=False) is None


def test_a_trainer_without_values_is_not_trained(
    tmp_path: Path, world: World, trainer: Trainer
) -> None:
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), world)
    assert not checkpoints.will_load(init_from="")
    assert checkpoints.will_load(init_from="artifact")
    undefined = make_trainer({"initialise": False}, world)
    with pytest.raises(CheckpointError, match="is gone: start the job again"):
        checkpoints.start(undefined, loader(), resume=True)
    saved(tmp_path, world, trainer, [2])
    assert checkpoints.will_load(init_from="")
    checkpoints.start(undefined, loader(), resume=True)
    assert undefined.step_number == 2


def test_a_run_keeps_its_parent(tmp_path: Path, world: World, trainer: Trainer) -> None:
    folders = [str(tmp_path / name) for name in ("one", "two")]
    for step, folder in enumerate(folders):
        write_artifact(Path(folder), world, trainer.chunks, Provenance("s", step, {}, {}, {}))
    run = tmp_path / "run"
    checkpoints = Checkpoints(run, CheckpointConfig(), world)
    checkpoints.start(trainer, loader(), resume=True, init_from=folders[0])
    trainer.step_number = 2
    checkpoints.save(trainer, loader())
    checkpoints.finish()
    again = Checkpoints(run, CheckpointConfig(), world)
    again.start(trainer, loader(), resume=True, init_from=folders[0])
    assert again.parent == checkpoints.parent
    for init_from in (folders[1], ""):
        with pytest.raises(CheckpointError, match="started from the artifact"):
            again.start(trainer, loader(), resume=True, init_from=init_from)


def test_an_asynchronous_save_is_of_its_own_step(
    tmp_path: Path, world: World, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that change during the write are not in it; one save at a time is written."""
    started, may_write = threading.Event(), threading.Event()
    writing: list[int] = []

    def slow(*arguments: Any) -> Any:
        writing.append(1)
        assert sum(writing) == 1
        started.set()
        assert may_write.wait(60)
        written = write_shards(*arguments)
        writing.append(-1)
        return written

    monkeypatch.setattr("nemocascade.megatron.checkpoint.writing.write_shards", slow)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), world)
    covered: list[int] = []
    checkpoints.on_saved = covered.append
    parameter = next(trainer.modules[0].parameters())
    for step in (2, 4, 6):
        trainer.step_number = step
        with torch.no_grad():
            parameter.fill_(step)
        checkpoints.save(trainer, loader())
        assert started.wait(60)
        assert step not in covered
        with torch.no_grad():
            parameter.fill_(-1.0)
        checkpoints.stop_if_asked(trainer, loader())
        may_write.set()
    checkpoints.finish()
    assert covered == [2, 4, 6]
    assert checkpoints.take_blocked_s() > 0.0
    assert checkpoints.take_blocked_s() == 0.0
    for step in (4, 6):
        folder = tmp_path / f"checkpoints/step_{step:08d}"
        other = make_trainer({"seed": 9}, world)
        load_checkpoint(folder, world, other.chunks, other.optimizer)
        assert bool((next(other.modules[0].parameters()) == step).all())


def test_a_failed_write_ends_the_run_and_the_last_checkpoint_stays(
    tmp_path: Path, world: World, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, world, trainer, [2])

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("nemocascade.megatron.checkpoint.writing.write_shards", full)

    def until_told() -> None:
        while True:
            checkpoints.stop_if_asked(trainer, loader())

    def save_again() -> None:
        trainer.step_number += 1
        checkpoints.save(trainer, loader())

    for notice in (until_told, save_again, checkpoints.finish):
        trainer.step_number += 1
        checkpoints.save(trainer, loader())
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            notice()
        assert caught.value.exit_code == 75, "a job starts again"
        assert names(tmp_path) == ["latest", "step_00000002"]
        assert latest_checkpoint(checkpoints.root) == checkpoints.root / "step_00000002"


def test_a_run_that_fails_completes_its_save_before_it_leaves_the_folder(
    tmp_path: Path, world: World, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()

    def slow(*arguments: Any) -> Any:
        assert may_write.wait(60)
        return write_shards(*arguments)

    monkeypatch.setattr("nemocascade.megatron.checkpoint.writing.write_shards", slow)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), world)
    trainer.step_number = 2
    checkpoints.save(trainer, loader())
    later = threading.Timer(0.3, may_write.set)
    later.start()
    world.at_close.close()
    assert latest_checkpoint(checkpoints.root) == checkpoints.root / "step_00000002"
    later.join()


def test_a_run_that_fails_does_not_wait_for_ranks_that_have_ended(
    tmp_path: Path, world: World, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemocascade.megatron.checkpoint.background.ABANDONED_S", 0.1)
    two = replace(world, size=2, at_close=ExitStack())
    writer = Writer(two, asynchronous=True)
    writer._name, writer._store = "job", dist.HashStore()
    root = tmp_path / "checkpoints"
    save_checkpoint(root, 2, world, trainer.chunks, trainer.optimizer, {}, writer=writer)
    assert writer.is_busy
    two.at_close.close()
    assert not writer.is_busy
    assert names(tmp_path) == []


def test_without_memory_for_a_copy_saves_are_synchronous(
    tmp_path: Path,
    world: World,
    trainer: Trainer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("nemocascade.megatron.checkpoint.background.HOST_SHARE", 0.0)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), world)
    for step in (2, 4):
        trainer.step_number = step
        checkpoints.save(trainer, loader())
        assert latest_checkpoint(checkpoints.root) == checkpoints.root / f"step_{step:08d}"
    [warning] = [r.getMessage() for r in caplog.records if "synchronously" in r.getMessage()]
    assert "of host memory that is available" in warning
    assert "--checkpoint.asynchronous False" in warning


@pytest.mark.parametrize("extra", [{"a": (1, 2)}, {1: 2}, {"a": float("nan")}, {"a": {1}}])
def test_what_json_would_change_is_rejected(
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_weight_that_is_not_finite_is_saved(
    tmp_path: Path, world: World, trainer: Trainer, value: float
) -> None:
    """The last good checkpoint and artifact stay, and the parameter is named."""
    checkpoints = saved(tmp_path, world, trainer, [2], keep=1)
    write_artifact(tmp_path / "artifact", world, trainer.chunks, Provenance("s", 2, {}, {}, {}))
    before = (tmp_path / "artifact" / "manifest.json").read_bytes()
    name, parameter = next(iter(trainer.modules[0].named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[-1] = value
    trainer.step_number = 3
    checkpoints.save(trainer, loader())
    with pytest.raises(NonFiniteWeightsError, match=f"{name} holds NaN or infinite") as caught:
        checkpoints.finish()
    assert caught.value.exit_code == 3
    with pytest.raises(NonFiniteWeightsError, match=f"{name} holds NaN or infinite"):
        write_artifact(tmp_path / "artifact", world, trainer.chunks, Provenance("s", 3, {}, {}, {}))
    assert names(tmp_path) == ["latest", "step_00000002"]
    assert latest_checkpoint(tmp_path / "checkpoints") == tmp_path / "checkpoints/step_00000002"
    assert (tmp_path / "artifact" / "manifest.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["artifact", "checkpoints"]


RECIPE = SftRecipe(checkpoint=CheckpointConfig(keep=0))


def with_lr(run_dir: Path, lr: float, **changes: Any) -> SftRecipe:
    recipe = replace(RECIPE, run_dir=str(run_dir), **changes)
    return replace(recipe, optimizer=replace(recipe.optimizer, lr=lr))


def resumed(world: World, trainer: Trainer, recipe: SftRecipe) -> Checkpoints:
    checkpoints = Checkpoints(Path(recipe.run_dir), recipe.checkpoint, world, recipe)
    checkpoints.start(trainer, loader(), resume=True)
    return checkpoints


def artifact_of(checkpoints: Checkpoints, trainer: Trainer) -> dict[str, Any]:
    template = SimpleNamespace(source="{{ messages }}")
    tokenizer: Any = SimpleNamespace(path=str(checkpoints.run_dir / "t.json"), template=template)
    (checkpoints.run_dir / "t.json").write_text("{}")
    folder = checkpoints.write_artifact(trainer, checkpoints.recipe, "sft", tokenizer, {}, {})
    return dict(json.loads((folder / "manifest.json").read_text()))


def test_changed_settings_are_named_and_need_consent(
    tmp_path: Path, world: World, trainer: Trainer, caplog: pytest.LogCaptureFixture
) -> None:
    first = resumed(world, trainer, with_lr(tmp_path, 0.003))
    trainer.step_number = 2
    first.save(trainer, loader())
    first.finish()
    assert rejected_changes(with_lr(tmp_path, 0.003, steps=9, checkpoint=CheckpointConfig())) == []
    changed = with_lr(tmp_path, 0.1)
    [problem] = rejected_changes(changed)
    assert "optimizer.lr 0.003 -> 0.1 since step_00000002" in problem
    assert "--accept-changes True" in problem
    accepted = replace(changed, accept_changes=True)
    assert rejected_changes(accepted) == []
    second = resumed(world, trainer, accepted)
    trainer.step_number = 4
    second.save(trainer, loader())
    second.finish()
    # The change is part of the run from now on.
    assert rejected_changes(changed) == []
    manifest = artifact_of(second, trainer)
    assert manifest["changes"] == [{"step": 2, "changes": {"optimizer.lr": [0.003, 0.1]}}]
    assert manifest["recipe"]["optimizer"]["lr"] == 0.1
    assert rejected_changes(replace(changed, run_dir=str(tmp_path / "new"))) == []


def test_an_artifact_names_the_settings_that_trained_it(
    tmp_path: Path, world: World, trainer: Trainer
) -> None:
    first = resumed(world, trainer, with_lr(tmp_path, 0.003))
    trainer.step_number = 2
    first.save(trainer, loader())
    first.finish()
    # Stopped between the last checkpoint and the artifact, and resumed with another rate.
    late = resumed(world, trainer, with_lr(tmp_path, 0.1, accept_changes=True))
    manifest = artifact_of(late, trainer)
    assert manifest["recipe"]["optimizer"]["lr"] == 0.003
    # A finished artifact is never written again.
    again = resumed(world, trainer, with_lr(tmp_path, 0.2, accept_changes=True))
    assert artifact_of(again, trainer) == manifest
    (tmp_path / "artifact" / "index.json").unlink()
    assert artifact_of(again, trainer)["files"] == manifest["files"]


def test_an_artifact_knows_its_template_and_context(
    tmp_path: Path, world: World, trainer: Trainer
) -> None:
    """The longest sequence of the stages so far, whichever was it."""
    recipe = replace(RECIPE, data=replace(RECIPE.data, capacity=500))
    for length, expected in ((0, 500), (900, 900)):
        parent, run_dir = tmp_path / f"parent{length}", tmp_path / f"run{length}"
        made = Provenance("s", 2, {}, {}, {}, context_length=length)
        write_artifact(parent, world, trainer.chunks, made)
        run_dir.mkdir()
        checkpoints = Checkpoints(run_dir, recipe.checkpoint, world, recipe)
        checkpoints.start(trainer, loader(), resume=True, init_from=str(parent))
        trainer.step_number += 1
        manifest = artifact_of(checkpoints, trainer)
        assert manifest["context_length"] == expected
        source = (run_dir / "artifact" / "chat_template.jinja").read_bytes()
        assert source == b"{{ messages }}"
        assert manifest["template"] == hashlib.sha256(source).hexdigest()
        # Older artifacts have neither.
        for name in ("template", "context_length"):
            del manifest[name]
        (parent / "manifest.json").write_text(json.dumps(manifest))


def test_an_artifact_without_checkpoints_is_not_overwritten(
    tmp_path: Path, world: World, trainer: Trainer
) -> None:
    write_artifact(tmp_path / "artifact", world, trainer.chunks, Provenance("s", 2, {}, {}, {}))
    with pytest.raises(CheckpointError, match="an artifact is never overwritten"):
        resumed(world, trainer, with_lr(tmp_path, 0.003))
