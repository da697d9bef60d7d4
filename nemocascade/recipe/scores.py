"""Settings of the held-out scores that every artifact of a cascade gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.parallel import ParallelConfig
from nemocascade.recipe.train import EngineConfig


@dataclass(frozen=True)
class ScoredDomain:
    """One domain's held-out tasks."""

    domain: str = "math"
    """Name of the environment that scores them."""

    difficulty: int = 0
    """Of tasks that are made; 0 is the easiest."""

    heldout_path: tuple[str, ...] = ()
    """JSONL files of held-out tasks. Empty: made, and disjoint from those for training."""

    tasks: int = 0
    """Held-out tasks; 0 = `scores.tasks`."""

    max_response_tokens: int = 0
    """0 = `scores.max_response_tokens`."""


@dataclass(frozen=True)
class ScoreConfig:
    """Mean reward of greedy answers to held-out tasks, by domain."""

    domains: tuple[ScoredDomain, ...] = ()

    tasks: int = 256
    """Held-out tasks of each domain."""

    seed: int = 1
    """Of the tasks that are made."""

    max_prompt_tokens: int = 32_768
    """Longer prompts are dropped and counted."""

    max_response_tokens: int = 49_152
    """An answer that is not finished by then is scored as it stands."""

    max_turns: int = 8
    """Turns of the model in one episode with tools."""

    thinking: bool = True
    """The prompt opens a reasoning block."""

    slots: int = 64
    """Texts under way at a time on a data-parallel rank."""

    samples: int = 2
    """Answers of each domain that are kept as readable text."""

    envs: EnvConfig = field(default_factory=EnvConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """One layout for every stage's artifact, so that scores differ by their weights alone."""

    engine: EngineConfig = field(default_factory=EngineConfig)

    def problems(self, world_size: int, model: ModelConfig | None = None) -> list[str]:
        """Every rule these settings break, each with a remedy. model: of the artifacts."""
        found = [
            f"scores.{name}({getattr(self, name)}) must be at least 1"
            for name in ("tasks", "max_prompt_tokens", "max_response_tokens", "max_turns", "slots")
            if getattr(self, name) < 1
        ]
        names = [d.domain for d in self.domains]
        found += [f"scores.domains names {n} twice" for n in repeated(names)]
        found += [
            f"scores.domains: {name}({getattr(d, name)}) of {d.domain} must not be negative"
            for d in self.domains
            for name in ("tasks", "max_response_tokens")
            if getattr(d, name) < 0
        ]
        found += [f"scores.{p}" for p in self.envs.problems()]
        if model is not None and not found:
            p = self.parallel
            dp = max(1, p.data_parallel(world_size))
            # Generation packs nothing, so any capacity will do.
            broken = p.problems(model, world_size, capacity=p.tp, sequences_per_step=dp * p.pp)
            found += [f"scores: {problem}" for problem in broken]
        return found


def repeated(names: Sequence[str]) -> list[str]:
    """Names that stand more than once."""
    return sorted({n for n in names if names.count(n) > 1})
