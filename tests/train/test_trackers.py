"""Experiment trackers record a run offline, continue it, and never stop the training."""

from __future__ import annotations

import importlib.util
import sys
import threading
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers.integrations import installed

from nemocascade.recipe import GrpoRecipe, LogConfig, SftRecipe
from nemocascade.runtime.logging import LOGGER
from nemocascade.train import trackers
from nemocascade.train.trackers import Trackers

SETTINGS = {"kind": "SftRecipe", "optimizer": {"lr": 0.1}, "steps": 4}


class FakeRun:
    """The part of a W&B run that the adapter uses."""

    url = "https://wandb.invalid/run"

    def __init__(self, **started: Any) -> None:
        self.started, self.rows = started, list[dict[str, float]]()
        self.metric: tuple[str, str] | None = None
        self.is_finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metric = (name, step_metric)

    def log(self, values: dict[str, float]) -> None:
        self.rows.append(values)

    def finish(self) -> None:
        self.is_finished = True


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """A fake of W&B: `runs` are those started; `login` and `reachable` may be set."""
    fake = types.SimpleNamespace(runs=[], is_logged_in=False, is_reachable=True)

    def init(**started: Any) -> FakeRun:
        if started["mode"] == "online" and not fake.is_reachable:
            raise ConnectionError("no route to host")
        run = FakeRun(**started)
        fake.runs.append(run)
        return run

    fake.init, fake.Settings = init, lambda **values: values
    fake.login = lambda prompt, verify: fake.is_logged_in
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_RUN_GROUP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(LOGGER, "warning", lambda text, *a: found.append(text % a if a else text))
    return found


def stage_folder(root: Path) -> Path:
    folder = root / "night" / "stages" / "if_rl"
    folder.mkdir(parents=True)
    return folder


def record(names: tuple[Any, ...], run_dir: Path, first: int = 0) -> None:
    opened = Trackers(names, run_dir, SETTINGS, first)
    opened.log(first + 1, {"loss": 0.5, "mfu": None, "deciles": [1.0], "right": True, "tokens": 3})
    opened.close()


def test_wandb_without_a_login_records_offline_and_continues(
    tmp_path: Path, wandb: types.SimpleNamespace
) -> None:
    folder = stage_folder(tmp_path)
    record(("wandb",), folder)
    record(("wandb",), folder, first=1)
    one, two = wandb.runs
    assert one.started["mode"] == "offline"
    assert one.started["dir"] == str(folder)
    assert (one.started["name"], one.started["group"]) == ("night/if_rl", "night")
    assert one.started["config"] == SETTINGS
    # Only numbers are sent; a repeated step is recorded, since W&B's own steps may only rise.
    assert one.rows == [{"step": 1, "loss": 0.5, "tokens": 3}]
    assert one.metric == ("*", "step")
    assert one.is_finished
    assert two.started["id"] == one.started["id"]
    assert two.started["resume"] == "allow"
    other = tmp_path / "other"
    other.mkdir()
    record(("wandb",), other)
    assert wandb.runs[2].started["id"] != one.started["id"]


def test_wandb_that_cannot_be_reached_records_offline(
    tmp_path: Path, wandb: types.SimpleNamespace, warnings: list[str]
) -> None:
    wandb.is_logged_in, wandb.is_reachable = True, False
    record(("wandb",), tmp_path)
    assert [run.started["mode"] for run in wandb.runs] == ["offline"]
    assert "no route to host" in warnings[0]
    wandb.is_reachable = True
    record(("wandb",), tmp_path)
    assert wandb.runs[1].started["mode"] == "online"


@pytest.mark.parametrize("ends_itself", [True, False])
def test_a_dead_network_does_not_hold_up_the_end(
    tmp_path: Path,
    wandb: types.SimpleNamespace,
    warnings: list[str],
    monkeypatch: pytest.MonkeyPatch,
    ends_itself: bool,
) -> None:
    """W&B gives up after its own limit; if it does not, the run no longer waits for it."""
    network = threading.Event()

    def finish(run: FakeRun) -> None:
        if ends_itself:
            raise TimeoutError("Timed out finishing run.")
        network.wait(30.0)

    monkeypatch.setattr(FakeRun, "finish", finish)
    monkeypatch.setattr(trackers, "UPLOAD_S", 0.05)
    monkeypatch.setattr(trackers, "SPARE_S", 0.05)
    started = time.monotonic()
    record(("wandb",), tmp_path)
    assert time.monotonic() - started < 20.0
    network.set()
    [warning] = warnings
    assert "has not uploaded the run within 0.05 s" in warning
    assert f"wandb sync {tmp_path}/wandb/" in warning


def test_the_mode_of_the_environment_decides(
    tmp_path: Path, wandb: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.is_logged_in = True
    monkeypatch.setenv("WANDB_MODE", "offline")
    record(("wandb",), tmp_path)
    assert wandb.runs[0].started["mode"] == "offline"


class Broken:
    """A tracker that fails at some steps."""

    def __init__(self, bad: set[int]) -> None:
        self.bad, self.seen, self.is_closed = bad, list[int](), False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step in self.bad:
            raise OSError("No space left on device")
        self.seen.append(step)

    def close(self) -> None:
        self.is_closed = True


def run_broken(
    monkeypatch: pytest.MonkeyPatch, folder: Path, bad: set[int]
) -> tuple[Broken, Trackers]:
    broken = Broken(bad)
    monkeypatch.setitem(trackers.ADAPTERS, "mlflow", lambda *_: broken)
    opened = Trackers(("mlflow", "tensorboard"), folder, SETTINGS, 0)
    for step in range(1, 9):
        opened.log(step, {"loss": 1.0})
    opened.close()
    return broken, opened


def test_a_tracker_that_fails_is_counted_and_the_others_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    broken, opened = run_broken(monkeypatch, tmp_path, {2, 3, 5})
    assert broken.seen == [1, 4, 6, 7, 8]
    assert broken.is_closed
    assert opened.lost == {"mlflow": 3}
    assert len(warnings) == 2, "the first failure and the count"
    assert "has lost step 2: No space left on device" in warnings[0]
    assert "has lost 3 step(s)" in warnings[1]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_tracker_that_keeps_failing_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: list[str]
) -> None:
    broken, opened = run_broken(monkeypatch, tmp_path, {3, 4, 5, 6})
    assert broken.seen == [1, 2]
    assert broken.is_closed
    assert opened.lost == {"mlflow": 6}
    assert any("after 3 failures in a row" in line for line in warnings)


def test_a_tracker_that_cannot_start_is_a_warning(
    tmp_path: Path, wandb: types.SimpleNamespace, warnings: list[str]
) -> None:
    wandb.login = lambda prompt, verify: 1 / 0
    record(("wandb", "tensorboard"), tmp_path)
    assert "tracker wandb cannot start" in warnings[0]
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_missing_package_is_an_error_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda n, p=None: None if n == "wandb" else real(n, p)
    )
    for kind in (SftRecipe, GrpoRecipe):
        found = kind(log=LogConfig(trackers=("wandb",))).problems(1)
        assert any("pip install 'nemocascade[wandb]'" in line for line in found)
    # The folder that W&B writes is not a package.
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("importlib.util.find_spec", real)
    if real("wandb") is None:
        monkeypatch.syspath_prepend(str(tmp_path))
        assert LogConfig(trackers=("wandb",)).problems()


def test_the_trackers_of_a_recipe() -> None:
    assert LogConfig().chosen == ("tensorboard",)
    assert LogConfig(tensorboard=False).chosen == ()
    assert LogConfig(trackers=("mlflow", "mlflow", "tensorboard")).chosen == (
        "mlflow",
        "tensorboard",
    )


@pytest.mark.integration
def test_mlflow_records_in_the_run_folder_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = installed("mlflow")
    # mlflow-skinny has no database.
    installed("sqlalchemy")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = stage_folder(tmp_path)
    record(("mlflow",), folder)
    record(("mlflow",), folder, first=1)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    run_id = (folder / "mlflow_run_id").read_text().strip()
    run = client.get_run(run_id)
    assert run.info.run_name == "night/if_rl"
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.1"
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1, 2]


@pytest.mark.integration
def test_a_real_wandb_records_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    record(("wandb",), tmp_path)
    assert list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_run_that_stops_closes_its_trackers(
    wandb: types.SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Any] = []
    ends = types.SimpleNamespace(register=at_exit.append, unregister=at_exit.remove)
    monkeypatch.setattr(trackers, "atexit", ends)
    Trackers(("wandb",), tmp_path, SETTINGS, 0).log(1, {"loss": 2.0})
    (stopped,) = wandb.runs
    assert not stopped.is_finished
    assert stopped.started["settings"]["finish_timeout"] == trackers.UPLOAD_S
    for close in at_exit[:]:
        close()
    assert stopped.is_finished
    Trackers(("wandb",), tmp_path, SETTINGS, 1).close()
    assert not at_exit
