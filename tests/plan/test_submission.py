"""`nemocascade submit` names what a job could not run with, before the job is in the queue."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemocascade.cli import main
from nemocascade.plan.errors import PlanError
from nemocascade.plan.slurm import check_submission, job_of_script, job_script
from nemocascade.plan.submission import SubmitSettings

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "tiny"
TINY = str(RECIPES / "sft.py")
SETTINGS = SubmitSettings(recipes=(TINY,))


def test_all_wrong_settings_are_named() -> None:
    wrong = replace(SETTINGS, recipes=(TINY, "no.py"), nodes=0, warning_s=0)
    with pytest.raises(PlanError) as caught:
        check_submission(wrong, ["--run-dir", "x"])
    for part in (
        "nodes(0) must be",
        "warning_s(0) must be",
        "no.py is not a file",
        "share one folder",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"time": "abc"}, "'abc') is not a time limit of Slurm"),
        ({"time": "10", "warning_s": 600}, "warning_s(600) is not below time(10), 600 s"),
        ({"time": "10:30", "warning_s": 631}, "631) is not below time(10:30), 630 s"),
        ({"time": "1:00:00", "warning_s": 3600}, "3600) is not below time(1:00:00), 3600 s"),
        ({"time": "1-1", "warning_s": 90_000}, "90000) is not below time(1-1), 90000 s"),
        ({"template": "no.sbatch"}, "template(no.sbatch) is not a file"),
        ({"environment": "no.sh"}, "environment(no.sh) is not a file"),
    ],
)
def test_a_job_that_could_not_run_is_not_submitted(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=re.escape(said)):
        check_submission(replace(SETTINGS, **settings), [])


@pytest.mark.parametrize("time", ["11", "10:01", "0:10:01", "1-0", "0", "UNLIMITED"])
def test_a_warning_may_come_at_any_time_before_the_limit(time: str) -> None:
    check_submission(replace(SETTINGS, time=time, warning_s=600), [])


@pytest.mark.parametrize("text", ["{recipe} ${HOME}", "{recipe} {", "{recipe.no}", "{}"])
def test_a_template_that_cannot_be_filled_names_its_placeholders(text: str, tmp_path: Path) -> None:
    (tmp_path / "site.sbatch").write_text(text)
    with pytest.raises(PlanError, match=r"write braces of the shell twice.*all_nodes"):
        job_script(
            replace(SETTINGS, template=str(tmp_path / "site.sbatch")),
            job_of_script(Path(TINY), "run", []),
        )


def test_names_with_spaces_are_quoted_for_sbatch(tmp_path: Path) -> None:
    """Slurm reads the quotes of the shell in its own lines."""
    job = job_of_script(Path(TINY), str(tmp_path / "a run"), [])
    lines = job_script(SETTINGS, job).splitlines()
    assert f"#SBATCH --output='{tmp_path}/a run/slurm-%j.txt'" in lines
    assert "#SBATCH --job-name='nemocascade-a run'" in lines


@pytest.mark.parametrize(
    ("recipe", "arguments"),
    [("sft.py", ["--stepz", "7"]), ("cascade.py", ["--stages.if-rl.stepz", "7"])],
)
def test_arguments_that_a_recipe_does_not_have_end_the_submission(
    recipe: str,
    arguments: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = ["nemocascade", "submit", str(RECIPES / recipe), "--dry-run", "--"]
    monkeypatch.setattr("sys.argv", [*own, *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert "#SBATCH" not in captured.out
    assert arguments[0] in captured.err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1\ndef f(:", r"script\.py:2: SyntaxError"),
        ("import no_such_module", r"script\.py:1: ModuleNotFoundError: No module named"),
        (
            "from nemocascade.recipe import SftRecipe\nRECIPE = SftRecipe(stepz=4)",
            r"script\.py:2: TypeError: .*'stepz': fix the script",
        ),
    ],
)
def test_an_error_of_a_recipe_script_names_its_line(
    text: str,
    said: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(text)
    monkeypatch.setattr("sys.argv", ["nemocascade", "submit", str(script), "--dry-run"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert re.search(said, capsys.readouterr().err)
