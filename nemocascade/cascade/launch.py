"""Command line of a cascade script: overrides by stage, errors, exit codes."""

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from nemocascade.cascade.graph import StageChoice
from nemocascade.recipe import CascadeRecipe, StageConfig, StageRecipe
from nemocascade.runtime.command_line import parse_settings
from nemocascade.runtime.errors import exit_cleanly
from nemocascade.runtime.hub_rows import with_hub_files
from nemocascade.runtime.launcher import is_main_process
from nemocascade.runtime.logging import printable

STAGE_OPTION = "--stages."


@dataclass(frozen=True)
class _Shared(CascadeRecipe):
    """Settings of a cascade that belong to no stage."""

    # The settings of each stage are shown under its name.
    stages: tyro.conf.Suppress[tuple[StageConfig[StageRecipe], ...]] = ()


def cascade_command(cascade: CascadeRecipe, names: Collection[str] | None = None) -> Any:
    """Settings of a cascade's command line with its defaults. names: of the stages whose settings
    it has; None: all."""
    by_stage = make_dataclass(
        "Stages",
        [
            (s.name, type(s.recipe), field(default=s.recipe))
            for s in cascade.stages
            if names is None or s.name in names
        ],
        frozen=True,
    )
    by_stage.__doc__ = "Settings of the stages."

    # Annotations of this local class must be types: names could not be resolved later.
    @dataclass(frozen=True)
    class Command:
        """Cascade: its stages run in order, each from the artifact of an earlier stage."""

        shared: Annotated[_Shared, tyro.conf.arg(name=""), tyro.conf.FlagConversionOff]
        stages: Annotated[by_stage, tyro.conf.FlagConversionOff]  # type: ignore[valid-type]

        begin: Annotated[str, tyro.conf.arg(name="from")] = ""
        """First stage to run; earlier stages are used as they are, even if they are stale."""

        only: str = ""
        """Single stage to run."""

        again: bool = False
        """Run the stage of --from or --only again even if nothing has changed."""

        dry_run: bool = False
        """Print the stages that would run, their inputs and the reasons, and run nothing."""

    return Command(_Shared(**{**_values(cascade), "stages": ()}), by_stage())


def parse_cascade(
    cascade: CascadeRecipe, arguments: Sequence[str] | None = None
) -> tuple[CascadeRecipe, StageChoice, bool]:
    """Parse overrides; returns the new cascade, the choice of stages, and True for a dry run.

    Settings of a stage carry its name: `--stages.if-rl.steps 20`. Unknown names end the program
    with a hint.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    command = cascade_command(cascade, _named_stages(cascade, arguments))
    found: Any = parse_settings(
        type(command), arguments, default=command, config=(tyro.conf.FlagCreatePairsOff,)
    )
    stages = tuple(
        replace(s, recipe=getattr(found.stages, s.name, s.recipe)) for s in cascade.stages
    )
    resolved = CascadeRecipe(**{**_values(found.shared), "stages": stages})
    return resolved, StageChoice(found.begin, found.only, found.again), found.dry_run


def launch(cascade: CascadeRecipe, arguments: Sequence[str] | None = None) -> Path:
    """Run `cascade` with the command line's overrides; returns the last artifact's folder.

    Invalid settings end the program with a message and exit code 2, an alarm that stops the run
    with exit code 5.
    """
    resolved, choice, dry = parse_cascade(cascade, arguments)
    resolved = replace(resolved, run_dir=str(Path.cwd() / resolved.run_dir))

    def work() -> Path:
        from nemocascade.cascade.run import dry_run, run_cascade

        if dry:
            if is_main_process():
                print(dry_run(with_hub_files(resolved), choice))
            return Path(resolved.run_dir)
        artifact = run_cascade(with_hub_files(resolved), choice)
        if is_main_process():
            run_report(Path(resolved.run_dir))
        return artifact

    return exit_cleanly(work)


def run_report(run_dir: Path) -> Path:
    """Print the artifact tree and the scores of a cascade, and write the report of a run."""
    from nemocascade.cascade.lineage import report_text
    from nemocascade.cascade.records import CASCADE
    from nemocascade.cascade.report import write_report

    if (run_dir / CASCADE).exists() or not (run_dir / "recipe.json").exists():
        print(printable(report_text(run_dir)))
    page = write_report(run_dir)
    print(f"report: {page}")
    return page


def run_comparison(run_dir: Path, other: Path) -> Path:
    """Write the page of two runs side by side."""
    from nemocascade.cascade.report import write_comparison

    page = write_comparison(run_dir, other)
    print(f"report: {page}")
    return page


def _named_stages(cascade: CascadeRecipe, arguments: Sequence[str]) -> set[str]:
    """The stages whose settings the arguments name; all of them for help, or if one is unknown.
    Parsing the settings of ten stages takes a second."""
    stages = {s.name.replace("_", "-"): s.name for s in cascade.stages}
    named = [a[len(STAGE_OPTION) :].partition(".")[0].replace("_", "-") for a in arguments
             if a.startswith(STAGE_OPTION)]  # fmt: skip
    helps = any(a in ("-h", "--help", "--help-all") for a in arguments)
    if helps or not stages.keys() >= set(named):
        return set(stages.values())
    return {stages[name] for name in named}


def _values(recipe: CascadeRecipe) -> dict[str, Any]:
    return {f.name: getattr(recipe, f.name) for f in fields(CascadeRecipe)}
