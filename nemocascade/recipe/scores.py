"""Settings of the held-out scores that every artifact of a cascade gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.parallel import ParallelConfig
from nemocascade.recipe.paths import InputPaths
from nemocascade.recipe.rules import Count, Natural, Seed, Tokens, number_problems
from nemocascade.recipe.train import EngineConfig


@dataclass(frozen=True)
class ScoredDomain:
    """One domain's held-out tasks."""

    domain: str = "math"
    """Name of the environment that scores the domain's answers."""

    difficulty: Natural = 0
    """Difficulty of generated tasks; 0 is the easiest."""

    heldout_path: InputPaths = ()
    """JSONL files of held-out tasks. Empty: generated, and disjoint from the training tasks."""

    tasks: Natural = 0
    """Number of held-out tasks; 0 = `scores.tasks`."""

    max_response_tokens: Natural = 0
    """Largest number of tokens in a response; 0 = `scores.max_response_tokens`."""


@dataclass(frozen=True)
class ScoreConfig:
    """Mean reward of greedy answers to held-out tasks, by domain."""

    domains: tuple[ScoredDomain, ...] = ()

    tasks: Count = 256
    """Number of held-out tasks in each domain."""

    seed: Seed = 1
    """Seed of generated tasks."""

    max_prompt_tokens: Tokens = 32_768
    """Largest number of prompt tokens; longer prompts are dropped and counted."""

    max_response_tokens: Tokens = 49_152
    """Largest number of tokens in a response; a truncated response is scored as it is."""

    max_turns: Count = 8
    """Largest number of policy turns in one episode with tools."""

    thinking: bool = True
    """Open a reasoning block at the end of the prompt."""

    slots: Count = 64
    """Concurrent sequences on a data-parallel rank."""

    samples: Natural = 2
    """Responses of each domain that are stored as readable text."""

    envs: EnvConfig = field(default_factory=EnvConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The same layout for every stage's artifact, so that only the weights affect the scores."""

    engine: EngineConfig = field(default_factory=EngineConfig)

    def problems(self, world_size: int, model: ModelConfig | None = None) -> list[str]:
        """Every rule that these settings break, each with a remedy. model: the artifacts' shape."""
        found = number_problems(self, "scores")
        names = [d.domain for d in self.domains]
        found += [f"scores.domains names {n} twice" for n in repeated(names)]
        found += [f"scores.{p}" for p in self.envs.problems()]
        if model is not None and not found:
            p = self.parallel
            dp = max(1, p.data_parallel(world_size))
            # Generation packs nothing, so any valid capacity will do.
            broken = p.problems(model, world_size, capacity=p.tp, sequences_per_step=dp * p.pp)
            found += [f"scores: {problem}" for problem in broken]
        return list(dict.fromkeys(found))


def repeated(names: Sequence[str]) -> list[str]:
    """Names that occur more than once."""
    return sorted({n for n in names if names.count(n) > 1})
