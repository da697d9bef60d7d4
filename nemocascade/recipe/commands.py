"""Settings of commands that are not stages."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from nemocascade.recipe.data import DataConfig
from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.rules import Count, Natural, Positive, Range, Seed


@dataclass(frozen=True)
class TokenizerSettings:
    """Train a sentencepiece tokenizer on the rendered conversations of `data.path`."""

    data: DataConfig = field(default_factory=DataConfig)
    vocab_size: Count = 2048
    """Number of ids, including the template's tags and one id for each byte."""

    output: str = "tokenizer.model"
    """File to write; must end in .model."""

    seed: Seed = 1
    """Seed of synthetic rows."""


@dataclass(frozen=True)
class ConvertSettings:
    """Convert a Hugging Face folder (NemotronHForCausalLM, Qwen3ForCausalLM, Qwen3MoeForCausalLM)
    to an artifact, an artifact of any layout to such a folder, or an adapter to PEFT's format. The
    direction follows from SOURCE."""

    source: tyro.conf.Positional[str]
    """Hugging Face folder, artifact or adapter."""

    target: tyro.conf.Positional[str]
    """Folder to write."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of the written weights; auto rounds nothing."""

    family: Literal["auto", "NemotronHForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"] = (
        "auto"
    )
    """Model family of a written Hugging Face folder; auto = the family that the model came from or
    fits."""

    shard_gib: Positive = 5.0
    """Largest weights file of a written Hugging Face folder."""

    base_model: str = ""
    """Name or folder of the Hugging Face model that a written PEFT adapter belongs to; empty names
    none."""


@dataclass(frozen=True)
class MergeSettings:
    """Merge an adapter into the artifact that it was trained on: W + alpha/rank B A. The result is
    a full artifact, for stages, scores and `nemocascade convert`."""

    adapter: tyro.conf.Positional[str]
    """Folder of the adapter, such as RUN/adapter."""

    target: tyro.conf.Positional[str]
    """Artifact folder to write."""

    base: str = ""
    """Folder of the artifact that it was trained on; empty = the folder that the adapter names."""


@dataclass(frozen=True)
class DiffSettings:
    """Print the settings that differ between two recipe scripts, run folders or artifacts, one a
    line. The exit code is 1 if anything differs."""

    first: tyro.conf.Positional[str]
    """Recipe script, run folder of a stage or a cascade, recipe.json, or artifact folder."""

    second: tyro.conf.Positional[str]
    """The other one."""


@dataclass(frozen=True)
class ReplaySettings:
    """Verify logged episodes again and compare the rewards."""

    path: str = ""
    """A file in RUN/rollouts, or that folder."""

    envs: EnvConfig = field(default_factory=EnvConfig)
    """Settings of the verifiers; taken from the recipe.json beside `rollouts`, if there is one."""


@dataclass(frozen=True)
class ImportSettings:
    """Make tasks from rows in SWE-Gym's form: instance_id, repo, base_commit, problem_statement,
    patch, test_patch, FAIL_TO_PASS, PASS_TO_PASS; or in R2E-Gym's: repo_name, commit_hash,
    parsed_commit_content, execution_result_content, expected_output_json, problem_statement.
    Nothing is downloaded, and no image is needed."""

    rows: tyro.conf.Positional[str]
    """File or folder of rows: JSON Lines, a JSON array or Parquet."""

    target: tyro.conf.Positional[str]
    """Folder to write. Tasks that it already has are not changed."""

    repositories: str
    """Folder with git clones, bare or not: owner__name or owner/name. Rows of R2E-Gym give the name
    only, and take the clone of any owner."""


@dataclass(frozen=True)
class CheckSettings:
    """Run the tests of repair tasks twice: on the repository as it is, where FAIL_TO_PASS must fail
    and PASS_TO_PASS must pass, and with the row's patch, where all must pass."""

    path: tyro.conf.Positional[str]
    """Folder of tasks or JSONL file, as read by the domains swe_agentic and swe_agentless."""

    envs: EnvConfig = field(default_factory=EnvConfig)
    """Environment settings of the run; each sandbox worker checks one task at a time."""


@dataclass(frozen=True)
class InterferenceSettings:
    """Train every RL stage of a cascade alone from one artifact, as a side branch, and score it on
    every domain: what does a stage do to the others? Other arguments override the recipe's
    settings."""

    recipe: tyro.conf.Positional[str]
    """Script of the cascade."""

    stages: tuple[str, ...] = ()
    """RL stages to measure; empty = those of the main line."""

    steps: Natural = 0
    """Steps of each branch; 0 = those of its recipe."""

    pairs: bool = False
    """Also train every pair of stages in both orders, which shows what a later stage wins back."""

    samples: Natural = 0
    """Samples of each held-out task; 0 = `scores.samples` of the recipe."""

    seeds: Count = 1
    """Training seeds of each branch, from that of its recipe on. With two or more the errors cover
    the training seed too."""

    start: str = ""
    """Stage whose artifact all branches start from; empty = the one before the first RL stage."""

    json: bool = False
    """Print the matrix as JSON."""


@dataclass(frozen=True)
class OrderSettings:
    """Propose an order of the RL stages from a measured interference matrix, and say how sure it
    is."""

    run: tyro.conf.Positional[str]
    """Run folder of a cascade with an interference matrix."""

    weights: dict[str, float] = field(default_factory=dict)
    """Weight of each domain in the value of an order; empty = equal. Unnamed domains count 0."""

    draws: Annotated[int, Range(100)] = 1000
    """Bootstrap draws."""

    json: bool = False
    """Print the advice as JSON."""


@dataclass(frozen=True)
class WatchSettings:
    """Show the progress of a run, and rebuild RUN/report/index.html whenever it has advanced; the
    page reloads itself in the browser. Ends with the run."""

    run: tyro.conf.Positional[str]
    """Run folder of a cascade or of a stage."""

    every_s: Annotated[float, Range(0.1, 3600)] = 10.0
    """Poll interval of the folder in seconds."""
