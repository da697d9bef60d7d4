"""Settings of `nemocascade data build`, which tokenises a data set before its stages run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from nemocascade.recipe.data import DataConfig, TokenizerConfig
from nemocascade.recipe.errors import RecipeError
from nemocascade.recipe.loading import load_recipe
from nemocascade.recipe.paths import ArtifactPath, InputPath, OutputPath, path_problems
from nemocascade.recipe.rules import Count, Natural, Seed
from nemocascade.recipe.sft import SftRecipe


@dataclass(frozen=True)
class BuildSlurmConfig:
    """Slurm array of a build: a task for each shard, and one that joins them."""

    partition: str = ""
    """Partition of the tasks; empty = processes on this machine, without Slurm."""

    time: str = "24:00:00"
    """Time limit of each job, as Slurm writes it."""

    tasks: Natural = 0
    """Most array tasks that run at a time; 0 = as many as Slurm allows."""

    memory_gib: Count = 2
    """Memory of a task, which has one core."""

    qos: str = ""
    account: str = ""
    environment: InputPath = ""
    """File of `export` lines that each job sources."""


@dataclass(frozen=True)
class BuildSettings:
    """Tokenise and index data for SFT once, in parallel; stages then take --data.path OUTPUT.

    The same command resumes an interrupted build by its shards, and shows the state of a Slurm
    array. With `recipe`, the settings of a recipe script are the defaults.
    """

    recipe: str = ""
    """SFT recipe script whose `data`, `tokenizer`, `init_from` and `seed` are the defaults."""

    output: OutputPath = ""
    """Folder to write."""

    data: DataConfig = field(default_factory=DataConfig)
    """Rows to tokenise: those of `data.path`. `data.heldout_path` is not read."""

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """Tokenizer of the stages; it must exist."""

    init_from: ArtifactPath = ""
    """Artifact that the stage starts from, whose tokenizer is used if `tokenizer.path` is empty."""

    seed: Seed = 1
    """Seed of synthetic rows."""

    workers: Natural = 0
    """Processes on this machine; 0 = one a core."""

    shard_mib: Count = 256
    """MiB of rows in a shard, which one process tokenises: JSON Lines and Parquet files are cut
    into shards, small files share one. Compressed files and JSON arrays are not cut."""

    verify: bool = False
    """Read all files of a finished OUTPUT and compare their hashes, instead of building."""

    slurm: BuildSlurmConfig = field(default_factory=BuildSlurmConfig)

    def problems(self) -> list[str]:
        """Every rule that these settings break, each with a remedy."""
        found = path_problems(self)
        if not self.output:
            found.append("output is empty: name the folder to write with --output")
        if self.verify:
            return found
        if not self.data.path:
            found.append("data.path is empty: name JSONL or Parquet files, or --recipe SCRIPT")
        if not (self.tokenizer.path or self.init_from):
            found.append(
                "tokenizer.path is empty: name the stage's tokenizer, or its start artifact with "
                "--init-from; `nemocascade tokenizer` trains one"
            )
        return found


def build_settings_of(script: str) -> BuildSettings:
    """Settings with the defaults of an SFT recipe script; those of the fields without one.

    Raises RecipeError for the script of another kind.
    """
    if not script:
        return BuildSettings()
    recipe = load_recipe(Path(script), SftRecipe)
    if recipe.demonstrations.domains:
        raise RecipeError(
            [
                f"{script} trains on rows that its stage makes, demonstrations.domains: they are "
                "few and are not built; build the rows of data.path with --data.path"
            ]
        )
    return BuildSettings(
        recipe=script,
        data=recipe.data,
        tokenizer=recipe.tokenizer,
        init_from=recipe.init_from,
        seed=recipe.seed,
    )
