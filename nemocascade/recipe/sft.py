"""The SFT recipe: settings of a supervised fine-tuning stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemocascade.recipe.data import DataConfig, TokenizerConfig
from nemocascade.recipe.domains import DomainConfig
from nemocascade.recipe.envs import PythonToolConfig
from nemocascade.recipe.lora import LoraConfig
from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.parallel import ParallelConfig
from nemocascade.recipe.paths import ArtifactPath, OutputPath, path_problems
from nemocascade.recipe.rules import Count, Fraction, Natural, Seed, number_problems
from nemocascade.recipe.train import (
    CheckpointConfig,
    EngineConfig,
    EvalConfig,
    LogConfig,
    MoeTrainingConfig,
    OptimizerConfig,
)


@dataclass(frozen=True)
class DemonstrationConfig:
    """Training rows made of the environments' tasks and their known solutions: the prompts that RL
    will use."""

    domains: tuple[DomainConfig, ...] = ()
    """Domains, with `tasks` rows of each: generated, or read from `path`, whose rows hold solutions
    as those of GSM8K and MATH do. Empty: no row is made, only `data.path` is used."""

    heldout: Natural = 32
    """Number of held-out rows in each domain; for one with a `path`, from its `heldout_path`."""

    thinking: Fraction = 0.5
    """Fraction of the rows with reasoning before the answer."""

    careless: Fraction = 0.0
    """Fraction of the rows whose solution has a habit that may cost the reward, in domains that
    define one: a code fence around JSON, a letter without its box. This leaves RL something to
    improve: samples are sometimes right where greedy answers are not. Held-out rows have the same
    fraction."""

    modules: tuple[str, ...] = ()
    """Modules with domains of your own, as in `envs.modules` of RL."""

    python_tool: PythonToolConfig = field(default_factory=PythonToolConfig)
    """The Python tool of the rows, as in `envs.python_tool` of RL. Rows of `math` from difficulty 4
    on call it."""


@dataclass(frozen=True)
class SftRecipe:
    """Supervised fine-tuning on packed sequences (Nemotron-Cascade 2, arXiv 2603.19220)."""

    steps: Count = 33_000
    """Optimizer steps."""

    seed: Seed = 1
    """Seed of the initial weights and of the data order."""

    run_dir: OutputPath = "runs/sft"
    """Folder for everything the run writes."""

    resume: bool = True
    """Resume from the newest checkpoint in `run_dir`, if there is one. Off: a run folder with
    checkpoints is an error."""

    accept_changes: bool = False
    """Resume although settings changed that affect the training. The changes are listed in the log
    and in the artifact's manifest."""

    init_from: ArtifactPath = ""
    """Artifact folder with the initial weights and, unless `tokenizer.path` names one, the
    tokenizer; empty = random weights from the seed."""

    base_model: str = ""
    """Name of the published model that the stage trains. A recipe that names one must name its
    weights in `init_from`; empty = the stage may start from random weights."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    demonstrations: DemonstrationConfig = field(default_factory=DemonstrationConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    moe: MoeTrainingConfig = field(default_factory=MoeTrainingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def problems(self, world_size: int) -> list[str]:
        """Every rule that this recipe breaks with `world_size` ranks, each with a remedy."""
        found = number_problems(self) + path_problems(self)
        found += self.model.problems() + self.optimizer.problems() + self.engine.problems()
        found += self.log.problems()
        found += self.lora.problems(self.engine, self.model)
        if self.lora.rank and not self.init_from:
            found.append(
                f"lora.rank({self.lora.rank}) trains an adapter of an artifact, and init_from is "
                "empty: name the base with --init-from, or set --lora.rank 0"
            )
        if self.base_model and not self.init_from:
            found.append(
                f"init_from is empty, and random weights are not base_model({self.base_model}): "
                "convert its folder (nemocascade convert FOLDER ARTIFACT) and pass --init-from "
                "ARTIFACT; --base-model '' starts from random weights"
            )
        if self.engine.overlap_parameter_gather and not self.optimizer.distributed:
            found.append(
                "engine.overlap_parameter_gather(True) has no effect, for without "
                "optimizer.distributed every rank updates all weights: set --optimizer.distributed "
                "True or --engine.overlap-parameter-gather False"
            )
        found += self.demonstrations.python_tool.problems("demonstrations.python_tool")
        if not self.data.path and not self.demonstrations.domains:
            found.append("data.path is empty: name JSONL or Parquet files, or synthetic:arithmetic")
        found += [
            f"demonstrations.domains.{number}.curriculum({domain.curriculum}) orders the tasks of "
            "RL stages: SFT rows are shuffled, so set it to none"
            for number, domain in enumerate(self.demonstrations.domains)
            if domain.curriculum != "none"
        ]
        if not found:
            found += self.parallel.problems(
                self.model,
                world_size,
                capacity=self.data.capacity,
                sequences_per_step=self.data.sequences_per_step,
            )
            found += self.engine.layout_problems(self.parallel, self.model)
        return list(dict.fromkeys(found))
