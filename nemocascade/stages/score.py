"""`nemocascade score`: held-out scores of an artifact, on domains and public benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemocascade.envs.benchmark_rows import BENCHMARKS, check_rows
from nemocascade.envs.registry import DOMAINS
from nemocascade.recipe import RecipeError, ScoreConfig, ScoredDomain
from nemocascade.runtime.row_files import find_files
from nemocascade.stages.scoring import MOST_SAMPLES, Scores, score_artifact
from nemocascade.stages.settings import ScoreSettings


def run_scoring(settings: ScoreSettings) -> Scores:
    """Score the artifact of the settings. Raises as `config_of` and `score_artifact`."""
    return score_artifact(Path(settings.artifact), config_of(settings), Path(settings.work_dir))


def config_of(settings: ScoreSettings) -> ScoreConfig:
    """The tasks that are scored, and how they are answered.

    Raises RecipeError for a benchmark that is unknown, and DataError for rows of another form.
    """
    files = (
        *_rows(settings.rows, settings.limit),
        *(_benchmark(given, settings.limit) for given in settings.benchmarks),
    )
    scores = settings.scores
    names = settings.domains or (() if files else DOMAINS)
    named = tuple(ScoredDomain(d, difficulty=settings.difficulty) for d in names)
    return replace(
        scores,
        domains=(*(scores.domains or named), *files),
        samples=settings.samples or scores.samples,
    )


def _rows(given: Sequence[str], limit: int) -> list[ScoredDomain]:
    """The tasks of every `DOMAIN=PATH`. Raises RecipeError naming each that lacks one of them, and
    DataError for a missing file."""
    pairs = [text.partition("=")[::2] for text in given]
    if wrong := [text for text, pair in zip(given, pairs, strict=True) if not all(pair)]:
        raise RecipeError(
            [f"rows({text}) must be DOMAIN=PATH, such as math=rows.jsonl" for text in wrong]
        )
    paths: dict[str, tuple[str, ...]] = {}
    for domain, path in pairs:
        find_files(path)
        paths[domain] = (*paths.get(domain, ()), path)
    return [
        ScoredDomain(domain, heldout_path=found, tasks=limit or MOST_SAMPLES)
        for domain, found in paths.items()
    ]


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
