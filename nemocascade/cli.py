"""Command line: `nemocascade run | eval | score | report | plan | ...`.

Each command imports its modules when it runs: help and version need no torch.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import tyro

import nemocascade
from nemocascade.recipe import (
    CascadeRecipe,
    DataConfig,
    PolicyRecipe,
    Recipe,
    RecipeError,
    load_any_recipe,
)
from nemocascade.recipe.rules import Count, Positive, Seed, number_problems

USAGE = """usage: nemocascade COMMAND ...

  run RECIPE.py [--field value ...]              run a recipe script: a stage, or a cascade
  eval --artifact DIR --data.path FILE ...       held-out loss of an artifact
  score --artifact DIR --domains NAME ...        mean reward of its answers to held-out tasks;
                                                 --samples K: avg@k and pass@k
  report RUN                                     artifacts, scores and teachers of a cascade
  plan RECIPE.py --gpus N --gpu NAME             memory and time of every layout
  preflight RECIPE.py [--ranks N]                every problem of a job before it starts
  submit RECIPE.py ... --nodes N                 Slurm jobs, one a stage
  diff A B                                       settings that differ: runs, recipes or artifacts
  convert SOURCE TARGET                          Hugging Face folder <-> artifact
  pass-rates ROWS --output ROWS2 ...             how often a policy solves each row
  replay RUN/rollouts                            score logged episodes with tools again
  import-swe ROWS FOLDER --repositories FOLDER   tasks of SWE-Gym or R2E-Gym rows, from git clones
  check-tasks PATH                               whether the tests of repair tasks can decide
  tokenizer --data.path FILE ... --output FILE   train a sentencepiece tokenizer

`nemocascade COMMAND --help` shows all settings of a command, `nemocascade --version` the version.
"""


@dataclass(frozen=True)
class TokenizerSettings:
    """Train a sentencepiece tokenizer on the rendered conversations of `data.path`."""

    data: DataConfig = field(default_factory=DataConfig)
    vocab_size: Count = 2048
    """Number of ids, including the template's tags and one id for each byte."""

    output: str = "tokenizer.model"
    """File to write; must end in .model."""

    seed: Seed = 1
    """Seed of synthetic rows."""


def _run(arguments: list[str]) -> None:
    usage = "usage: nemocascade run RECIPE.py [--field value ...]"
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{usage}\n\nnemocascade run RECIPE.py --help shows all settings of a recipe.")
        return
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(usage)
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"nemocascade run: {script} is no file: name a recipe script")
    sys.argv = arguments
    # Modules beside the script, as Python itself runs it.
    sys.path.insert(0, str(script.parent.resolve()))
    runpy.run_path(str(script), run_name="__main__")


def _eval(arguments: list[str]) -> None:
    from nemocascade.stages.evaluate import EvalSettings, run_eval

    def act(settings: EvalSettings) -> None:
        loss, tokens = run_eval(settings)
        print(json.dumps({"artifact": settings.artifact, "loss": loss, "tokens": tokens}))

    _execute("eval", EvalSettings, act, arguments)


def _score(arguments: list[str]) -> None:
    from nemocascade.runtime.jsonl import json_text
    from nemocascade.runtime.world import is_main_process
    from nemocascade.stages.scoring import ScoreSettings, run_scoring

    def act(settings: ScoreSettings) -> None:
        found = run_scoring(settings)
        if is_main_process():
            print(json_text(found.as_json()))

    # The settings are shared with recipes, where a boolean is given with its value.
    _execute("score", ScoreSettings, act, arguments, config=(tyro.conf.FlagConversionOff,))


def _pass_rates(arguments: list[str]) -> None:
    from nemocascade.recipe.pass_rates import PassRateSettings, settings_of_stage
    from nemocascade.runtime.errors import exit_cleanly
    from nemocascade.runtime.jsonl import json_text
    from nemocascade.runtime.world import is_main_process
    from nemocascade.stages.pass_rates import run_pass_rates

    def act(settings: PassRateSettings) -> None:
        found = run_pass_rates(settings)
        if is_main_process():
            print(json_text(found))

    # The recipe's settings are the defaults of the command's.
    script = _value_of("--recipe", arguments)
    settings = tyro.cli(
        PassRateSettings,
        default=exit_cleanly(lambda: settings_of_stage(script)),
        args=arguments,
        prog="nemocascade pass-rates",
        config=(tyro.conf.FlagConversionOff,),
    )
    _act(settings, act)


def _report(arguments: list[str]) -> None:
    usage = "usage: nemocascade report RUN"
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage)
        return
    if len(arguments) != 1 or arguments[0].startswith("-"):
        raise SystemExit(usage)
    from nemocascade.cascade.launch import run_report
    from nemocascade.runtime.errors import exit_cleanly

    exit_cleanly(lambda: run_report(Path(arguments[0])))


def _tokenizer(arguments: list[str]) -> None:
    from nemocascade.data.tokenizer_training import train_tokenizer

    def act(settings: TokenizerSettings) -> None:
        tokenizer = train_tokenizer(
            settings.data, settings.vocab_size, settings.output, seed=settings.seed
        )
        print(f"{settings.output}: {tokenizer.vocab_size} ids")

    _execute("tokenizer", TokenizerSettings, act, arguments)


@dataclass(frozen=True)
class ConvertSettings:
    """Convert a Hugging Face folder (NemotronHForCausalLM, Qwen3MoeForCausalLM) to an artifact, or
    an artifact of any layout to such a folder. The direction follows from SOURCE."""

    source: tyro.conf.Positional[str]
    """Hugging Face folder or artifact."""

    target: tyro.conf.Positional[str]
    """Folder to write."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the written weights; auto rounds nothing."""

    family: Literal["auto", "NemotronHForCausalLM", "Qwen3MoeForCausalLM"] = "auto"
    """Model family of a written Hugging Face folder; auto = the family that the model came from or
    fits."""

    shard_gib: Positive = 5.0
    """Largest weights file of a written Hugging Face folder."""


def _convert(arguments: list[str]) -> None:
    from nemocascade.data.serving import serving_of
    from nemocascade.megatron.artifact import read_artifact
    from nemocascade.megatron.convert import Serving, export_huggingface, import_huggingface

    def act(settings: ConvertSettings) -> None:
        source, target = Path(settings.source), Path(settings.target)
        if (source / "manifest.json").is_file():
            report = export_huggingface(
                source,
                target,
                precision=settings.precision,
                family=settings.family,
                shard_bytes=int(settings.shard_gib * 2**30),
                serving=Serving(*serving_of(read_artifact(source))),
            )
        else:
            report = import_huggingface(source, target, precision=settings.precision)
        print(
            f"{report.folder}: {report.family}, {report.precision}, {report.tensors} tensors, "
            f"{report.num_bytes / 2**30:.2f} GiB"
        )
        for what, names in (("rounded", report.rounded), ("not carried over", report.left_behind)):
            if names:
                print(f"{what}: {len(names)}: {', '.join(names)}")

    _execute("convert", ConvertSettings, act, arguments)


def _plan(arguments: list[str]) -> None:
    from nemocascade.cascade.planning import plan_cascade
    from nemocascade.plan.summary import PlanSettings, plan_recipe

    def act(settings: PlanSettings, rest: list[str]) -> None:
        recipe = _overridden(settings.recipe, rest)
        if isinstance(recipe, CascadeRecipe):
            print(plan_cascade(recipe, settings))
        else:
            print(plan_recipe(recipe, settings))

    _execute_on_recipe("plan", PlanSettings, act, arguments)


def _preflight(arguments: list[str]) -> None:
    from nemocascade.cascade.planning import check_cascade
    from nemocascade.plan.findings import Preflight
    from nemocascade.plan.preflight import PreflightSettings, check_recipe
    from nemocascade.runtime.logging import printable

    def act(settings: PreflightSettings, rest: list[str]) -> None:
        found = Preflight()
        with found.guarded("recipe"):
            recipe = _overridden(settings.recipe, rest)
            if isinstance(recipe, CascadeRecipe):
                check_cascade(recipe, settings, found)
            else:
                check_recipe(recipe, settings, found)
        print(found.as_json() if settings.json else printable(found.text()))
        if found.problems:
            raise SystemExit(2)

    _execute_on_recipe("preflight", PreflightSettings, act, arguments)


def _submit(arguments: list[str]) -> None:
    from nemocascade.cascade.planning import jobs_of_cascade
    from nemocascade.plan.slurm import (
        SlurmJob,
        SubmitSettings,
        check_submission,
        job_of_script,
        submit_jobs,
    )

    own, rest = _split(arguments)

    def act(settings: SubmitSettings) -> None:
        check_submission(settings, rest)
        jobs: list[SlurmJob] = []
        for script in map(Path, settings.recipes):
            recipe = load_any_recipe(script)
            if isinstance(recipe, CascadeRecipe):
                jobs += jobs_of_cascade(script, recipe, rest)
            else:
                rollouts = isinstance(recipe, PolicyRecipe)
                jobs.append(job_of_script(script, recipe.run_dir, rest, rollouts=rollouts))
        submit_jobs(settings, jobs)

    _execute("submit", SubmitSettings, act, own)


def _diff(arguments: list[str]) -> None:
    from nemocascade.cascade.comparison import DiffSettings, compare
    from nemocascade.runtime.logging import printable

    def act(settings: DiffSettings) -> None:
        found = compare(settings)
        print(printable("\n".join(found)) or "no setting differs")
        if found:
            raise SystemExit(1)

    _execute("diff", DiffSettings, act, arguments)


def _overridden(script: str, arguments: list[str]) -> Recipe:
    """The recipe of a script, of any kind, with the command line's overrides."""
    from nemocascade.cascade.launch import parse_cascade
    from nemocascade.stages.launch import parse

    recipe = load_any_recipe(Path(script))
    if isinstance(recipe, CascadeRecipe):
        return parse_cascade(recipe, arguments)[0]
    return parse(recipe, arguments)


def _replay(arguments: list[str]) -> None:
    from nemocascade.rl.trajectories import ReplaySettings, replay, settings_of_run
    from nemocascade.runtime.errors import exit_cleanly
    from nemocascade.runtime.logging import printable

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--path", *arguments]

    def work() -> None:
        named = arguments[:1] == ["--path"] and len(arguments) > 1
        default = settings_of_run(Path(arguments[1])) if named else ReplaySettings()
        found = replay(
            tyro.cli(ReplaySettings, default=default, args=arguments, prog="nemocascade replay")
        )
        for episode in found:
            verdict = episode.verdict
            note = "" if episode.same else f"  DIFFERS, it was {episode.logged}"
            print(printable(f"{episode.where}: {verdict.error or verdict.reward}{note}"))
        if different := sum(not episode.same for episode in found):
            raise SystemExit(f"{different} of {len(found)} episodes have another verdict")

    exit_cleanly(work)


def _import_swe(arguments: list[str]) -> None:
    from nemocascade.runtime.logging import printable
    from nemocascade.runtime.row_errors import DataError
    from nemocascade.swe.importing import ImportSettings, import_rows

    def act(settings: ImportSettings) -> None:
        try:
            found = import_rows(settings)
        except ValueError as error:
            raise DataError(str(error)) from error
        print(printable(found.text()))
        if found.failed:
            raise SystemExit(1)

    _execute("import-swe", ImportSettings, act, arguments)


def _check_tasks(arguments: list[str]) -> None:
    from nemocascade.envs.swe_checking import CheckSettings, check_tasks, summary
    from nemocascade.runtime.logging import printable
    from nemocascade.runtime.row_errors import DataError
    from nemocascade.types import SandboxUnavailable

    def act(settings: CheckSettings) -> None:
        found = []
        try:
            for task in check_tasks(settings):
                found.append(task)
                if task.faults:
                    print(printable(f"{task.name}: {'; '.join(task.faults)}"), flush=True)
        except (ValueError, SandboxUnavailable) as error:
            raise DataError(str(error)) from error
        print(summary(found))
        if any(task.faults for task in found):
            raise SystemExit(1)

    _execute("check-tasks", CheckSettings, act, arguments)


def _value_of(name: str, arguments: list[str]) -> str:
    """Value of an option, given as `--name value` or `--name=value`; empty without it."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument == name:
            return following
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return ""


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """A command's own arguments, and those after `--`, which belong to the recipe."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:at], arguments[at + 1 :]


def _execute_on_recipe[S](
    name: str, settings: type[S], act: Callable[[S, list[str]], object], arguments: list[str]
) -> None:
    """Call `act` with a command's settings, and with the arguments that are not its own: they
    override the recipe's settings."""
    own, rest = _split(arguments)
    parsed, others = tyro.cli(
        settings, args=own, prog=f"nemocascade {name}", return_unknown_args=True
    )
    _act(parsed, lambda checked: act(checked, [*others, *rest]))


def _execute[S](
    name: str,
    settings: type[S],
    act: Callable[[S], object],
    arguments: list[str],
    *,
    config: tuple[Any, ...] = (),
) -> None:
    """Call `act` with the settings that the arguments give."""
    parsed = tyro.cli(settings, args=arguments, prog=f"nemocascade {name}", config=config)
    _act(parsed, act)


def _act[S](settings: S, act: Callable[[S], object]) -> None:
    """Call `act` with settings whose numbers are legal; errors of users end the program."""
    from nemocascade.runtime.errors import exit_cleanly

    def work() -> None:
        if problems := number_problems(settings):
            raise RecipeError(problems)
        act(settings)

    exit_cleanly(work)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": _run,
    "eval": _eval,
    "score": _score,
    "pass-rates": _pass_rates,
    "report": _report,
    "plan": _plan,
    "preflight": _preflight,
    "submit": _submit,
    "diff": _diff,
    "convert": _convert,
    "tokenizer": _tokenizer,
    "replay": _replay,
    "import-swe": _import_swe,
    "check-tasks": _check_tasks,
}


def main() -> None:
    """Entry point of the `nemocascade` command."""
    name, arguments = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(USAGE, end="")
    elif name == "--version":
        print(f"nemocascade {nemocascade.__version__}")
    elif name in COMMANDS:
        COMMANDS[name](arguments)
    else:
        raise SystemExit(f"nemocascade: {name!r} is no command\n{USAGE}")


if __name__ == "__main__":
    main()
