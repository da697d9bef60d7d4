"""Command line of a cascade script: overrides by stage, errors, exit codes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from nemocascade.cascade.lineage import report_text
from nemocascade.cascade.report import write_report
from nemocascade.cascade.run import Choice, dry_run, run_cascade
from nemocascade.recipe import CascadeRecipe, StageConfig, StageRecipe
from nemocascade.runtime.errors import exit_cleanly
from nemocascade.runtime.logging import printable
from nemocascade.runtime.world import is_main_process


@dataclass(frozen=True)
class _Shared(CascadeRecipe):
    """Settings of a cascade that belong to no stage."""

    # The settings of each stage are shown under its name.
    stages: tyro.conf.Suppress[tuple[StageConfig[StageRecipe], ...]] = ()


def parse_cascade(
    cascade: CascadeRecipe, arguments: Sequence[str] | None = None
) -> tuple[CascadeRecipe, Choice, bool]:
    """Parse overrides; returns the new cascade, the choice of stages, and True for a dry run.

    Settings of a stage carry its name: `--stages.if-rl.steps 20`. Unknown names end the program
    with a hint.
    """
    by_stage = make_dataclass(
        "Stages", [(s.name, type(s.recipe), field(default=s.recipe)) for s in cascade.stages]
    )

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

    shared = _Shared(**{**_values(cascade), "stages": ()})
    found: Any = tyro.cli(
        Command,
        default=Command(shared, by_stage()),
        args=arguments,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    stages = tuple(replace(s, recipe=getattr(found.stages, s.name)) for s in cascade.stages)
    resolved = CascadeRecipe(**{**_values(found.shared), "stages": stages})
    return resolved, Choice(found.begin, found.only, found.again), found.dry_run


def launch(cascade: CascadeRecipe, arguments: Sequence[str] | None = None) -> Path:
    """Run `cascade` with the command line's overrides; returns the last artifact's folder.

    Invalid settings end the program with a message and exit code 2, an alarm that stops the run
    with exit code 5.
    """
    resolved, choice, dry = parse_cascade(cascade, arguments)
    resolved = replace(resolved, run_dir=str(Path.cwd() / resolved.run_dir))

    def work() -> Path:
        if dry:
            if is_main_process():
                print(dry_run(resolved, choice))
            return Path(resolved.run_dir)
        artifact = run_cascade(resolved, choice)
        if is_main_process():
            run_report(Path(resolved.run_dir))
        return artifact

    return exit_cleanly(work)


def run_report(run_dir: Path) -> Path:
    """Print the artifact tree and the scores of a run, and write its report."""
    print(printable(report_text(run_dir)))
    page = write_report(run_dir)
    print(f"report: {page}")
    return page


def _values(recipe: CascadeRecipe) -> dict[str, Any]:
    return {f.name: getattr(recipe, f.name) for f in fields(CascadeRecipe)}
