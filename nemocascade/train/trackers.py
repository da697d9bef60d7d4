"""Experiment trackers beside metrics.jsonl: TensorBoard, Weights & Biases and MLflow.

Each adapter imports its package when it is opened. None needs a network: without a login or a
server, a tracker writes into the run folder.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from nemocascade.recipe.changes import flat
from nemocascade.recipe.train import TrackerName
from nemocascade.runtime.files import write_text
from nemocascade.runtime.logging import LOGGER

PROJECT = "nemocascade"
"""Name of the W&B project and of the MLflow experiment; WANDB_PROJECT and MLFLOW_EXPERIMENT_NAME
replace it."""
MOST_FAILURES = 3
"""Failures in a row after which a tracker is closed."""
UPLOAD_S = 120.0
"""Longest time that the end of a run waits for W&B to upload what it has recorded."""
SPARE_S = 10.0
"""Time beyond `UPLOAD_S` after which the end of a run no longer waits for W&B itself."""


class Tracker(Protocol):
    """Receives the metrics of a run, on the main rank."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a step, counted from 1. It may raise any error of its package."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoardTracker:
    """Event files in RUN/tensorboard."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.board: Any = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Implements `Tracker.log`."""
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def close(self) -> None:
        """Implements `Tracker.close`."""
        self.board.close()


class WandbTracker:
    """A W&B run that a resumed stage continues. Online if W&B is logged in and reachable; otherwise
    in RUN/wandb, for `wandb sync`. WANDB_MODE decides where it is set."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        import wandb

        self.run_dir = run_dir
        mode = os.environ.get("WANDB_MODE")
        if not mode:
            # Without a login W&B would ask for one.
            mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        start = {
            "dir": str(run_dir),
            "project": os.environ.get("WANDB_PROJECT", PROJECT),
            "name": run_name(run_dir),
            "group": os.environ.get("WANDB_RUN_GROUP") or group_of(run_dir),
            "config": dict(settings),
            "id": kept_id(run_dir, "wandb", lambda: uuid.uuid4().hex),
            "resume": "allow",
            # Its capture of the terminal and its own lines would break the status line.
            "settings": wandb.Settings(
                console="off", silent=True, finish_timeout=UPLOAD_S, finish_timeout_raises=True
            ),
        }
        try:
            self.run: Any = wandb.init(mode=mode, **start)
        except Exception as error:  # its errors have no common class
            if mode != "online":
                raise
            LOGGER.warning("W&B cannot be reached (%s): it writes to %s/wandb", error, run_dir)
            mode, self.run = "offline", wandb.init(mode="offline", **start)
        # Steps that a resumed run repeats are recorded again; W&B's own steps may only rise.
        self.run.define_metric("*", step_metric="step")
        upload = f"offline: `wandb sync {run_dir}/wandb/offline-run-*` uploads it"
        LOGGER.info("W&B: %s", upload if mode == "offline" else self.run.url)
        # Started here, for Python starts no thread at its end, when `close` may be called.
        self._closing, self._closed = threading.Event(), threading.Event()
        self._failure: Exception | None = None
        threading.Thread(target=self._finish, name="wandb-finish", daemon=True).start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Implements `Tracker.log`."""
        self.run.log({"step": step, **values})

    def close(self) -> None:
        """Implements `Tracker.close`. Raises TimeoutError if W&B has not sent all that it recorded
        within `UPLOAD_S`, as with a dead network, and whatever W&B raises."""
        self._closing.set()
        if not self._closed.wait(UPLOAD_S + SPARE_S) or isinstance(self._failure, TimeoutError):
            raise TimeoutError(
                f"W&B has not uploaded the run within {UPLOAD_S:g} s. All of it is in "
                f"{self.run_dir}/wandb: `wandb sync {self.run_dir}/wandb/*run-*` uploads the rest"
            )
        if self._failure is not None:
            raise self._failure

    def _finish(self) -> None:
        self._closing.wait()
        try:
            self.run.finish()
        except Exception as error:  # its errors have no common class
            self._failure = error
        self._closed.set()


class MlflowTracker:
    """An MLflow run that a resumed stage continues, on the server of MLFLOW_TRACKING_URI, otherwise
    in RUN/mlflow.db, for `mlflow ui --backend-store-uri sqlite:///RUN/mlflow.db`."""

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], first_step: int) -> None:
        # A server that is gone must not hold up the training.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        # MLflow has given up the store of plain files.
        local = f"sqlite:///{run_dir.absolute()}/mlflow.db"
        self.client: Any = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or local)
        self.metric: Any = Metric
        self.run_id = kept_id(run_dir, "mlflow", lambda: self._start(run_dir))
        self.client.update_run(self.run_id, status="RUNNING")
        params = [Param(name, str(value)[:500]) for name, value in flat(dict(settings))]
        # A resumed run may have other settings; in MLflow a parameter cannot change.
        known = self.client.get_run(self.run_id).data.params
        new = [p for p in params if p.key not in known]
        for first in range(0, len(new), 100):
            self.client.log_batch(self.run_id, params=new[first : first + 100])

    def _start(self, run_dir: Path) -> str:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self.client.create_experiment(name)
        tags = {"group": group_of(run_dir)}
        started = self.client.create_run(experiment, run_name=run_name(run_dir), tags=tags)
        return str(started.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Implements `Tracker.log`."""
        now = int(1000 * time.time())
        metrics = [self.metric(name, float(value), now, step) for name, value in values.items()]
        self.client.log_batch(self.run_id, metrics=metrics)

    def close(self) -> None:
        """Implements `Tracker.close`."""
        self.client.set_terminated(self.run_id)


ADAPTERS: dict[TrackerName, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


class Trackers:
    """The trackers of a run. One that fails is counted and reported, and never stops the training.

    settings: the resolved recipe. first_step: number of steps that an earlier start has recorded.
    """

    def __init__(
        self,
        names: tuple[TrackerName, ...],
        run_dir: Path,
        settings: Mapping[str, Any],
        first_step: int,
    ) -> None:
        self.open: dict[str, Tracker] = {}
        self.lost: dict[str, int] = {}
        self._given_up: list[str] = []
        self._in_a_row: dict[str, int] = {}
        for name in names:
            try:
                self.open[name] = ADAPTERS[name](run_dir, settings, first_step)
            except Exception as error:  # packages raise anything, also for a wrong login
                LOGGER.warning("tracker %s cannot start, and records nothing: %s", name, error)
        # A run that stops or fails never gets to its end, and TensorBoard writes every two minutes.
        atexit.register(self.close)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Send the numbers of a step, counted from 1, to every tracker."""
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name in self._given_up:
            self.lost[name] += 1
        for name, tracker in list(self.open.items()):
            try:
                tracker.log(step, numbers)
                self._in_a_row[name] = 0
            except Exception as error:  # a full disk, a server that is gone
                self._failed(name, step, error)

    def _failed(self, name: str, step: int, error: Exception) -> None:
        self.lost[name] = self.lost.get(name, 0) + 1
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1
        if self.lost[name] == 1:
            LOGGER.warning("tracker %s has lost step %d: %s", name, step, error)
        if self._in_a_row[name] >= MOST_FAILURES:
            LOGGER.warning(
                "tracker %s is closed after %d failures in a row; metrics.jsonl has every step",
                *(name, MOST_FAILURES),
            )
            self._given_up.append(name)
            self._close(name)

    def _close(self, name: str) -> None:
        try:
            self.open.pop(name).close()
        except Exception as error:  # the same errors as while it records
            LOGGER.warning("tracker %s could not be closed: %s", name, error)

    def close(self) -> None:
        """Close every tracker, and say how many steps were lost; at the latest as Python ends."""
        atexit.unregister(self.close)
        for name in list(self.open):
            self._close(name)
        for name, count in self.lost.items():
            LOGGER.warning("tracker %s has lost %d step(s); metrics.jsonl has them", name, count)


def kept_id(run_dir: Path, name: str, make: Callable[[], str]) -> str:
    """The tracker's id of this run, from the run folder; made and written at the first start."""
    path = run_dir / f"{name}_run_id"
    if path.is_file():
        return path.read_text(encoding="utf-8").strip()
    made = make()
    write_text(path, f"{made}\n")
    return made


def run_name(run_dir: Path) -> str:
    """`cascade/if_rl` for a stage of a cascade, otherwise the folder's name."""
    return "/".join(filter(None, (group_of(run_dir), run_dir.absolute().name)))


def group_of(run_dir: Path) -> str:
    """Name of the cascade that the stage's folder belongs to; empty outside of one."""
    parents = run_dir.absolute().parents
    is_stage = parents[0].name == "stages" and len(parents) > 1
    return parents[1].name if is_stage else ""
