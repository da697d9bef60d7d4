"""Checkpoint policy of a run: start or resume, save, prune, stop on request, write the artifact."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, Protocol

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.megatron.adapter_artifact import load_adapter, read_adapter, write_adapter
from nemocascade.megatron.artifact import (
    ORIGIN,
    Provenance,
    load_artifact_weights,
    read_artifact,
    read_artifact_together,
    write_artifact,
)
from nemocascade.megatron.checkpoint import (
    CheckpointError,
    Writer,
    checkpoint_name,
    clean_leftovers,
    complete_checkpoints,
    latest_checkpoint,
    load_checkpoint,
    read_extra,
    remove,
    save_checkpoint,
)
from nemocascade.megatron.checkpoint.folder import MANIFEST
from nemocascade.recipe import CheckpointConfig
from nemocascade.recipe.changes import STARTED, as_json, changes_of_run
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.stopping import Stopped
from nemocascade.runtime.world import World
from nemocascade.train.trainer import Trainer
from nemocascade.types import Artifact


class Source(Protocol):
    """A stage's training data, with a position that checkpoints store."""

    def state_dict(self) -> dict[str, Any]:
        """The position as JSON values."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position."""


def rejected_changes(recipe: Any) -> list[str]:
    """Settings that differ from those of the newest checkpoint in the recipe's run folder and need
    `--accept-changes`; empty without a checkpoint. Needs no process group."""
    try:
        newest = latest_checkpoint(Path(recipe.run_dir) / "checkpoints")
        stored = read_extra(newest).get("recipe") if newest else None
    except CheckpointError:
        return []  # the resume names what is wrong
    if newest is None or stored is None or recipe.accept_changes:
        return []
    return [
        f"{change.text()} since {newest.name}: to train on with it, set --accept-changes True; "
        "for another run, choose another --run-dir"
        for change in changes_of_run(stored, recipe)
        if not change.is_free
    ]


class Checkpoints:
    """Checkpoints of a run, in RUN/checkpoints, and its artifact. All ranks call every method."""

    def __init__(
        self, run_dir: Path, settings: CheckpointConfig, world: World, recipe: Any = None
    ) -> None:
        """recipe: settings that checkpoints store, a dataclass; a resume is compared with them."""
        self.run_dir = run_dir
        self.recipe = recipe
        self.root = run_dir / "checkpoints"
        self.settings = settings
        self.world = world
        self.parent: dict[str, Any] | None = None
        """Folder, digest and context length of the artifact that the weights started from."""
        self.changes: list[dict[str, Any]] = []
        """Settings that changed when the run resumed, see `Provenance`."""
        self.resumed: dict[str, Any] | None = None
        """The stored recipe of the checkpoint that the run resumed from."""
        self.saved_step = self.first_step = -1
        self._writer = Writer(world, asynchronous=settings.asynchronous)
        self._blocked_s = 0.0
        self.on_saved: Callable[[int], object] = lambda step: None
        """Called on every rank with the number of finished steps that a new, complete checkpoint
        covers."""

    def will_load(self, *, init_from: str) -> bool:
        """True if `start` will load the weights, from a checkpoint or from `init_from`, so that
        the trainer needs no initial values. Problems of the run folder are left to `start`."""
        found = bool(init_from)
        if self.world.is_main and not found:
            try:
                found = latest_checkpoint(self.root) is not None
            except CheckpointError:
                found = True
        return bool(self.world.broadcast_object(found))

    def start(
        self,
        trainer: Trainer,
        source: Source,
        *,
        resume: bool,
        init_from: str = "",
        artifact: Artifact | None = None,
    ) -> Path | None:
        """Resume from the newest checkpoint; without one, start from `init_from` or as built.

        artifact: that of `init_from`, if it has been read already. Leftovers of a killed run are
        removed. Returns the checkpoint's folder, or None.

        Raises CheckpointError on every rank if the checkpoint or artifact cannot be read, or if
        the run folder holds checkpoints and `resume` is off.
        """
        self.finish()
        self.world.stop.clear()
        folder = self._find(resume=resume)
        if folder is not None:
            extra = load_checkpoint(folder, self.world, trainer.chunks, trainer.optimizer)
            if missing := {"step", "data", "parent"} - extra.keys():
                raise CheckpointError(folder, [f"extra.json has no {', '.join(sorted(missing))}"])
            trainer.step_number = self.saved_step = self.first_step = extra["step"]
            source.load_state_dict(extra["data"])
            self.parent = extra["parent"]
            self._check_parent(folder, init_from, artifact)
            LOGGER.info("resumed from %s, step %d", folder, self.saved_step)
            self._note_changes(extra)
        elif init_from:
            artifact = artifact or read_artifact_together(Path(init_from), self.world)
            load_artifact_weights(artifact, self.world, trainer.chunks, trainer.optimizer)
            if trainer.config.lora.adapter:
                self._start_adapter(trainer, artifact)
            self.parent = {
                "folder": init_from,
                "digest": artifact.digest,
                "context_length": artifact.context_length,
            }
            LOGGER.info("weights from %s (%s)", init_from, artifact.digest[:12])
        elif not trainer.config.perform_initialization:
            raise CheckpointError(
                self.root,
                ["the checkpoint that the run should resume from is gone: start the job again"],
            )
        self.world.stop.interrupt.arm()
        return folder

    def save(self, trainer: Trainer, source: Source) -> Path | None:
        """Write a checkpoint of the trainer's step, and delete the oldest beyond `keep` after it.

        With `checkpoint.asynchronous`, training waits for a copy in host memory only, and for the
        previous save if that is in progress; `finish` waits for the new one. Returns the folder,
        or None if this step is already saved.

        Raises CheckpointError on every rank if this or the last checkpoint cannot be written.
        """
        step = trainer.step_number
        if step == self.saved_step:
            return None
        self.finish()
        started = time.perf_counter()
        self.world.watch.enter(f"checkpoint of step {step}")
        extra = {
            "step": step,
            "data": source.state_dict(),
            "parent": self.parent,
            "recipe": self._stored_recipe(),
            "changes": self.changes,
        }
        folder = self.root / checkpoint_name(step)
        save_checkpoint(
            self.root,
            step,
            self.world,
            trainer.chunks,
            trainer.optimizer,
            extra,
            writer=self._writer,
            then=lambda: self._prune(folder),
        )
        self.saved_step = step
        self._blocked_s += time.perf_counter() - started
        self.world.watch.enter(f"after step {step}")
        if not self._writer.is_busy:
            self.on_saved(step)
        return folder

    def finish(self) -> None:
        """Wait until the checkpoint in progress, if there is one, is complete.

        Raises CheckpointError on every rank if it cannot be written; the previous one stays.
        """
        started = time.perf_counter()
        if self._writer.finish():
            self._blocked_s += time.perf_counter() - started
            self.on_saved(self.saved_step)

    def take_blocked_s(self) -> float:
        """Seconds that training has waited for checkpoints since the last call."""
        seconds, self._blocked_s = self._blocked_s, 0.0
        return seconds

    def stop_if_asked(self, trainer: Trainer, source: Source) -> None:
        """After a step: if RUN/stop exists, or after Ctrl-C, save a checkpoint and raise Stopped on
        every rank.

        Raises CheckpointError on every rank if a checkpoint that was in progress has failed.
        """
        is_asked, is_done = self.world.broadcast_object(
            (self.world.stop.poll(), self._writer.is_done)
        )
        if is_done:
            self.finish()
        if is_asked:
            self.stop(trainer, source)

    def stop(self, trainer: Trainer, source: Source) -> NoReturn:
        """Save a checkpoint of the last finished step, if there is one, and raise Stopped on every
        rank."""
        step = trainer.step_number
        if step:
            self.save(trainer, source)
            self.finish()
            said = f"after step {step}, which is saved: the same command resumes from it"
        else:
            said = "before the first step was finished: the same command resumes"
        LOGGER.info("stopped on request %s", said)
        self.world.barrier()
        raise Stopped(step, interrupted=self.world.broadcast_object(self.world.stop.finish()))

    def write_artifact(
        self,
        trainer: Trainer,
        recipe: Any,
        stage: str,
        tokenizer: Tokenizer,
        data: dict[str, Any],
        scores: dict[str, float],
    ) -> Path:
        """Write RUN/artifact from the trainer's weights and return the folder. A run that trains
        adapters merges them into it, and writes them to RUN/adapter.

        A run that resumed and trained no step keeps the artifact it has, and a new artifact names
        the settings that trained its weights. recipe: a dataclass. data: description of the
        training data, JSON values only.
        """
        self.finish()
        self.world.stop.interrupt.disarm()
        folder, settings = self.run_dir / "artifact", as_json(recipe)
        if trainer.step_number == self.first_step:
            if self.world.broadcast_object(self.world.is_main and _is_whole(folder)):
                LOGGER.info("%s is finished and stays as it is; --steps trains further", folder)
                return folder
            settings = self.resumed or settings
        settings.pop("kind", None)
        provenance = Provenance(
            stage=stage,
            step=trainer.step_number,
            recipe=settings,
            data=data,
            scores=scores,
            parent=self.parent["folder"] if self.parent else None,
            parent_digest=self.parent["digest"] if self.parent else None,
            context_length=max(
                _longest_sequence(settings), (self.parent or {}).get("context_length", 0)
            ),
            changes=self.changes,
        )
        artifact = write_artifact(
            folder,
            self.world,
            trainer.chunks,
            provenance,
            tokenizer=Path(tokenizer.path),
            template=tokenizer.template.source,
        )
        LOGGER.info("artifact %s (%s)", artifact.folder, artifact.digest[:12])
        if trainer.config.lora.rank:
            # The artifact is merged, for the stages that read it; the adapter is kept beside it.
            adapter = self.run_dir / "adapter"
            origin = Path(tokenizer.path).with_name(ORIGIN)
            digest = write_adapter(adapter, self.world, trainer.chunks, provenance, origin=origin)
            LOGGER.info("adapter %s (%s)", adapter, digest[:12])
        return artifact.folder

    def _start_adapter(self, trainer: Trainer, base: Artifact) -> None:
        """Continue from the adapter that the settings name, on the weights of its base."""
        adapter = read_adapter(Path(trainer.config.lora.adapter))
        load_adapter(adapter, base, self.world, trainer.chunks, trainer.optimizer)
        LOGGER.info("adapter from %s (%s)", adapter.folder, adapter.artifact.digest[:12])

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
            if found is None and (self.run_dir / "artifact" / MANIFEST).is_file():
                problems.append(
                    f"{self.run_dir / 'artifact'} is finished, but no checkpoint is left to resume "
                    "from, and an artifact is never overwritten: choose another --run-dir"
                )
        found, problems = self.world.broadcast_object((found, problems))
        if problems:
            raise CheckpointError(self.root, problems)
        return found

    def _stored_recipe(self) -> dict[str, Any] | None:
        """The settings without the run's folder, which may move."""
        if self.recipe is None:
            return None
        return {name: v for name, v in as_json(self.recipe).items() if name not in STARTED}

    def _note_changes(self, extra: dict[str, Any]) -> None:
        """Log what changed since the checkpoint, and add it to the run's history."""
        self.changes, self.resumed = extra.get("changes", []), extra.get("recipe")
        if self.recipe is None or self.resumed is None:
            return
        found = changes_of_run(self.resumed, self.recipe)
        for change in found:
            LOGGER.log(
                logging.INFO if change.is_free else logging.WARNING,
                "changed after step %d: %s",
                self.saved_step,
                change.text(),
            )
        if found:
            values = {change.name: [change.old, change.new] for change in found}
            self.changes = [*self.changes, {"step": self.saved_step, "changes": values}]

    def _check_parent(self, folder: Path, init_from: str, artifact: Artifact | None) -> None:
        """Check that `init_from` is still the run's parent; it may have been deleted since."""
        wanted = None
        if init_from:
            if not self.world.broadcast_object(Path(init_from).exists()):
                LOGGER.info("init_from %s is gone; the run continues without it", init_from)
                return
            wanted = (artifact or read_artifact_together(Path(init_from), self.world)).digest
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


def _is_whole(artifact: Path) -> bool:
    try:
        read_artifact(artifact)
    except CheckpointError:
        return False
    return True


def _longest_sequence(recipe: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence that a stage trains, from its recipe."""
    if rollout := recipe.get("rollout"):
        return int(rollout["max_prompt_tokens"]) + int(rollout["max_response_tokens"])
    return int(recipe.get("data", {}).get("capacity", 0))
