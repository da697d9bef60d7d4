"""Command line: `nemocascade run | eval | score | report | plan | ...`.

Each command imports the settings that it parses, and what it does only after that: help, version
and errors of the command line need no torch.
"""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

import nemocascade

if TYPE_CHECKING:
    from nemocascade.recipe import Recipe

USAGE = """usage: nemocascade COMMAND ...

  run RECIPE.py [--field value ...]              run a recipe script: a stage, or a cascade
  recipes [NEW_FOLDER]                           recipe scripts: list them, or copy them
  eval --artifact DIR --data.path FILE ...       held-out loss of an artifact
  score --artifact DIR --domains NAME ...        mean reward of its answers to held-out tasks;
                                                 --samples K: avg@k and pass@k
  chat MODEL                                     talk with a model in the terminal
  generate MODEL PROMPTS --output FILE           answers to a file of prompts
  serve MODEL --port N                           OpenAI-compatible server of a model
  report RUN [OTHER]                             artifacts, scores and teachers of a cascade; OTHER:
                                                 two runs side by side
  watch RUN                                      follow a run, and keep its report up to date
  interference RECIPE.py [--stages NAME ...]     what each RL stage does to every domain; --pairs:
                                                 what a later stage wins back
  order RUN                                      order of the stages that the matrix supports
  plan RECIPE.py --gpus N --gpu NAME             memory and time of every layout
  preflight RECIPE.py [--ranks N]                every problem of a job before it starts
  submit RECIPE.py ... --nodes N                 Slurm jobs, one a stage
  diff A B                                       settings that differ: runs, recipes or artifacts
  convert SOURCE TARGET                          Hugging Face folder <-> artifact; adapter -> PEFT
  merge ADAPTER TARGET                           adapter of a LoRA stage -> full artifact
  pass-rates ROWS --output ROWS2 ...             how often a policy solves each row
  replay RUN/rollouts                            score logged episodes with tools again
  import-swe ROWS FOLDER --repositories FOLDER   tasks of SWE-Gym or R2E-Gym rows, from git clones
  check-tasks PATH                               whether the tests of repair tasks can decide
  tokenizer --data.path FILE ... --output FILE   train a sentencepiece tokenizer
  data build --data.path FILE ... --output DIR   tokenise rows once, in parallel; --recipe
                                                 RECIPE.py: those of an SFT recipe
  completion bash | zsh                          completion of commands, options and settings:
                                                 eval "$(nemocascade completion bash)"

`nemocascade COMMAND --help` shows the settings of a command, `nemocascade --version` the version.
"""


def _run(arguments: list[str]) -> None:
    usage = "usage: nemocascade run RECIPE.py [--field value ...]"
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{usage}\n\nnemocascade run RECIPE.py --help shows the settings of a recipe.")
        return
    if not arguments or arguments[0].startswith("-"):
        raise SystemExit(usage)
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"nemocascade run: {script} is not a file: name a recipe script")
    sys.argv = arguments
    # Modules beside the script, as Python itself runs it.
    sys.path.insert(0, str(script.parent.resolve()))
    runpy.run_path(str(script), run_name="__main__")


def _eval(arguments: list[str]) -> None:
    from nemocascade.stages.settings import EvalSettings

    def act(settings: EvalSettings) -> None:
        from nemocascade.stages.evaluate import run_eval

        loss, tokens = run_eval(settings)
        print(json.dumps({"artifact": settings.artifact, "loss": loss, "tokens": tokens}))

    _execute("eval", EvalSettings, act, arguments)


def _score(arguments: list[str]) -> None:
    from nemocascade.stages.settings import ScoreSettings

    def act(settings: ScoreSettings) -> None:
        from nemocascade.runtime.jsonl import json_text
        from nemocascade.runtime.launcher import is_main_process
        from nemocascade.stages.score import run_scoring

        found = run_scoring(settings)
        if is_main_process():
            print(json_text(found.as_json()))

    # The settings are shared with recipes, where a boolean is given with its value.
    _execute("score", ScoreSettings, act, arguments, as_recipe=True)


def _generate(arguments: list[str]) -> None:
    from nemocascade.serving.settings import GenerateSettings

    def act(settings: GenerateSettings) -> None:
        from nemocascade.runtime.launcher import is_main_process
        from nemocascade.serving.prompts import generate

        found = generate(settings)
        if is_main_process():
            print(json.dumps(found))

    _execute("generate", GenerateSettings, act, arguments, as_recipe=True)


def _pass_rates(arguments: list[str]) -> None:
    from nemocascade.recipe.pass_rates import PassRateSettings, settings_of_stage
    from nemocascade.runtime.command_line import parse_settings
    from nemocascade.runtime.errors import exit_cleanly

    def act(settings: PassRateSettings) -> None:
        from nemocascade.runtime.jsonl import json_text
        from nemocascade.runtime.launcher import is_main_process
        from nemocascade.stages.pass_rates import run_pass_rates

        found = run_pass_rates(settings)
        if is_main_process():
            print(json_text(found))

    # The recipe's settings are the defaults of the command's.
    script = _value_of("--recipe", arguments)
    settings = parse_settings(
        PassRateSettings,
        arguments,
        default=exit_cleanly(lambda: settings_of_stage(script)),
        prog="nemocascade pass-rates",
    )
    _act(settings, act)


def _report(arguments: list[str]) -> None:
    usage = "usage: nemocascade report RUN [OTHER]"
    if arguments[:1] in (["-h"], ["--help"]):
        print(f"{usage}\n\nOTHER: a second run; the page shows both side by side.")
        return
    if not 1 <= len(arguments) <= 2 or any(a.startswith("-") for a in arguments):
        raise SystemExit(usage)
    from nemocascade.cascade.launch import run_comparison, run_report
    from nemocascade.runtime.errors import exit_cleanly

    folders = [Path(argument) for argument in arguments]
    if len(folders) == 2:
        exit_cleanly(lambda: run_comparison(*folders))
    else:
        exit_cleanly(lambda: run_report(folders[0]))


def _tokenizer(arguments: list[str]) -> None:
    from nemocascade.recipe.commands import TokenizerSettings

    def act(settings: TokenizerSettings) -> None:
        from nemocascade.data.tokenizer_training import train_tokenizer

        tokenizer = train_tokenizer(
            settings.data, settings.vocab_size, settings.output, seed=settings.seed
        )
        print(f"{settings.output}: {tokenizer.vocab_size} ids")

    _execute("tokenizer", TokenizerSettings, act, arguments)


def _data(arguments: list[str]) -> None:
    from nemocascade.recipe.build import BuildSettings, build_settings_of
    from nemocascade.runtime.command_line import parse_settings
    from nemocascade.runtime.errors import exit_cleanly

    if arguments[:1] != ["build"]:
        raise SystemExit("usage: nemocascade data build --data.path FILE ... --output DIR")
    # The recipe's settings are the defaults of the command's.
    script = _value_of("--recipe", arguments)
    settings = parse_settings(
        BuildSettings,
        arguments[1:],
        default=exit_cleanly(lambda: build_settings_of(script)),
        prog="nemocascade data build",
    )

    def act(settings: BuildSettings) -> None:
        from nemocascade.data.build_jobs import run_build

        tokenizer = settings.tokenizer.path
        if not tokenizer and settings.init_from:
            from nemocascade.megatron.artifact import read_artifact
            from nemocascade.stages.setup import artifact_tokenizer

            tokenizer = artifact_tokenizer(read_artifact(Path(settings.init_from)))
        print(run_build(settings, tokenizer))

    _act(settings, act)


def _interference(arguments: list[str]) -> None:
    from nemocascade.recipe.commands import InterferenceSettings

    def act(settings: InterferenceSettings, rest: list[str]) -> None:
        from nemocascade.runtime.hub_rows import with_hub_files

        recipe = with_hub_files(_overridden(settings.recipe, rest))
        from nemocascade.cascade.interference import print_interference

        print_interference(recipe, settings)

    _execute_on_recipe("interference", InterferenceSettings, act, arguments)


def _order(arguments: list[str]) -> None:
    from nemocascade.recipe.commands import OrderSettings

    def act(settings: OrderSettings) -> None:
        from nemocascade.cascade.order import advise
        from nemocascade.cascade.order_text import order_text
        from nemocascade.runtime.jsonl import json_text
        from nemocascade.runtime.logging import printable

        found = advise(settings)
        print(json_text(found.as_json()) if settings.json else printable(order_text(found)))

    _execute("order", OrderSettings, act, arguments)


@contextlib.contextmanager
def _without_collections() -> Iterator[None]:
    """Context of a search: its millions of small objects have no cycles, and collections of them
    take a tenth of its time."""
    import gc

    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _plan(arguments: list[str]) -> None:
    from nemocascade.plan.settings import PlanSettings

    def act(settings: PlanSettings, rest: list[str]) -> None:
        recipe = _overridden(settings.recipe, rest)
        from nemocascade.recipe import CascadeRecipe

        if isinstance(recipe, CascadeRecipe):
            from nemocascade.cascade.planning import plan_cascade

            print(plan_cascade(recipe, settings))
        elif settings.simulate:
            from nemocascade.stages.simulation import simulated_report

            text, value = simulated_report(recipe, settings)
            print(json.dumps(value, indent=1) if settings.json else text)
        else:
            from nemocascade.plan.summary import plan_recipe

            print(plan_recipe(recipe, settings))

    with _without_collections():
        _execute_on_recipe("plan", PlanSettings, act, arguments)


def _preflight(arguments: list[str]) -> None:
    from nemocascade.plan.settings import PreflightSettings

    def act(settings: PreflightSettings, rest: list[str]) -> None:
        from nemocascade.plan.findings import Preflight
        from nemocascade.recipe import CascadeRecipe
        from nemocascade.runtime.hub_rows import with_hub_files
        from nemocascade.runtime.logging import printable

        def show(line: str) -> None:
            print(printable(line), flush=True)

        found = Preflight(show=None if settings.json else show)
        if not settings.json:
            show("preflight:")
        with found.guarded("recipe"):
            recipe = with_hub_files(_overridden(settings.recipe, rest))
            if isinstance(recipe, CascadeRecipe):
                from nemocascade.cascade.preflight import check_cascade

                check_cascade(recipe, settings, found)
            else:
                from nemocascade.plan.preflight import check_recipe

                check_recipe(recipe, settings, found)
        print(found.as_json() if settings.json else found.conclusion())
        if found.problems:
            raise SystemExit(2)

    _execute_on_recipe("preflight", PreflightSettings, act, arguments)


def _submit(arguments: list[str]) -> None:
    from nemocascade.plan.submission import SubmitSettings

    own, rest = _split(arguments)

    def act(settings: SubmitSettings) -> None:
        from nemocascade.cascade.launch import parse_cascade
        from nemocascade.cascade.planning import jobs_of_cascade
        from nemocascade.plan.slurm import check_submission, job_of_script, submit_jobs
        from nemocascade.plan.submission import SlurmJob
        from nemocascade.recipe import CascadeRecipe, PolicyRecipe, load_any_recipe
        from nemocascade.stages.launch import parse

        check_submission(settings, rest)
        jobs: list[SlurmJob] = []
        for script in map(Path, settings.recipes):
            recipe = load_any_recipe(script)
            # Arguments that the recipe does not have end here, not after hours in the queue.
            if isinstance(recipe, CascadeRecipe):
                jobs += jobs_of_cascade(script, recipe, rest)
                parse_cascade(recipe, rest)
            else:
                parse(recipe, rest)
                rollouts = isinstance(recipe, PolicyRecipe)
                jobs.append(job_of_script(script, recipe.run_dir, rest, rollouts=rollouts))
        submit_jobs(settings, jobs)

    _execute("submit", SubmitSettings, act, own)


def _diff(arguments: list[str]) -> None:
    from nemocascade.recipe.commands import DiffSettings

    def act(settings: DiffSettings) -> None:
        from nemocascade.cascade.comparison import compare
        from nemocascade.runtime.logging import printable

        found = compare(settings)
        print(printable("\n".join(found)) or "no setting differs")
        if found:
            raise SystemExit(1)

    _execute("diff", DiffSettings, act, arguments)


def _overridden(script: str, arguments: list[str]) -> Recipe:
    """The recipe of a script, of any kind, with the command line's overrides."""
    from nemocascade.cascade.launch import parse_cascade
    from nemocascade.recipe import CascadeRecipe, load_any_recipe
    from nemocascade.stages.launch import parse

    recipe = load_any_recipe(Path(script))
    if isinstance(recipe, CascadeRecipe):
        return parse_cascade(recipe, arguments)[0]
    return parse(recipe, arguments)


def _replay(arguments: list[str]) -> None:
    from nemocascade.recipe.commands import ReplaySettings
    from nemocascade.runtime.command_line import parse_settings
    from nemocascade.runtime.errors import exit_cleanly

    if arguments and not arguments[0].startswith("-"):
        arguments = ["--path", *arguments]
    prog = "nemocascade replay"

    def work() -> None:
        settings = parse_settings(ReplaySettings, arguments, prog=prog, config=())
        from nemocascade.rl.trajectories import replay, settings_of_run
        from nemocascade.runtime.logging import printable

        if arguments[:1] == ["--path"]:
            # The run's settings are the defaults of the command's.
            own = settings_of_run(Path(settings.path))
            settings = parse_settings(ReplaySettings, arguments, default=own, prog=prog, config=())
        found = replay(settings)
        for episode in found:
            verdict = episode.verdict
            note = "" if episode.same else f"  DIFFERS, it was {episode.logged}"
            print(printable(f"{episode.where}: {verdict.error or verdict.reward}{note}"))
        if different := sum(not episode.same for episode in found):
            raise SystemExit(f"{different} of {len(found)} episodes have another verdict")

    exit_cleanly(work)


def _import_swe(arguments: list[str]) -> None:
    from nemocascade.recipe.commands import ImportSettings

    def act(settings: ImportSettings) -> None:
        from nemocascade.runtime.logging import printable
        from nemocascade.runtime.row_errors import DataError
        from nemocascade.swe.importing import import_rows

        try:
            found = import_rows(settings)
        except ValueError as error:
            raise DataError(str(error)) from error
        print(printable(found.text()))
        if found.failed:
            raise SystemExit(1)

    _execute("import-swe", ImportSettings, act, arguments)


def _check_tasks(arguments: list[str]) -> None:
    from nemocascade.recipe.commands import CheckSettings

    def act(settings: CheckSettings) -> None:
        from nemocascade.envs.swe_checking import check_tasks, summary
        from nemocascade.runtime.logging import printable
        from nemocascade.runtime.row_errors import DataError
        from nemocascade.types import SandboxUnavailable

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


def _recipes(arguments: list[str]) -> None:
    usage = "usage: nemocascade recipes [NEW_FOLDER]   list the recipe scripts, or copy them"
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage)
        return
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        raise SystemExit(usage)
    from nemocascade.recipe.shipped import copy_recipes, list_recipes
    from nemocascade.runtime.errors import exit_cleanly

    print(exit_cleanly(lambda: copy_recipes(Path(arguments[0])) if arguments else list_recipes()))


def _completion(arguments: list[str]) -> None:
    usage = (
        'usage: eval "$(nemocascade completion bash)"   in ~/.bashrc\n'
        '       eval "$(nemocascade completion zsh)"    in ~/.zshrc, after compinit\n'
        "\nCompletes commands, options, their values, and the settings of a named recipe."
    )
    from nemocascade.cascade.completion import SCRIPTS, candidates

    if arguments[:2] == ["words", "--"]:
        # A recipe that cannot be read has no words; running it says why.
        with contextlib.suppress(Exception, SystemExit):
            print("\n".join(candidates(arguments[2:], list(COMMANDS))))
    elif len(arguments) == 1 and arguments[0] in SCRIPTS:
        print(SCRIPTS[arguments[0]], end="")
    else:
        print(usage)
        raise SystemExit(0 if arguments[:1] in (["-h"], ["--help"]) else 2)


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
    from nemocascade.runtime.command_line import nearest, parse_known_settings

    own, rest = _split(arguments)
    parsed, others = parse_known_settings(settings, own, prog=f"nemocascade {name}")
    try:
        _act(parsed, lambda checked: act(checked, [*others, *rest]))
    except SystemExit as error:
        if error.code == 2 and (near := nearest(others, settings)):
            print(f"nemocascade {name} itself has {' and '.join(near)}", file=sys.stderr)
        raise


def _execute[S](
    name: str,
    settings: type[S],
    act: Callable[[S], object],
    arguments: list[str],
    *,
    as_recipe: bool = False,
) -> None:
    """Call `act` with the settings that the arguments give. as_recipe: a boolean is given with its
    value, as in a recipe."""
    from nemocascade.runtime.command_line import VALUES, parse_settings

    config = VALUES if as_recipe else ()
    _act(parse_settings(settings, arguments, prog=f"nemocascade {name}", config=config), act)


def _calling(name: str, work: str, *, as_recipe: bool = False) -> Callable[[list[str]], None]:
    """A command that calls the function `work`, "module:function", with its settings."""

    def command(arguments: list[str]) -> None:
        from nemocascade.cascade.completion import settings_class

        _execute(name, settings_class(name), lambda s: resolve_name(work)(s), arguments,
                 as_recipe=as_recipe)  # fmt: skip

    return command


def _act[S](settings: S, act: Callable[[S], object]) -> None:
    """Call `act` with settings whose numbers are legal; errors of users end the program."""
    from nemocascade.recipe import RecipeError
    from nemocascade.recipe.rules import number_problems
    from nemocascade.runtime.errors import exit_cleanly
    from nemocascade.runtime.hub_rows import with_hub_files

    def work() -> None:
        if problems := number_problems(settings):
            raise RecipeError(problems)
        act(with_hub_files(settings))

    exit_cleanly(work)


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "run": _run,
    "recipes": _recipes,
    "eval": _eval,
    "score": _score,
    "chat": _calling("chat", "nemocascade.serving.chat:chat", as_recipe=True),
    "generate": _generate,
    "serve": _calling("serve", "nemocascade.serving.server:serve", as_recipe=True),
    "pass-rates": _pass_rates,
    "report": _report,
    "watch": _calling("watch", "nemocascade.cascade.watch:watch"),
    "interference": _interference,
    "order": _order,
    "plan": _plan,
    "preflight": _preflight,
    "submit": _submit,
    "diff": _diff,
    "convert": _calling("convert", "nemocascade.stages.conversion:run_convert"),
    "merge": _calling("merge", "nemocascade.stages.conversion:run_merge"),
    "tokenizer": _tokenizer,
    "data": _data,
    "replay": _replay,
    "import-swe": _import_swe,
    "check-tasks": _check_tasks,
    "completion": _completion,
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
        import difflib

        near = difflib.get_close_matches(name, COMMANDS, 2)
        meant = f": did you mean {' or '.join(near)}?" if near else ""
        print(f"{USAGE}\nnemocascade: {name!r} is not a command{meant}", file=sys.stderr)
        raise SystemExit(2)


if __name__ == "__main__":
    main()
