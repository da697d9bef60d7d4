"""Settings of the commands `eval` and `score`. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemocascade.recipe import DataConfig, EngineConfig, ParallelConfig, ScoreConfig
from nemocascade.recipe.rules import Natural


@dataclass(frozen=True)
class EvalSettings:
    """Held-out loss of an artifact: mean negative log-likelihood of the assistant's tokens."""

    artifact: str = ""
    """Artifact folder."""

    data: DataConfig = field(
        default_factory=lambda: DataConfig(capacity=8192, sequences_per_step=8, heldout_rows=0)
    )
    """Documents to score: every row of `data.path`."""

    work_dir: str = "runs/eval"
    """Folder for the tokenised data and the log."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class ScoreSettings:
    """Mean reward of an artifact's answers to held-out tasks, by domain. Default: a greedy answer.
    `--samples K`: avg@k with its standard error, and pass@k."""

    artifact: str = ""
    """Artifact folder."""

    domains: tuple[str, ...] = ()
    """Names of the domains; empty = those of `rows` and the benchmarks, or all without any."""

    rows: tuple[str, ...] = ()
    """Rows of held-out tasks, each as DOMAIN=PATH; a domain of `scores.envs.modules` too."""

    benchmarks: tuple[str, ...] = ()
    """Public benchmarks, each as NAME=PATH of its published rows: gsm8k, math, mmlu_pro, humaneval,
    ifeval, ifbench."""

    limit: Natural = 0
    """Number of the first rows of each benchmark, and of `rows` by domain, that are read;
    0 = all."""

    difficulty: Natural = 0
    """Difficulty of generated tasks; 0 is the easiest."""

    samples: Natural = 0
    """Samples of each task; 0 = `scores.samples`."""

    work_dir: str = "runs/score"
    """Folder for the log."""

    scores: ScoreConfig = field(default_factory=ScoreConfig)
