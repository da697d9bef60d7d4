"""Settings of `nemocascade chat`, `generate` and `serve`. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from nemocascade.recipe import EngineConfig, EnvConfig, ParallelConfig
from nemocascade.recipe.paths import InputPath, OutputPath
from nemocascade.recipe.rules import Count, Natural, NonNegative, Port, Probability, Seed


@dataclass(frozen=True)
class ModelSettings:
    """The model that answers, and its defaults of sampling."""

    model: tyro.conf.Positional[str]
    """Artifact, or Hugging Face folder, which is imported into `work_dir` once."""

    max_tokens: Count = 2048
    """Largest number of tokens of an answer."""

    temperature: NonNegative = 1.0
    """Sampling temperature; 0 is greedy."""

    top_p: Probability = 0.95
    """Keep the fewest tokens whose probabilities sum to this."""

    top_k: Natural = 0
    """Keep only so many tokens; 0 keeps all."""

    thinking: bool = True
    """Open a reasoning block at the end of the prompt."""

    seed: Seed = 1
    """Seed of the draws."""

    context: Natural = 0
    """Largest number of tokens of a prompt with its answer; 0 = that of the model's training, at
    most 32,768."""

    slots: Count = 16
    """Concurrent answers."""

    kv_gib: NonNegative = 0.0
    """GiB of the KV cache and the Mamba states; 0 = on a GPU most of the free memory, on a CPU
    4 GiB."""

    work_dir: str = "runs/serving"
    """Folder for the log, and for an imported model."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)


@dataclass(frozen=True)
class ChatSettings(ModelSettings):
    """Talk with a model in the terminal. Answers are streamed; /help lists commands."""

    system: str = ""
    """System prompt; empty = none."""

    show_thinking: bool = True
    """Show the reasoning, dimmed."""

    domain: str = ""
    """Domain whose tools the model may call, such as tool_calling; /task asks its held-out
    tasks."""

    max_turns: Count = 16
    """Largest number of turns of an answer with calls of tools."""

    envs: EnvConfig = field(default_factory=EnvConfig)


@dataclass(frozen=True)
class GenerateSettings(ModelSettings):
    """Answer the prompts of a file.

    A row has `messages` (with `tools`, if it likes) or `prompt`: a text, or turns. The output has
    the rows in order, each with `responses`. The same command resumes after an interruption.
    """

    prompts: tyro.conf.Positional[InputPath] = ""
    """File of rows: .jsonl, .json or .parquet."""

    output: OutputPath = ""
    """File to write, .jsonl. OUTPUT.progress holds the answers so far."""

    samples: Count = 1
    """Answers to each prompt."""

    max_bad_rows: Natural = 0
    """Number of rows that are skipped and counted because they cannot be read or do not fit into
    the context; one more is an error."""

    def problems(self) -> list[str]:
        """Every rule that these settings break, each with a remedy."""
        found = []
        if not self.prompts or not Path(self.prompts).exists():
            found.append(
                f"prompts({self.prompts!r}) is not a file: name a file with rows of prompts"
            )
        if not self.output.endswith(".jsonl"):
            found.append(f"output({self.output!r}) must name a file that ends in .jsonl")
        elif Path(self.output).exists():
            found.append(f"output({self.output}) exists: name another file, or delete it")
        if self.samples > 1 and self.temperature == 0:
            found.append(f"samples({self.samples}) are all equal at temperature 0: raise it")
        return found


@dataclass(frozen=True)
class ServeSettings(ModelSettings):
    """Serve a model by OpenAI's API, on this process: chat completions, completions, models."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 is every one of this host. There is no authentication."""

    port: Port = 8000
    """Port; 0 = any that is free, which is printed."""
