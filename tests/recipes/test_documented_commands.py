"""Every command in the code blocks of the documents exists, with the options that it is given; a
slow test runs the commands of README's section "Use" at reduced size."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.page_commands import ROOT, command_blocks, command_lines, reduced, words_of

from nemocascade import cli
from nemocascade.cascade import launch as cascade_launch
from nemocascade.cascade.completion import settings_class
from nemocascade.recipe import shipped
from nemocascade.recipe.rules import number_problems
from nemocascade.runtime.command_line import parse_known_settings, parse_settings
from nemocascade_vllm import serve

PAGES = (
    "README.md",
    "benchmarks/README.md",
    "kernels/README.md",
    *sorted(page.relative_to(ROOT).as_posix() for page in ROOT.glob("docs/*.md")),
)
COMMANDS = sorted({command for page in PAGES for command in command_lines(page)})
OTHER_PROGRAMS = ("apptainer", "curl", "docker", "hf", "lm_eval", "pip", "source")
"""Programs that are not of this project: nothing is checked."""
TORCHRUN = {"--nproc-per-node": 1, "--nnodes": 1, "--standalone": 0, "--no-python": 0}
"""The options of torchrun that the documents use, with their numbers of values."""
FRAGMENT_OF = "recipes/nemotron3_nano_30b/if_rl.py"
"""A line that begins with an option shows settings of an RL stage."""


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Checks a command with the parsers of the project, which then do nothing more. Raises
    AssertionError for a wrong one."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "_act", acts_not)
    monkeypatch.setattr(cli, "_execute_on_recipe", parse_on_recipe)
    monkeypatch.setattr(shipped, "copy_recipes", lambda target: f"{target}")
    for name in ("run_report", "run_comparison"):
        monkeypatch.setattr(cascade_launch, name, lambda *folders: None)

    def check(command: str) -> None:
        try:
            check_command(command)
        except SystemExit as error:
            if error.code:
                raise AssertionError(f"{command}: exit code {error.code}") from error

    return check


def acts_not(settings: Any, act: object) -> None:
    """Takes the place of the work of a command."""
    assert not number_problems(settings)
    for script in getattr(settings, "recipes", ()):
        assert (ROOT / script).is_file(), script


def parse_on_recipe(name: str, kind: type[Any], act: object, arguments: list[str]) -> None:
    """Takes the place of the work of a command on a recipe."""
    own, rest = cli._split(arguments)
    settings, others = parse_known_settings(kind, own, prog=f"nemocascade {name}")
    acts_not(settings, act)
    cli._overridden(settings.recipe, [*others, *rest])


def check_command(command: str) -> None:
    command = re.sub(r'^eval "\$\((.*)\)"', r"\1", command)
    program, *words = words_of(command)
    for before, word in pairwise([program, *words]):
        if word.startswith(("recipes/", "benchmarks/")) and before != "--out":
            assert (ROOT / word).is_file(), word
    if program.startswith("--"):
        check_script([FRAGMENT_OF, program, *words])
    elif program.endswith("/torchrun") or program == "torchrun":
        check_torchrun(words)
    elif program in ("python", "make", "nemocascade", "nemocascade-vllm"):
        CHECKS[program](words)
    else:
        assert program in OTHER_PROGRAMS or re.match(r"[A-Z]+=", program), program


def check_nemocascade(words: Sequence[str]) -> None:
    name, *arguments = words
    assert name in cli.COMMANDS, name
    if name == "run":
        check_script(arguments)
    elif name == "replay":
        # The command itself reads the settings of the run that it is given.
        parse_settings(settings_class(name), ["--path", *arguments], config=())
    else:
        cli.COMMANDS[name](arguments)
        if name == "submit":
            own, rest = cli._split(arguments)
            for script in parse_settings(settings_class(name), own, config=()).recipes:
                cli._overridden(script, rest)


def check_script(words: Sequence[str]) -> None:
    """A recipe, or another script or module of the project, with its arguments."""
    script, *arguments = words
    if script == "-c":
        compile(arguments[0], "command", "exec")
    elif script == "-m":
        check_module(arguments)
    elif script.startswith("recipes/"):
        cli._overridden(script, arguments)
    else:
        assert script.startswith("benchmarks/"), script
        module: Any = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        module.parse(arguments)


def check_module(words: Sequence[str]) -> None:
    name, *arguments = words
    if name == "nemocascade.cli":
        check_nemocascade(arguments)
        return
    assert name == "nemocascade_kernels.compile", name
    module: Any = importlib.import_module(name)
    module.parse(arguments)


def check_torchrun(words: Sequence[str]) -> None:
    rest, starts_program = list(words), False
    while rest[0] in TORCHRUN:
        starts_program |= rest[0] == "--no-python"
        del rest[: 1 + TORCHRUN[rest[0]]]
    check_command(shlex.join(rest)) if starts_program else check_script(rest)


def check_make(words: Sequence[str]) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in words:
        name, is_variable, _ = word.partition("=")
        found = rf"\$\({name}\b" if is_variable else rf"^{re.escape(name)}:"
        assert re.search(found, text, re.MULTILINE), word


def check_vllm(words: Sequence[str]) -> None:
    # Options that it does not have are those of `vllm serve`.
    options, _ = serve._parser().parse_known_args(words)
    assert options.model


CHECKS: dict[str, Callable[[Sequence[str]], None]] = {
    "python": check_script,
    "make": check_make,
    "nemocascade": check_nemocascade,
    "nemocascade-vllm": check_vllm,
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_documented_command_exists(command: str, check: Callable[[str], None]) -> None:
    check(command)


@pytest.mark.parametrize(
    "command",
    [
        "make casacde",
        "make setup GPUS=1",
        "python recipes/tiny/stf.py",
        "python recipes/tiny/sft.py --stpes 5",
        "python recipes/tiny/sft.py --steps many",
        "python benchmarks/run.py --siute cpu",
        "python -m nemocascade_kernels.compile --arhc sm_90",
        "torchrun --nproc-per-node 2 recipes/tiny/sft.py --parallel.tpp 2",
        "torchrun --nproc 2 recipes/tiny/sft.py",
        "nemocascade plna recipes/tiny/sft.py",
        "nemocascade run recipes/tiny/cascade.py --dry-rnu",
        "nemocascade run recipes/tiny/cascade.py --stages.iff-rl.steps 2",
        "nemocascade plan recipes/tiny/sft.py --gpsu 8",
        "nemocascade plan recipes/tiny/sft.py --gpus 8 -- --parallel.tpp 4",
        "nemocascade submit recipes/tiny/sft.py --nodes 2 -- --parallel.tpp 4",
        "nemocascade submit recipes/tiny/stf.py --nodes 2",
        "nemocascade score --artifact A --domain math",
        "nemocascade data build --recipe recipes/tiny/sft.py --outptu A",
        "nemocascade report RUN --json",
        "nemocascade-vllm --announce RUN",
        "--rollout.slost 0",
        "nemocascde run recipes/tiny/sft.py",
    ],
)
def test_a_misspelt_command_is_found(command: str, check: Callable[[str], None]) -> None:
    with pytest.raises(AssertionError):
        check(command)


SFT = {"--steps": "2", "--log.tensorboard": "False", "--data.capacity": "512"}
USE_SIZES = {
    # The second run resumes at the step of the first.
    "torchrun": SFT | {"--steps": "3"},
    "recipes/tiny/sft.py": SFT,
    "score": {"--limit": "2", "--scores.tasks": "2", "--scores.max-response-tokens": "4"},
    "chat": {"--max-tokens": "4", "--engine.precision": "fp32"},
}
"""Settings that make a command of the section small, by its recipe or its name."""
USE_BEFORE = {
    "score": "for stage in sft code_rl; do mkdir -p runs/tiny/cascade/stages/$stage; "
    "cp -r runs/tiny/sft/artifact runs/tiny/cascade/stages/$stage; done",
    "convert": "nemocascade convert runs/tiny/sft/artifact hugging_face",
    "merge": "python recipes/tiny/sft.py --init-from runs/tiny/sft/artifact --lora.rank 4 "
    "--steps 1 --log.tensorboard False --data.capacity 512 --run-dir runs/lora",
}
"""Preparations of a command: the artifacts of the cascade, and what placeholders stand for."""
USE_PLACES = {
    "HUGGING_FACE_FOLDER": "hugging_face",
    "ADAPTER_FOLDER": "runs/lora/adapter",
}


def use_script() -> str:
    """The commands of README's section "Use" at reduced size, for bash."""
    [block] = [b for b in command_blocks("README.md") if b[0] == "source .venv/bin/activate"]
    lines = []
    for command in block:
        words = [USE_PLACES.get(word, word) for word in reduced(command, USE_SIZES)]
        name = words[1]
        words = [f"{name}_made" if word == "ARTIFACT_FOLDER" else word for word in words]
        lines += [USE_BEFORE[name]] if name in USE_BEFORE else []
        lines.append(("echo '2 + 3?' | " if name == "chat" else "") + shlex.join(words))
    return "\n".join(lines)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not (ROOT / ".venv" / "bin" / "activate").is_file(), reason="no .venv: `make setup` makes it"
)
def test_the_commands_of_use_run_in_a_clean_shell(tmp_path: Path) -> None:
    for name in (".venv", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    variables = ["PATH=/usr/bin:/bin", f"HOME={tmp_path}"]
    if (ROOT / ".venv").is_symlink():
        # The environment of another checkout, which is the one that is installed in it.
        variables.append(f"PYTHONPATH={ROOT}:{ROOT / 'kernels'}")
    done = subprocess.run(
        ["env", "-i", *variables, "bash", "-exc", use_script()],
        cwd=tmp_path, capture_output=True, text=True, check=False, timeout=3500,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}{done.stderr[-4000:]}"
    for folder in ("runs/tiny/sft/artifact", "convert_made", "merge_made"):
        assert (tmp_path / folder / "manifest.json").is_file(), folder
    for text in ('"scores": {"math"', "tokens of context", "#SBATCH --nodes=32", "sft: run"):
        assert text in done.stdout
