"""Runs the stages of a cascade in order, in the same processes, and resumes a stopped run.

The main rank decides and writes. It broadcasts its decisions between the stages, in a process group
of their own, so all ranks act alike even if they see the file system differently.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nemocascade.cascade.decide import Decision, decide
from nemocascade.cascade.errors import AlarmError
from nemocascade.cascade.graph import StageChoice, StageGraph, cascade_problems
from nemocascade.cascade.inputs import FileHashes, score_files
from nemocascade.cascade.records import (
    SCORES,
    Alarm,
    StageRecord,
    done_scores,
    read_cascade,
    read_record,
    retire,
    write_cascade,
    write_json,
    write_record,
)
from nemocascade.cascade.report import write_report
from nemocascade.megatron.artifact import read_artifact
from nemocascade.megatron.checkpoint import clean_leftovers, latest_checkpoint, remove
from nemocascade.recipe import CascadeRecipe, RecipeError, SftRecipe
from nemocascade.runtime.jsonl import read_undamaged
from nemocascade.runtime.launcher import world_size_of_environment
from nemocascade.runtime.logging import LOGGER, Console
from nemocascade.runtime.run_lock import RunLock
from nemocascade.stages.launch import run_stage
from nemocascade.stages.scoring import read_scores, score_artifact, scoring_problems, settings_key
from nemocascade.stages.setup import on_main_rank


def _problems_here(cascade: CascadeRecipe) -> list[str]:
    """Problems of the cascade and its scores on the ranks of this launch."""
    problems = cascade_problems(cascade, world_size_of_environment())
    return problems + [p for p in scoring_problems(cascade.scores) if p not in problems]


def dry_run(cascade: CascadeRecipe, choice: StageChoice) -> str:
    """Text of the stages that would run, their inputs, the reasons, and their problems on the ranks
    of this launch. Verifies the weights of kept stages. Changes nothing but the cache of file
    hashes.

    Raises RecipeError if the stages have no valid order.
    """
    graph = StageGraph(cascade)
    if problems := choice.problems(cascade) + graph.problems():
        raise RecipeError(problems)
    files = _file_hashes(cascade)
    pending: list[str] = []
    lines = []
    for name in choice.stages(cascade):
        decision = decide(
            cascade, name, files, pending=pending, again=choice.anew(name), verify=True
        )
        if decision.action != "keep":
            pending.append(name)
        stage = graph.stage(name)
        start = graph.start_of(name) or stage.recipe.init_from or "random weights"
        lines += [
            decision.text(),
            f"    {stage.kind}, {stage.recipe.steps} steps from {start}, "
            f"into {graph.stage_dir(name)}",
        ]
        if decision.warning:
            lines.append(f"    warning: {decision.warning}")
    if problems := _problems_here(cascade):
        ranks = world_size_of_environment()
        lines += [f"this cannot run on {ranks} rank(s):", *(f"  - {p}" for p in problems)]
    return "\n".join(lines)


def run_cascade(cascade: CascadeRecipe, choice: StageChoice | None = None) -> Path:
    """Run the stages that are not up to date; returns the artifact folder of the last stage of the
    main line, or of the last stage if all are side branches.

    Raises RecipeError before anything starts, FolderInUseError if another job owns the run,
    CascadeError if the run cannot continue, AlarmError if an alarm stops it, and every error that a
    stage raises.
    """
    choice = choice or StageChoice()
    if problems := choice.problems(cascade) + _problems_here(cascade):
        raise RecipeError(problems)
    run = _Run(cascade, choice)
    try:
        for name in choice.stages(cascade):
            run.stage(name)
    finally:
        run.lock.release()
    graph = StageGraph(cascade)
    last = ([s.name for s in cascade.stages if not s.side] or graph.names)[-1]
    return Path(graph.artifact_dir(choice.only or last))


class _Run:
    """State of a running cascade, on every rank."""

    def __init__(self, cascade: CascadeRecipe, choice: StageChoice) -> None:
        self.cascade, self.choice = cascade, choice
        self.graph = StageGraph(cascade)
        self.run_dir = Path(cascade.run_dir)
        self.lock = RunLock(self.run_dir)
        self.console = Console()

    def stage(self, name: str) -> None:
        """Decide, run and score one stage, and check its alarms."""
        names = self.graph.names
        self.console.label = f"{names.index(name) + 1}/{len(names)} {name}"
        if self.graph.open_teachers(name):
            # Teachers are chosen by the scores of all earlier stages.
            self._score([s.name for s in self.graph.before(name)])
        decision: Decision = self._on_main(lambda: self._begin(name))
        if decision.action != "keep":
            assert decision.recipe is not None
            checkpoints, started = self._folder(name) / "checkpoints", time.monotonic()
            newest = self._on_main(lambda: latest_checkpoint(checkpoints))
            first = int(newest.name.removeprefix("step_")) if newest else 0
            run_stage(decision.recipe, self.console)
            # Reference cycles would keep the stage's memory beside the next stage's.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            seconds = time.monotonic() - started
            self._on_main(lambda: self._done(decision, seconds, first))
        self._score([name])
        alarms: list[Alarm] = self._on_main(lambda: self._alarms(name))
        self._on_main(self._report)
        if alarms and self.cascade.alarm.stop:
            text = "; ".join(a.text() for a in alarms)
            raise AlarmError(
                f"{text}: change the recipe, or continue anyway with --alarm.stop False"
            )

    def _on_main(self, work: Callable[[], Any]) -> Any:
        return on_main_rank(self.lock, self.cascade.scores.engine, work)

    def _begin(self, name: str) -> Decision:
        """Decide, and prepare the stage's folder."""
        decision = decide(
            self.cascade, name, _file_hashes(self.cascade), again=self.choice.anew(name)
        )
        LOGGER.info("stage %s", decision.text(self.console.label))
        if decision.warning:
            LOGGER.warning("stage %s: %s", name, decision.warning)
        self.console.start_score = self._start_score(name)
        # The stage owns its folder while it runs; another job may own it now.
        other = RunLock(self._folder(name))
        other.acquire()
        other.release()
        if decision.retire:
            LOGGER.warning("%s: its folder was moved to %s", name, retire(self.run_dir, name))
        if decision.action != "keep":
            record = StageRecord(
                decision.key, decision.inputs, "running", teachers=decision.teachers
            )
            write_record(self._folder(name), record)
        write_cascade(self.cascade)
        return decision

    def _start_score(self, name: str) -> float | None:
        """Mean held-out score of the stage's domains before it; None if one is unknown."""
        recipe = self.graph.stage(name).recipe
        scores = done_scores(self.cascade).get(self.graph.start_of(name))
        if scores is None or isinstance(recipe, SftRecipe):
            return None
        found = [scores.of(d.domain) for d in recipe.domains]
        known = [score for score in found if score is not None]
        return sum(known) / len(known) if known and len(known) == len(found) else None

    def _done(self, decision: Decision, seconds: float, first_step: int) -> None:
        """Record that the stage is done."""
        folder = self._folder(decision.stage)
        metrics = folder / "metrics.jsonl"
        skip = partial(LOGGER.warning, "%s: a damaged line is skipped: %.60s", metrics)
        found = read_undamaged(metrics, skip) if metrics.exists() else ()
        lines = [row for _, row in found if "step" in row]
        before = sum(v.get("step_time_s") or 0.0 for v in lines if v["step"] <= first_step)
        record = StageRecord(
            decision.key,
            decision.inputs,
            "done",
            artifact_digest=read_artifact(folder / "artifact").digest,
            seconds=seconds + before,
            tokens=sum(v.get("tokens") or 0 for v in lines),
            teachers=decision.teachers,
        )
        write_record(folder, record)

    def _score(self, names: list[str]) -> None:
        """Score the finished ones of these stages that have no scores with the current settings."""
        key, names = self._on_main(lambda: self._unscored(names))
        for name in names:
            folder = self._folder(name)
            found = score_artifact(
                folder / "artifact",
                self.cascade.scores,
                folder,
                settings=key,
                console=self.console,
            )
            self._on_main(partial(write_json, folder / SCORES, found.as_json()))

    def _unscored(self, names: list[str]) -> tuple[str, list[str]]:
        config = self.cascade.scores
        key = settings_key(config, _file_hashes(self.cascade).of(score_files(config)))
        missing = []
        for name in names:
            record, scores = (
                read_record(self._folder(name)),
                read_scores(self._folder(name) / SCORES),
            )
            if record is None or record.status != "done":
                continue
            if scores is None or (scores.digest, scores.settings) != (record.artifact_digest, key):
                missing.append(name)
        return key, missing

    def _alarms(self, name: str) -> list[Alarm]:
        """Alarms of a stage whose results are all on disk; its checkpoints are deleted here."""
        alarms = [a for a in write_cascade(self.cascade) if a.stage == name]
        for alarm in alarms:
            LOGGER.warning("alarm: %s", alarm.text())
        clean_leftovers(self._folder(name))
        checkpoints = self._folder(name) / "checkpoints"
        if not self.cascade.keep_checkpoints and checkpoints.exists():
            remove(checkpoints)
        return alarms

    def _report(self) -> None:
        """Bring the page of the unfinished run up to date; `launch` writes that of a finished one.
        A report that fails is not a reason to end a run."""
        if all(s["status"] == "done" for s in read_cascade(self.run_dir)["stages"]):
            return
        try:
            page = write_report(self.run_dir, with_pictures=False)
        except Exception as error:
            LOGGER.warning("the report could not be written: %s", error)
        else:
            LOGGER.info("report so far: %s", page)

    def _folder(self, name: str) -> Path:
        return Path(self.graph.stage_dir(name))


def _file_hashes(cascade: CascadeRecipe) -> FileHashes:
    return FileHashes(Path(cascade.run_dir) / "files.json")
