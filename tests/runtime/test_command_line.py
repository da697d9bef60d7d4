"""Command lines: what they import, their help by section, and completion."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemocascade.cascade.completion import SCRIPTS, SETTINGS, WITH_RECIPE, candidates
from nemocascade.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[2]
SFT, CASCADE = "recipes/tiny/sft.py", "recipes/tiny/cascade.py"
# Runs several command lines in one process, and says what they printed and imported.
DRIVER = """
import contextlib, io, json, sys
before = set(sys.modules)
from nemocascade import cli
found = []
for line in json.loads(sys.argv[1]):
    sys.argv = ["nemocascade", *line]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        with contextlib.redirect_stderr(io.StringIO()) as err:
            code = 0
            try:
                cli.main()
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 2
    found.append([code, out.getvalue(), err.getvalue()])
roots = {name.partition(".")[0] for name in set(sys.modules) - before}
print(json.dumps([found, sorted(roots - set(sys.stdlib_module_names))]))
"""
PARSER = {"nemocascade", "tyro", "docstring_parser", "shtab", "typeguard", "typing_extensions"}


def run(*lines: list[str]) -> tuple[list[list[Any]], set[str]]:
    """[exit code, stdout, stderr] of each line, and what is imported that Python does not bring."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(lines)],
        capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | {"COLUMNS": "100"},
    )  # fmt: skip
    found, roots = json.loads(done.stdout)
    return found, set(roots)


def test_help_and_version_import_no_library() -> None:
    found, roots = run(["--help"], ["--version"], ["run", "--help"], [])
    assert [code for code, *_ in found] == [0, 0, 0, 0]
    # The version is in the kernel package, whose file is read without its import.
    assert roots == {"nemocascade"}


def test_help_of_settings_without_sections_reads_well() -> None:
    (order, plan), _ = run(["order", "--help"], ["plan", "--help", SFT])
    assert (order[0], plan[0]) == (0, 0)
    assert "and say how sure it is." in " ".join(order[1].split())
    assert not any(line.startswith("    is.") for line in order[1].splitlines())
    assert "--gpus" in plan[1]


def test_help_for_a_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        command = [sys.executable, "-m", "nemocascade.cli", "plan", "--help"]
        done = subprocess.run(
            command, stdout=pipe, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_misspelt_command_is_told_the_nearest() -> None:
    [found], _ = run(["genrate"])
    assert found[0] == 2
    assert "'genrate' is not a command: did you mean generate" in found[2]


def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    def cpu_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "nemocascade.cli", "--help"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(cpu_s() for _ in range(3)) < 0.5


def test_a_misspelt_option_of_any_command_is_found_before_torch_is_imported() -> None:
    positional = {
        "generate": 1,
        "convert": 2,
        "merge": 2,
        "diff": 2,
        "import-swe": 2,
        "watch": 1,
        "order": 1,
        "interference": 1,
        "plan": 1,
        "preflight": 1,
    }
    lines = [
        [name, *["build"] * (name == "data"), *[SFT] * positional.get(name, 1), "--gpuz", "1"]
        for name in SETTINGS
    ]
    lines += [["serve", "--portt", "1", "MODEL"]]
    lines += [["run", SFT, "--stepz", "1"], ["run", CASCADE, "--stages.sft.stepz", "1"]]
    found, roots = run(*lines)
    wrong = [(line, f) for line, f in zip(lines, found, strict=True) if f[0] != 2 or not f[2]]
    assert not wrong
    # The planner's distributions of lengths need numpy.
    assert roots <= PARSER | {"numpy"}
    assert "--gpu" in found[list(SETTINGS).index("plan")][2]
    assert "nemocascade serve has --port, not --portt" in found[-3][2]
    assert "--steps" in found[-2][2]
    assert "--stages.sft.steps" in found[-1][2]


def test_no_recipe_imports_torch_before_its_command_line_is_checked() -> None:
    scripts = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("recipes/*/*.py"))
    scripts = [s for s in scripts if "launch(RECIPE)" in (ROOT / s).read_text()]
    assert len(scripts) > 20
    found, roots = run(*(["run", script, "--no-such-option"] for script in scripts))
    assert [code for code, *_ in found] == [2] * len(scripts)
    assert "torch" not in roots
    assert "megatron" not in roots


def test_help_by_section() -> None:
    lines = [
        ["run", SFT, "--help"],
        ["run", SFT, "--help", "data"],
        ["run", SFT, "--help-all"],
        ["run", SFT, "--help", "dat"],
        ["run", CASCADE, "--help"],
        ["run", CASCADE, "--help", "stages.if_rl.rollout.parallel"],
        ["score", "--help", "scores.envs"],
    ]
    found, _ = run(*lines)
    short, data, whole, wrong, cascade, deep, scores = (out for _, out, _ in found)
    assert [code for code, *_ in found] == [0, 0, 0, 2, 0, 0, 0]
    assert len(short.splitlines()) < 60 < len(whole.splitlines())
    for section in ("model", "data", "optimizer", "parallel", "engine"):
        assert f"\n  {section} " in short
    assert "--steps" in short
    assert "--data.path" not in short
    assert "--data.path" in data
    assert "--data.capacity" in data
    assert "--optimizer.lr" not in data
    assert "--steps" not in data
    assert {"--steps", "--data.path", "--optimizer.lr"} <= set(whole.split())
    assert not wrong
    assert "did you mean data?" in found[3][2]
    assert len(cascade.splitlines()) < 60
    assert "\n  stages.if-rl " in cascade
    assert "--stages.if-rl.rollout.parallel.tp" in deep
    assert "--stages.if-rl.rollout.prompts-per-step" not in deep
    assert "--scores.envs.check-workers" in scores
    assert "\n  scores.envs.sandbox " in scores


def test_recipes_are_copied_to_a_new_folder_only(tmp_path: Path) -> None:
    found, _ = run(["recipes", str(tmp_path)], ["recipes", str(tmp_path / "new")], ["recipes"])
    assert [code for code, *_ in found] == [2, 0, 0]
    assert "nothing is overwritten" in found[0][2]
    assert (tmp_path / "new" / "tiny" / "sft.py").read_text() == (ROOT / SFT).read_text()
    assert "tiny/sft.py" in found[2][1]


def test_every_command_can_be_completed() -> None:
    plain = {"report", "recipes", "completion"}
    assert set(COMMANDS) == set(SETTINGS) | set(WITH_RECIPE) | plain


def test_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names = list(COMMANDS)
    assert candidates(["pr"], names) == ["preflight"]
    assert candidates(["run", "recipes/ti"], names) == []
    assert candidates(["run", SFT, "--engine.prec"], names) == ["--engine.precision"]
    assert candidates(["run", SFT, "--engine.precision", ""], names) == ["fp32", "bf16"]
    assert candidates(["run", SFT, "--resume", "F"], names) == ["False"]
    assert candidates(["run", CASCADE, "--stages.mopd.mopd.ke"], names) == [
        "--stages.mopd.mopd.keep"
    ]
    assert candidates(["plan", SFT, "--gp"], names) == ["--gpus", "--gpu"]
    assert "--steps" in candidates(["plan", SFT, "--st"], names)
    assert candidates(["run", "nowhere.py", "--st"], names) == []


@pytest.mark.parametrize("shell", sorted(SCRIPTS))
def test_a_shell_completes(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "nemocascade"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m nemocascade.cli "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = f"nemocascade run {SFT} --engine.prec"
    asks = {
        "bash": f"""
            eval "$(nemocascade completion bash)"
            COMP_WORDS=({words}); COMP_CWORD=3
            _nemocascade
            printf '%s\\n' "${{COMPREPLY[@]}}"
            complete -p nemocascade
            """,
        "zsh": f"""
            compdef() {{ print "compdef $*" }}
            compadd() {{ print -l -- ${{(P)argv[-1]}} }}
            eval "$(nemocascade completion zsh)"
            words=({words}); CURRENT=4
            _nemocascade
            """,
    }
    done = subprocess.run(
        [shell, "-c", asks[shell]],
        capture_output=True, text=True, check=True, cwd=ROOT, env=environment,
    )  # fmt: skip
    assert "--engine.precision" in done.stdout.splitlines()
    assert "_nemocascade nemocascade" in done.stdout
