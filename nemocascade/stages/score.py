"""`nemocascade score`: held-out scores of an artifact, on domains and public benchmarks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    rows = _pairs("rows", settings.rows, "DOMAIN=PATH, such as math=rows.jsonl")
    form = f"NAME=PATH with NAME one of {', '.join(BENCHMARKS)}"
    benchmarks = _pairs("benchmarks", settings.benchmarks, form, BENCHMARKS)
    limit = settings.limit or MOST_SAMPLES
    files = (*_rows(rows, limit), *(_benchmark(*pair, limit) for pair in benchmarks))
    scores = settings.scores
    names = settings.domains or (() if files else DOMAINS)
    named = tuple(ScoredDomain(d, difficulty=settings.difficulty) for d in names)
    return replace(
        scores,
        domains=(*(scores.domains or named), *files),
        samples=settings.samples or scores.samples,
    )


def _pairs(
    setting: str, given: Sequence[str], form: str, known: Collection[str] | None = None
) -> list[tuple[str, str]]:
    """Name and path of every `NAME=PATH`. Raises RecipeError naming each that lacks one of them, or
    whose name is not `known`."""
    found, wrong = [], []
    for text in given:
        name, _, path = text.partition("=")
        if name and path and (known is None or name in known):
            found.append((name, path))
        else:
            wrong.append(f"{setting}({text}) must be {form}")
    if wrong:
        raise RecipeError(wrong)
    return found


def _rows(pairs: Sequence[tuple[str, str]], limit: int) -> list[ScoredDomain]:
    """The tasks of each domain's files. Raises DataError for a missing file."""
    paths: dict[str, tuple[str, ...]] = {}
    for domain, path in pairs:
        find_files(path)
        paths[domain] = (*paths.get(domain, ()), path)
    return [
        ScoredDomain(domain, heldout_path=found, tasks=limit) for domain, found in paths.items()
    ]


def _benchmark(name: str, path: str, limit: int) -> ScoredDomain:
    """The tasks of a benchmark. Raises DataError for rows of another form."""
    check_rows(name, path)
    return ScoredDomain(BENCHMARKS[name].domain, heldout_path=(path,), tasks=limit, name=name)
