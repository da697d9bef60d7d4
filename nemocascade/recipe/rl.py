"""The reinforcement-learning recipe: what a GRPO stage is made from."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Literal

from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.parallel import ParallelConfig
from nemocascade.recipe.train import (
    CheckpointConfig,
    EngineConfig,
    LogConfig,
    MoeTrainingConfig,
    OptimizerConfig,
)


@dataclass(frozen=True)
class DomainConfig:
    """One domain of a stage's prompts."""

    domain: str = "multiple_choice"
    """Name of the environment that scores them."""

    share: float = 1.0
    """Part of the prompts, beside the shares of the other domains."""

    path: tuple[str, ...] = ()
    """JSONL files of released rows. Empty: tasks are made from the seed."""

    difficulty: int = 0
    """Of tasks that are made; 0 is the easiest."""

    tasks: int = 1024
    """Tasks that are made; or, where it is not 0, the most that are read from `path`."""

    heldout_path: tuple[str, ...] = ()
    """JSONL files of the held-out tasks. Empty: made, and disjoint from the others."""

    drop_solved: float = 0.0
    """Share of the tasks from `path` with a `pass_rate` of 1 that is dropped: they teach nothing.
    Which ones is decided by their text."""

    drop_unsolved: float = 0.0
    """Likewise of the tasks with a `pass_rate` of 0."""

    def problems(self) -> list[str]:
        """Every rule these settings break."""
        return [
            f"domains: {name}({share}) of {self.domain} must lie in 0..1"
            for name, share in (
                ("drop_solved", self.drop_solved),
                ("drop_unsolved", self.drop_unsolved),
            )
            if not 0 <= share <= 1
        ]


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are drawn, and which of them train."""

    prompts_per_step: int = 128
    rollouts_per_prompt: int = 16
    max_prompt_tokens: int = 32_768
    """Longer prompts are dropped and counted."""

    max_response_tokens: int = 49_152
    """An answer that is not finished by then is truncated."""

    max_turns: int = 8
    """Turns of the model in one episode with tools."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    thinking: bool = True
    """The prompt opens a reasoning block."""

    slots: int = 64
    """Texts under way at a time on a data-parallel rank."""

    prefill_tokens: int = 0
    """Prompts are read together up to this many tokens; 0 = each by itself, which makes a prompt's
    states the same bits whatever prompts stand beside it."""

    prefill_chunk: int = 8192
    """A longer prompt, or answer of a tool, is read so many tokens at a time, each piece onto the
    states of those before it: the memory of activations does not grow with the prompt. Another
    value changes log-probabilities by rounding. 0 = as a whole."""

    dynamic_filtering: bool = True
    """Drop groups whose rewards are all equal, and draw other prompts in their place."""

    max_draws: int = 4
    """Prompts drawn for a step are at most this many times `prompts_per_step`; a step that finds
    fewer groups trains on those."""

    min_best_reward: float | None = None
    """Mask the loss of prompts with no rollout whose reward is above this; they are counted, and
    none is drawn in their place. None masks none."""

    overlong_filter: bool = False
    """A truncated answer leaves the loss; it still counts in its group's mean and deviation."""

    overlong_penalty: float = 0.0
    """Taken off the reward of a truncated answer, and off that of an answer which ends within the
    last `overlong_buffer` tokens in proportion (DAPO, arXiv 2503.14476, Eq. 13)."""

    overlong_buffer: int = 0
    """Tokens before the limit over which the penalty grows."""

    mismatch_mean_alarm: float = 0.02
    """Warn where the mean |log pi_train - log pi_rollout| of a step is above this."""

    mismatch_max_alarm: float = 1.0
    """Warn where the largest one is above this."""

    samples: int = 4
    """Groups a step of which the best and the worst rollout are kept as readable text in
    RUN/rollouts."""

    def problems(self) -> list[str]:
        """Every rule these settings break."""
        found = [
            f"rollout.{name}({getattr(self, name)}) must be at least 1"
            for name in (
                "prompts_per_step",
                "rollouts_per_prompt",
                "max_prompt_tokens",
                "max_response_tokens",
                "max_turns",
                "slots",
                "max_draws",
            )
            if getattr(self, name) < 1
        ]
        found += [
            f"rollout.{name}({getattr(self, name)}) must be at least 0"
            for name in ("prefill_tokens", "prefill_chunk")
            if getattr(self, name) < 0
        ]
        if not self.temperature > 0:
            found.append(
                f"rollout.temperature({self.temperature}) must be above 0: a greedy rollout has no "
                "policy gradient"
            )
        if not 0 < self.top_p <= 1:
            found.append(f"rollout.top_p({self.top_p}) must lie in (0, 1]")
        if self.min_best_reward is not None and not math.isfinite(self.min_best_reward):
            found.append(
                f"rollout.min_best_reward({self.min_best_reward}) must be a number or None"
            )
        if not 0 <= self.overlong_buffer < max(1, self.max_response_tokens):
            found.append(
                f"rollout.overlong_buffer({self.overlong_buffer}) must lie in "
                f"0..max_response_tokens({self.max_response_tokens})"
            )
        return found


@dataclass(frozen=True)
class GrpoConfig:
    """Advantages and loss (Nemotron-Cascade 2, arXiv 2603.19220, Eq. 1)."""

    normalize: Literal["batch", "group", "sequence"] = "batch"
    """Denominator of the loss: all trained tokens of the step, or those of a prompt's group with
    groups weighing the same, or those of a sequence with sequences weighing the same."""

    std_epsilon: float = 1e-6
    """Added to the deviation of a group's rewards."""

    scale_by_std: bool = True
    """Divide a group's advantages by the deviation of its rewards."""

    unbiased_std: bool = False
    """Divide by G - 1 instead of G in the variance."""

    leave_one_out: bool = False
    """The mean that is taken off a reward is that of the group's other rewards."""

    kl_coef: float = 0.0
    """Weight of the k3 estimate of KL(pi || pi_start); 0 = the start's weights are not kept."""

    capacity: int = 65_536
    """Tokens in one packed sequence (micro-batch) of training."""


@dataclass(frozen=True)
class RlEvalConfig:
    """Held-out accuracy, decoded greedily."""

    every: int = 0
    """Steps between evaluations; 0 = before the first step and after the last."""

    prompts: int = 256
    """Held-out tasks of each domain; 0 = no evaluation."""

    max_response_tokens: int = 0
    """0 = as in training."""


@dataclass(frozen=True)
class PolicyRecipe(ABC):
    """What stages share that train on rollouts of their own policy."""

    steps: int = 100
    """Optimizer steps, each on rollouts of its own."""

    seed: int = 1
    """Of the tasks, their order and every draw."""

    run_dir: str = "runs/grpo"
    """Folder for everything the run writes."""

    resume: bool = True
    """Go on from the newest checkpoint in `run_dir`, if there is one. Off: refuse a run folder
    that holds checkpoints."""

    init_from: str = ""
    """Artifact folder with the policy to start from: its shape, weights and tokenizer."""

    stage: str = "grpo"
    """Name of the stage, for its artifact and messages."""

    domains: tuple[DomainConfig, ...] = (DomainConfig(),)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    envs: EnvConfig = field(default_factory=EnvConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=3e-6, min_lr=3e-6, schedule="constant", warmup_steps=0, beta2=0.95, weight_decay=0.0
        )
    )
    moe: MoeTrainingConfig = field(
        default_factory=lambda: MoeTrainingConfig(load_balance="none", freeze_router=True)
    )
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every=10))
    eval: RlEvalConfig = field(default_factory=RlEvalConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Tokens in one packed sequence (micro-batch) of training."""

    def problems(self, world_size: int, model: ModelConfig | None = None) -> list[str]:
        """Every rule this recipe breaks in a world of `world_size` ranks, each with a remedy.

        model: the shape of `init_from`, where it was read already.
        """
        found = self.optimizer.problems() + self.rollout.problems() + self.envs.problems()
        if self.steps < 1:
            found.append(f"steps({self.steps}) must be at least 1")
        if not self.init_from:
            found.append("init_from is empty: name the artifact folder of the stage before")
        if not self.domains:
            found.append("domains is empty: name at least one")
        names = [d.domain for d in self.domains]
        found += [
            f"domains names {n} twice" for n in sorted({n for n in names if names.count(n) > 1})
        ]
        found += [
            f"domains.{i}.share({d.share}) must be above 0"
            for i, d in enumerate(self.domains)
            if not d.share > 0
        ]
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        if self.capacity < longest:
            found.append(
                f"capacity({self.capacity}) must hold a whole episode: "
                f"max_prompt_tokens({self.rollout.max_prompt_tokens}) + "
                f"max_response_tokens({self.rollout.max_response_tokens}) = {longest}"
            )
        found += [problem for domain in self.domains for problem in domain.problems()]
        if model is not None and not found:
            dp = max(1, self.parallel.data_parallel(world_size))
            found += self.parallel.problems(
                model,
                world_size,
                capacity=self.capacity,
                sequences_per_step=dp * self.parallel.pp,
            )
        return found


@dataclass(frozen=True)
class GrpoRecipe(PolicyRecipe):
    """Group-relative policy optimisation, strictly on-policy, on rewards."""

    grpo: GrpoConfig = field(default_factory=GrpoConfig)

    @property
    def capacity(self) -> int:
        return self.grpo.capacity

    def problems(self, world_size: int, model: ModelConfig | None = None) -> list[str]:
        found = super().problems(world_size, model)
        if self.rollout.rollouts_per_prompt < 2:
            found.append(
                f"rollout.rollouts_per_prompt({self.rollout.rollouts_per_prompt}) must be at least "
                "2: an advantage compares the answers to one prompt"
            )
        return found
