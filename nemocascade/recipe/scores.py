"""Settings of the held-out scores that every artifact of a cascade gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, NamedTuple

from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.parallel import ParallelConfig
from nemocascade.recipe.paths import RowPaths, path_problems
from nemocascade.recipe.rules import (
    Count,
    Natural,
    NonNegative,
    Range,
    Seed,
    Tokens,
    number_problems,
)
from nemocascade.recipe.train import EngineConfig

EVALUATION = {
    "math": (1.0, 1.0),
    "instruction_following": (0.6, 0.95),
    "preference": (0.6, 0.95),
}
"""Temperature and top-p of the evaluation of Nemotron-Cascade 2 (arXiv 2603.19220, appendix A)."""
OTHERS = (1.0, 0.95)
"""The same for code and STEM, and for domains whose settings the paper does not state."""


class AnswerSampling(NamedTuple):
    """Settings for answering the held-out tasks of a domain. samples: of each task. Temperature 0
    is greedy."""

    max_tokens: int
    samples: int
    temperature: float
    top_p: float
    thinking: bool


@dataclass(frozen=True)
class ScoredDomain:
    """One domain's held-out tasks."""

    domain: str = "math"
    """Name of the environment that scores the domain's answers."""

    difficulty: Natural = 0
    """Difficulty of generated tasks; 0 is the easiest."""

    heldout_path: RowPaths = ()
    """JSONL files of held-out tasks. Empty: generated, and disjoint from the training tasks."""

    heldout_hub: tuple[str, ...] = ()
    """Data sets of held-out tasks beside `heldout_path`: `name:split`, as in `data.hub` of SFT."""

    max_bad_rows: Natural = 0
    """Number of rows of `heldout_path` that are skipped because they cannot be read; one more is an
    error."""

    tasks: Natural = 0
    """Number of held-out tasks; 0 = `scores.tasks`."""

    max_response_tokens: Natural = 0
    """Largest number of tokens in a response; 0 = `scores.max_response_tokens`."""

    thinking: bool = True
    """Open a reasoning block at the end of the prompt, if `scores.thinking` does."""

    samples: Natural = 0
    """Samples of each task; 0 = `scores.samples`."""

    temperature: Annotated[float | None, Range(0)] = None
    """Sampling temperature; None = `scores.temperature`."""

    top_p: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Top-p of sampling; None = `scores.top_p`."""

    name: str = ""
    """Name of the score, for several sets of tasks of one domain, such as benchmarks; empty = the
    domain's."""

    @property
    def label(self) -> str:
        """The name of the score."""
        return self.name or self.domain


@dataclass(frozen=True)
class ScoreConfig:
    """Mean reward of the answers to held-out tasks, by domain."""

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

    kv_gib: NonNegative = 0.0
    """GiB of the KV cache and the Mamba states on a rank; 0 = on a GPU most of the free memory, on
    a CPU 4 GiB."""

    samples: Count = 1
    """Samples of each task, k. 1 without a temperature is one greedy answer. Scores are avg@k with
    its standard error, and pass@k. The paper reports avg@64 for AIME and HMMT, avg@8 for code,
    GPQA and IFBench."""

    temperature: Annotated[float | None, Range(0)] = None
    """Sampling temperature; 0 is greedy. None: greedy for one sample, and for more the paper's
    evaluation: 0.6 for instruction following and preference, 1 for other domains."""

    top_p: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Top-p of sampling. None: the paper's evaluation: 1 for math, 0.95 for other domains."""

    stored_answers: Natural = 2
    """Tasks of each domain whose first answer is stored as readable text."""

    envs: EnvConfig = field(default_factory=EnvConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """The same layout for every stage's artifact, so that only the weights affect the scores."""

    engine: EngineConfig = field(default_factory=EngineConfig)

    @property
    def layout(self) -> ParallelConfig:
        """`parallel` without context parallelism: those ranks answer tasks of their own."""
        return replace(self.parallel, cp=1)

    def sampling_of(self, domain: ScoredDomain) -> AnswerSampling:
        """How the tasks of a domain are answered, with every default filled in."""
        samples = domain.samples or self.samples
        temperature, top_p = EVALUATION.get(domain.domain, OTHERS)
        greedy = None if samples > 1 else 0.0
        temperature = _first(domain.temperature, self.temperature, greedy, temperature)
        return AnswerSampling(
            domain.max_response_tokens or self.max_response_tokens,
            samples,
            temperature,
            # Greedy answers do not depend on it, and are drawn together.
            _first(domain.top_p, self.top_p, top_p) if temperature else 1.0,
            self.thinking and domain.thinking,
        )

    def problems(self, world_size: int, model: ModelConfig | None = None) -> list[str]:
        """Every rule that these settings break, each with a remedy. model: the artifacts' shape."""
        found = number_problems(self, "scores") + path_problems(self, "scores.")
        names = [d.label for d in self.domains]
        found += [f"scores.domains names {n} twice: give one another name" for n in repeated(names)]
        for domain in self.domains:
            how = self.sampling_of(domain)
            if how.samples > 1 and how.temperature == 0:
                found.append(
                    f"scores.samples({how.samples}) of {domain.label} are all equal at "
                    "temperature 0: set scores.temperature above 0, or one sample"
                )
        found += [f"scores.{p}" for p in self.envs.problems()]
        if model is not None and not found:
            p = self.layout
            dp = max(1, p.data_parallel(world_size))
            broken = p.problems(model, world_size, capacity=None, sequences_per_step=dp * p.pp)
            found += [f"scores: {problem}" for problem in broken]
        return list(dict.fromkeys(found))


def _first(*values: float | None) -> float:
    """The first value that is set."""
    return next(v for v in values if v is not None)


def repeated(names: Sequence[str]) -> list[str]:
    """Names that occur more than once."""
    return sorted({n for n in names if names.count(n) > 1})
