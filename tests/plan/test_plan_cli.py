"""The commands plan, preflight and submit, run from their command lines."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from nemocascade import cli
from nemocascade.cascade.graph import StageGraph
from nemocascade.recipe import CascadeRecipe, load_recipe

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
TINY, CASCADE = str(RECIPES / "sft.py"), str(RECIPES / "cascade.py")
Command = Callable[..., str]


@pytest.fixture
def nemocascade(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Command:
    """Run a command and give what it prints."""

    def command(*arguments: str) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["nemocascade", *arguments])
        cli.main()
        return capsys.readouterr().out

    return command


def test_plan(nemocascade: Command) -> None:
    text = nemocascade("plan", TINY, "--gpus", "4", "--gpu", "cpu", "--", "--data.capacity", "1024")
    assert "packs of 1,024 tokens" in text
    assert "The recipe's layout:" in text
    report = json.loads(nemocascade("plan", TINY, "--gpus", "4", "--gpu", "cpu", "--json"))
    assert len(report["best"]) == 10


def test_plan_ends_with_the_flags_of_the_fastest_layout(nemocascade: Command) -> None:
    four = ("plan", TINY, "--gpus", "4", "--gpu", "cpu")
    report = json.loads(nemocascade(*four, "--json"))
    advice, own, best = report["advice"], report["own"], report["best"][0]
    assert advice["speedup"] == pytest.approx(own["time_s"]["total"] / best["time_s"]["total"])
    assert "% of the step; memory " in advice["limits"]
    flags = shlex.split(advice["flags"])
    again = json.loads(nemocascade(*four, "--json", "--", *flags))
    assert again["own"] == best
    assert again["advice"]["flags"] == advice["flags"]
    text = nemocascade(*four, "--", *flags)
    assert f"The recipe's layout is as fast as the fastest one:\n  {advice['flags']}\n" in text
    assert f"It is limited by: {advice['limits']}.\n" in text


def test_plan_names_an_unknown_accelerator(
    nemocascade: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        nemocascade("plan", TINY, "--gpu", "h2000")
    assert caught.value.code == 2
    assert "h200" in capsys.readouterr().err


def test_plan_of_a_script_that_is_not_there(
    nemocascade: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        nemocascade("plan", "nowhere.py", "--gpu", "h200")
    assert caught.value.code == 2
    assert "nowhere.py is not a file: name a recipe script" in capsys.readouterr().err


def test_preflight(nemocascade: Command, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(nemocascade("preflight", TINY, "--gpu", "cpu", "--ranks", "4", "--json"))
    assert found["passed"] is True
    with pytest.raises(SystemExit) as caught:
        nemocascade("preflight", TINY, "--gpu", "cpu", "--", "--parallel.tp", "3")
    assert caught.value.code == 2
    assert "FAIL settings: tp(3)" in capsys.readouterr().out


def test_a_recipe_that_cannot_be_read_is_a_finding(
    nemocascade: Command, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = tmp_path / "none.py"
    script.write_text("X = 1\n")
    with pytest.raises(SystemExit) as caught:
        nemocascade("preflight", str(script), "--json")
    assert caught.value.code == 2
    found = json.loads(capsys.readouterr().out)
    assert ["defines no RECIPE" in f["problem"] for f in found["findings"]] == [True]


def test_submit(nemocascade: Command) -> None:
    text = nemocascade("submit", TINY, TINY, "--nodes", "2", "--dry-run", "--", "--steps", "3")
    assert text.count("--nnodes=2") == 2
    assert text.count("--steps 3 &") == 2


def test_a_cascade_is_planned_checked_and_submitted_by_stage(nemocascade: Command) -> None:
    names = StageGraph(load_recipe(Path(CASCADE), CascadeRecipe)).names
    two = ("--gpus", "2", "--gpu", "cpu", "--best", "1", "--json")
    report = json.loads(nemocascade("plan", CASCADE, *two))
    assert list(report["stages"]) == names
    assert all(plan["own"]["fits"] for plan in report["stages"].values())
    for name, plan in report["stages"].items():
        prefix = f"--stages.{name.replace('_', '-')}."
        flags = plan["advice"]["flags"].split()[::2]
        assert all(flag.startswith(prefix) for flag in flags)
        assert (f"{prefix}rollout.offload" in flags) == (name != "sft")
    found = json.loads(nemocascade("preflight", CASCADE, "--gpu", "cpu", "--ranks", "2", "--json"))
    assert found["passed"] is True
    checks = [finding["check"] for finding in found["findings"]]
    assert all(f"{name}: memory" in checks for name in names)
    text = nemocascade("submit", CASCADE, "--dry-run", "--", "--run-dir", "elsewhere")
    assert [line.split("--only ")[1] for line in text.splitlines() if "--only" in line] == [
        f"{name} --run-dir elsewhere &" for name in names
    ]
    assert text.count("--dependency=afterok:JOB_") == len(names) - 1
    assert f"elsewhere/stages/{names[0]}/job.sbatch" in text


def test_preflight_names_a_stage_that_cannot_run(
    nemocascade: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        nemocascade("preflight", CASCADE, "--gpu", "cpu", "--", "--stages.if-rl.parallel.tp", "3")
    assert caught.value.code == 2
    assert "FAIL cascade: stages.if_rl: tp(3)" in capsys.readouterr().out


def test_jobs_of_a_cascade_choose_their_stages_themselves(
    nemocascade: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        nemocascade("submit", CASCADE, "--dry-run", "--", "--only", "sft")
    assert "each job of a cascade runs one stage" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "limit_s"),
    [(("plan", "--gpus", "1024", "--gpu", "h200"), 10), (("preflight", "--ranks", "1024"), 60)],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_thousand_ranks_take_seconds(
    tmp_path: Path, arguments: tuple[str, ...], limit_s: float
) -> None:
    """Seconds of one core, imports included, so that a busy machine changes nothing."""
    command, *options = arguments
    recipe = str(RECIPES.parent / "nemotron3_nano_30b" / "sft.py")
    with subprocess.Popen(
        [sys.executable, "-m", "nemocascade.cli", command, recipe, *options],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, _, usage = os.wait4(process.pid, 0)
    assert {
        "plan": "The fastest 10 that fit",
        "preflight": "1024 ranks of 8 kinds built on the meta device",
    }[command] in said
    assert usage.ru_utime + usage.ru_stime < limit_s
    assert usage.ru_maxrss < 2 << 20, "KiB"
