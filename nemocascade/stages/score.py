"""`nemocascade score`: held-out scores of an artifact, on domains and public benchmarks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nemocascade.envs.benchmark_rows import BENCHMARKS, check_rows
from nemocascade.envs.registry import DOMAINS
from nemocascade.recipe import RecipeError, ScoreConfig, ScoredDomain
from nemocascade.stages.scoring import MOST_SAMPLES, Scores, score_artifact
from nemocascade.stages.settings import ScoreSettings


def run_scoring(settings: ScoreSettings) -> Scores:
    """Score the artifact of the settings. Raises as `config_of` and `score_artifact`."""
    return score_artifact(Path(settings.artifact), config_of(settings), Path(settings.work_dir))


def config_of(settings: ScoreSettings) -> ScoreConfig:
    """The tasks that are scored, and how they are answered.

    Raises RecipeError for a benchmark that is unknown, and DataError for rows of another form.
    """
    benchmarks = tuple(_benchmark(given, settings.limit) for given in settings.benchmarks)
    scores = settings.scores
    names = settings.domains or (() if benchmarks else DOMAINS)
    named = tuple(ScoredDomain(d, difficulty=settings.difficulty) for d in names)
    return replace(
        scores,
        domains=(*(scores.domains or named), *benchmarks),
        samples=settings.samples or scores.samples,
    )


def _benchmark(given: str, limit: int) -> ScoredDomain:
    """The tasks of `NAME=PATH`. Raises RecipeError for a name that is unknown, and DataError for
    rows of another form."""
    name, _, path = given.partition("=")
    if name not in BENCHMARKS or not path:
        raise RecipeError(
            [f"benchmarks({given}) must be NAME=PATH with NAME one of {', '.join(BENCHMARKS)}"]
        )
    check_rows(name, path)
    return ScoredDomain(
        BENCHMARKS[name].domain, heldout_path=(path,), tasks=limit or MOST_SAMPLES, name=name
    )
