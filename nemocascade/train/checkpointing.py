"""Checkpoint policy of a run: start or resume, save, prune, stop on request, write the artifact."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Protocol

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.megatron.artifact import (
    Provenance,
    load_artifact_weights,
    read_artifact,
    write_artifact,
)
from nemocascade.megatron.checkpoint import (
    CheckpointError,
    clean_leftovers,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    remove,
    save_checkpoint,
)
from nemocascade.recipe import CheckpointConfig
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World
from nemocascade.train.trainer import Trainer


class Source(Protocol):
    """A stage's training data, with a position that checkpoints store."""

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position."""


STOP = "stop"
"""A file of this name in the run folder asks the run to save a checkpoint and stop. Schedulers
create it before a time limit. The run renames it to `stop.done` once the checkpoint is written."""


class Stopped(SystemExit):
    """The run stopped on request, after a checkpoint. Exit code 75: try again (sysexits)."""

    def __init__(self, step: int) -> None:
        super().__init__(75)
        self.step = step


class Checkpoints:
    """Checkpoints of a run, in RUN/checkpoints, and its artifact. All ranks call every method."""

    def __init__(self, run_dir: Path, settings: CheckpointConfig, world: World) -> None:
        self.run_dir = run_dir
        self.root = run_dir / "checkpoints"
        self.settings = settings
        self.world = world
        self.parent: dict[str, str] | None = None
        """Folder and digest of the artifact that the weights started from."""
        self.saved_step = -1

    def start(
        self, trainer: Trainer, source: Source, *, resume: bool, init_from: str = ""
    ) -> Path | None:
        """Resume from the newest checkpoint; without one, start from `init_from` or as built.

        Leftovers of a killed run are removed. Returns the checkpoint's folder, or None.

        Raises CheckpointError on every rank if the checkpoint or artifact cannot be read, or if
        the run folder holds checkpoints and `resume` is off.
        """
        if self.world.is_main:
            for name in (STOP, f"{STOP}.done"):
                (self.run_dir / name).unlink(missing_ok=True)
        folder = self._find(resume=resume)
        if folder is not None:
            extra = load_checkpoint(folder, self.world, trainer.chunks, trainer.optimizer)
            trainer.step_number = self.saved_step = extra["step"]
            source.load_state_dict(extra["data"])
            self.parent = extra["parent"]
            self._check_parent(folder, init_from)
            LOGGER.info("resumed from %s, step %d", folder, self.saved_step)
        elif init_from:
            artifact = read_artifact(Path(init_from))
            load_artifact_weights(artifact, self.world, trainer.chunks, trainer.optimizer)
            self.parent = {"folder": init_from, "digest": artifact.digest}
            LOGGER.info("weights from %s (%s)", init_from, artifact.digest[:12])
        return folder

    def save(self, trainer: Trainer, source: Source) -> Path | None:
        """Write a checkpoint of the trainer's step, then delete the oldest beyond `keep`.

        Returns its folder, or None if this step is already saved.
        """
        step = trainer.step_number
        if step == self.saved_step:
            return None
        self.world.watch.enter(f"checkpoint of step {step}")
        extra = {"step": step, "data": source.state_dict(), "parent": self.parent}
        folder = save_checkpoint(
            self.root, step, self.world, trainer.chunks, trainer.optimizer, extra
        )
        self.saved_step = step
        if self.world.is_main:
            self._prune(folder)
        return folder

    def stop_if_asked(self, trainer: Trainer, source: Source) -> None:
        """After a step: if RUN/stop exists, save a checkpoint and raise Stopped on every rank."""
        request = self.run_dir / STOP
        if not self.world.broadcast_object(self.world.is_main and request.exists()):
            return
        self.save(trainer, source)
        if self.world.is_main:
            request.replace(request.with_name(f"{STOP}.done"))
        LOGGER.info("stopped on request after step %d, which is saved", trainer.step_number)
        self.world.barrier()
        raise Stopped(trainer.step_number)

    def write_artifact(
        self,
        trainer: Trainer,
        recipe: Any,
        stage: str,
        tokenizer: Tokenizer,
        data: dict[str, Any],
        scores: dict[str, float],
    ) -> Path:
        """Write RUN/artifact from the trainer's weights and return the folder.

        recipe: a dataclass. data: description of the training data, JSON values only.
        """
        provenance = Provenance(
            stage=stage,
            step=trainer.step_number,
            recipe=json.loads(json.dumps(dataclasses.asdict(recipe))),
            data=data,
            scores=scores,
            parent=self.parent["folder"] if self.parent else None,
            parent_digest=self.parent["digest"] if self.parent else None,
        )
        artifact = write_artifact(
            self.run_dir / "artifact",
            self.world,
            trainer.chunks,
            provenance,
            tokenizer=Path(tokenizer.path),
        )
        LOGGER.info("artifact %s (%s)", artifact.folder, artifact.digest[:12])
        return artifact.folder

    def _find(self, *, resume: bool) -> Path | None:
        """Remove leftovers and find the checkpoint to resume from, the same on every rank."""
        found: Path | None = None
        problems: list[str] = []
        if self.world.is_main:
            for name in clean_leftovers(self.root):
                LOGGER.info("removed %s, which an interrupted run left", self.root / name)
            try:
                found = latest_checkpoint(self.root)
            except CheckpointError as error:
                problems = error.problems
            if found is not None and not resume:
                problems.append(
                    f"{found.name} exists and resume is off: set --resume True, choose another "
                    "--run-dir, or remove the folder"
                )
        found, problems = self.world.broadcast_object((found, problems))
        if problems:
            raise CheckpointError(self.root, problems)
        return found

    def _check_parent(self, folder: Path, init_from: str) -> None:
        """Check that `init_from` is still the run's parent; it may have been deleted since."""
        wanted = None
        if init_from:
            if not Path(init_from).exists():
                LOGGER.info("init_from %s is gone; the run goes on without it", init_from)
                return
            wanted = read_artifact(Path(init_from)).digest
        had = self.parent["digest"] if self.parent else None
        if wanted != had:
            raise CheckpointError(
                folder,
                [
                    f"the run started from the artifact {had}, but init_from({init_from!r}) is "
                    f"{wanted}: set --init-from as it was, or choose another --run-dir"
                ],
            )

    def _prune(self, newest: Path) -> None:
        """Delete the oldest checkpoints beyond `keep`. The pointer is already on `newest`."""
        if self.settings.keep <= 0:
            return
        kept = [p for p in complete_checkpoints(self.root) if p <= newest]
        for folder in kept[: -self.settings.keep]:
            remove(folder)
