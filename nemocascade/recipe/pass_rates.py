"""Settings of the pass rates of rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import tyro

from nemocascade.recipe.changes import FREE, flat
from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.errors import RecipeError
from nemocascade.recipe.loading import load_any_recipe
from nemocascade.recipe.parallel import ParallelConfig
from nemocascade.recipe.paths import ArtifactPath, InputPath, OutputPath, Url
from nemocascade.recipe.rl import PolicyRecipe, RolloutConfig
from nemocascade.recipe.rules import Count, Seconds, Seed, number_problems
from nemocascade.recipe.train import EngineConfig

_TRAINING = ("rollout.prompts_per_step", "rollout.rollouts_per_prompt")
"""Settings of a stage that do not affect a single reward, besides those of `changes.FREE`."""


@dataclass(frozen=True)
class PassRateSettings:
    """Sample answers to each row of a file, and write the rows with their `pass_rate`.

    It is sampled as in a stage: `--recipe` gives the defaults of all settings that a stage has.
    The same command resumes after an interruption and repeats no finished sample.
    """

    rows: tyro.conf.Positional[InputPath] = ""
    """Data file with the rows of tasks, of any kind that a stage reads."""

    output: OutputPath = ""
    """File to write, .jsonl: the rows with `pass_rate` and `pass_rate_samples`. OUTPUT.progress
    holds the verdicts so far, and the log."""

    artifact: ArtifactPath = ""
    """Artifact folder of the policy."""

    server: Url = ""
    """Instead of an artifact: the OpenAI-compatible server of the policy, `http://host:port`."""

    model: str = ""
    """Name of the model on the server."""

    tokenizer: InputPath = ""
    """Tokenizer of the model on the server: a file, or a folder with one."""

    text: bool = False
    """The server exchanges text only; by default prompts and answers are token ids."""

    api_key_env: str = ""
    """Environment variable that holds the server's key; empty = send none."""

    timeout_s: Seconds = 7200.0
    """Timeout of a request to the server, with its retries, in seconds."""

    recipe: InputPath = ""
    """Script of the RL stage whose domains, rollouts, verifiers, layout and seed are the defaults
    of the settings below."""

    domains: tuple[str, ...] = ()
    """Domains that the rows may belong to; empty = all."""

    samples: Count = 8
    """Number of answers to each row."""

    solved_at: float = 1.0
    """Smallest reward of an answer that counts as solved."""

    seed: Seed = 1
    """Seed of all sampling."""

    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    """Sampling and limits. Answers to `prompts_per_step` rows are generated at once."""

    envs: EnvConfig = field(default_factory=EnvConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout of an artifact's policy."""

    engine: EngineConfig = field(default_factory=EngineConfig)

    def problems(self) -> list[str]:
        """Every rule that these settings break, each with a remedy."""
        found = number_problems(self) + self.rollout.problems() + self.envs.problems()
        if not self.rows or not Path(self.rows).is_file():
            found.append(f"rows({self.rows!r}) is not a file: name a file with rows of tasks")
        if not self.output.endswith(".jsonl"):
            found.append(f"output({self.output!r}) must name a file that ends in .jsonl")
        elif Path(self.output).exists():
            found.append(f"output({self.output}) exists: name another file, or delete it")
        if bool(self.artifact) == bool(self.server):
            found.append("one policy must answer: set either --artifact or --server")
        if self.server and not (self.model and self.tokenizer):
            found.append("server: name its --model, and the --tokenizer of that model")
        if self.server and self.envs.judge.kind == "artifact":
            found.append("envs.judge.kind(artifact) runs beside an --artifact: set it to server")
        return list(dict.fromkeys(found))

    def key(self, policy: str, tokenizer: str, rows: str) -> dict[str, Any]:
        """Whatever affects the rewards, as JSON values by dotted name.

        policy: digest of the artifact, or name of the model. tokenizer, rows: sha256 of the files.
        """
        free = tuple(f"{name}." for name in (*FREE, *_TRAINING))
        stage = {"rollout": asdict(self.rollout), "envs": asdict(self.envs)}
        return {
            "rows": rows,
            "policy": policy,
            "tokenizer": tokenizer,
            "samples": self.samples,
            "seed": self.seed,
            "domains": list(self.domains),
            "engine.precision": self.engine.precision,
            **{name: v for name, v in flat(stage) if not f"{name}.".startswith(free)},
        }


def settings_of_stage(script: str) -> PassRateSettings:
    """Settings with the defaults of a stage's recipe script; those of the fields without one.

    Raises RecipeError for the script of another kind.
    """
    if not script:
        return PassRateSettings()
    stage = load_any_recipe(Path(script))
    if not isinstance(stage, PolicyRecipe):
        raise RecipeError([f"recipe({script}) is of no RL stage: name another script"])
    return PassRateSettings(
        recipe=script,
        domains=tuple(d.domain for d in stage.domains),
        seed=stage.seed,
        rollout=stage.rollout,
        envs=stage.envs,
        parallel=stage.parallel,
        engine=stage.engine,
    )
