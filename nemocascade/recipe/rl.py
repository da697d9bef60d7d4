"""The reinforcement-learning recipe: settings of a GRPO stage and those it shares with MOPD."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Annotated, Literal

from nemocascade.recipe.domains import DomainConfig
from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.grpo import GrpoConfig
from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.parallel import ParallelConfig, RolloutParallelConfig
from nemocascade.recipe.paths import ArtifactPath, OutputPath, path_problems
from nemocascade.recipe.rules import (
    Count,
    Natural,
    NonNegative,
    Positive,
    Probability,
    Range,
    Seed,
    Tokens,
    number_problems,
)
from nemocascade.recipe.server import RolloutServerConfig, sampling_problems
from nemocascade.recipe.train import (
    CheckpointConfig,
    EngineConfig,
    LogConfig,
    MoeTrainingConfig,
    OptimizerConfig,
)


@dataclass(frozen=True)
class RolloutConfig:
    """Generation of rollouts, and selection of those that train."""

    prompts_per_step: Count = 128
    rollouts_per_prompt: Count = 16
    max_prompt_tokens: Tokens = 32_768
    """Largest number of prompt tokens; longer prompts are dropped and counted."""

    max_response_tokens: Tokens = 49_152
    """Largest number of tokens after the prompt; longer responses are truncated."""

    max_turns: Count = 8
    """Largest number of policy turns in one episode with tools."""

    temperature: Positive = 1.0
    top_p: Probability = 1.0
    top_k: Natural = 0
    truncated_logprobs: bool = True
    """With top_p or top_k: the log-probabilities of rollout and training are those of the truncated
    distribution, renormalised, which the tokens were sampled from. A token that training does not
    keep does not train, and counts in the metric `outside`. Off: those of the whole distribution.
    """

    thinking: bool = True
    """Open a reasoning block at the end of the prompt."""

    slots: Count = 64
    """Concurrent sequences on a data-parallel rank of the generation layout."""

    parallel: RolloutParallelConfig = field(default_factory=RolloutParallelConfig)

    offload: bool = False
    """While rollouts are generated, keep the optimizer's state in host memory and free the gradient
    buffers."""

    prefill_tokens: Natural = 0
    """Prefill prompts together, up to this many tokens; 0 = each alone, which makes a prompt's
    states bit-identical whatever other prompts there are."""

    prefill_chunk: Natural = 8192
    """Chunked prefill: a longer prompt or tool result is prefilled in chunks of this many tokens,
    so that activation memory does not grow with the prompt. Changing it changes log-probabilities
    by rounding. 0 = no chunks."""

    dynamic_filtering: bool = True
    """Drop groups whose rewards are all equal, and draw other prompts to replace them."""

    max_draws: Count = 4
    """Draw at most this many times `prompts_per_step` prompts for a step; a step that finds fewer
    informative groups trains on those."""

    draw_margin: NonNegative = 1.0
    """Dynamic filtering draws ahead: it starts as many prompts as give enough informative groups by
    the running share of these, with this many standard deviations to spare. 0 = just as many as are
    expected to give enough. It affects the time of a step, not what trains."""

    min_best_reward: Annotated[float | None, Range()] = None
    """Mask the loss of prompts with no rollout whose reward is above this. They are counted and not
    replaced. None masks none."""

    overlong_filter: bool = False
    """Mask truncated responses in the loss; their rewards still count in the group's statistics."""

    stop_properly_penalty_coef: Annotated[float | None, Range(0, 1)] = None
    """Multiply the reward of a truncated response by this, before groups are filtered and compared
    (NeMo-RL's name): 0 = a truncated response scores 0. None = its reward stands. Held-out rewards
    are as the verifier gives them."""

    overlong_penalty: NonNegative = 0.0
    """Penalty on the reward of a truncated response. A response that ends within the last
    `overlong_buffer` tokens gets a proportional part (DAPO, arXiv 2503.14476, Eq. 13)."""

    overlong_buffer: Natural = 0
    """Tokens before the limit over which the penalty grows."""

    mismatch_mean_alarm: NonNegative = 0.02
    """Warn if the mean |log pi_train - log pi_rollout| of a step is above this."""

    mismatch_max_alarm: NonNegative = 1.0
    """Warn if the largest |log pi_train - log pi_rollout| of a step is above this."""

    engine: Literal["live", "server"] = "live"
    """Generator of rollouts: `live` the training ranks on their own weights, `server` inference
    servers, which get the weights after every optimizer step."""

    server: RolloutServerConfig = field(default_factory=RolloutServerConfig)

    replay_routing: bool = False
    """Router replay: training uses the experts that the rollout chose for each token, so that
    rounding does not select others. For `server` it needs servers that return them."""

    max_idle_steps: Natural = 10
    """Stop the stage after this many steps in a row without a verdict, or without a group whose
    rewards differ: nothing is learnt from them. 0 = never. Distillation uses no rewards and does
    not stop."""

    samples: Natural = 4
    """Groups per step whose best and worst rollout, and first without a verdict, are written as
    readable text to RUN/rollouts. One of them is a group that did not train, if there is one."""

    @property
    def truncates(self) -> bool:
        """True if log-probabilities are those of a truncated distribution."""
        return self.truncated_logprobs and (self.top_p < 1 or self.top_k > 0)

    def problems(self) -> list[str]:
        """Every rule that these settings break."""
        found = []
        if not self.overlong_buffer < max(1, self.max_response_tokens):
            found.append(
                f"rollout.overlong_buffer({self.overlong_buffer}) must lie in "
                f"0..max_response_tokens({self.max_response_tokens})"
            )
        if self.engine == "server":
            found += self.server.problems()
            if self.parallel != RolloutParallelConfig():
                p = self.parallel
                found.append(
                    f"rollout.parallel(tp {p.tp}, pp {p.pp}, ep {p.ep}) is the layout of the live "
                    "engine: leave it at 0 for servers, or set --rollout.engine live"
                )
            if self.offload:
                found.append(
                    "rollout.offload(True) makes memory for the live engine: set it to False for "
                    "servers, or set --rollout.engine live"
                )
            found += sampling_problems(
                self.server,
                self.temperature,
                truncates=self.top_p < 1 or self.top_k > 0,
                truncated_logprobs=self.truncated_logprobs,
            )
        return found


@dataclass(frozen=True)
class RlEvalConfig:
    """Held-out rewards of greedy responses."""

    every: Natural = 0
    """Steps between evaluations; 0 = before the first step and after the last."""

    prompts: Natural = 256
    """Held-out tasks of each domain; 0 = no evaluation."""

    max_response_tokens: Natural = 0
    """Largest number of tokens in a response; 0 = as in training."""


@dataclass(frozen=True)
class PolicyRecipe(ABC):
    """Settings shared by stages that train on rollouts of their own policy: GRPO and MOPD."""

    steps: Count = 100
    """Optimizer steps, each on fresh rollouts."""

    seed: Seed = 1
    """Seed of the tasks, their order and all sampling."""

    run_dir: OutputPath = "runs/grpo"
    """Folder for everything the run writes."""

    resume: bool = True
    """Resume from the newest checkpoint in `run_dir`, if there is one. Off: a run folder with
    checkpoints is an error."""

    accept_changes: bool = False
    """Resume although settings changed that affect the training. The changes are listed in the log
    and in the artifact's manifest."""

    init_from: ArtifactPath = ""
    """Artifact folder of the policy to start from: its shape, weights and tokenizer."""

    stage: str = "grpo"
    """Name of the stage, for its artifact and messages."""

    domains: tuple[DomainConfig, ...] = (DomainConfig(),)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    envs: EnvConfig = field(default_factory=EnvConfig)
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=3e-6,
            min_lr=3e-6,
            schedule="constant",
            warmup_steps=10,
            warmup_start_lr=3e-7,
            beta2=0.95,
            weight_decay=0.0,
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
        """Every rule that this recipe breaks with `world_size` ranks, each with a remedy.

        model: the shape of `init_from`, if it has been read already.
        """
        found = number_problems(self) + path_problems(self)
        found += self.optimizer.problems() + self.rollout.problems()
        found += self.envs.problems()
        if not self.init_from:
            found.append("init_from is empty: name the artifact folder of the stage before")
        if not self.domains:
            found.append("domains is empty: name at least one")
        names = [d.domain for d in self.domains]
        found += [
            f"domains names {n} twice" for n in sorted({n for n in names if names.count(n) > 1})
        ]
        for number, domain in enumerate(self.domains):
            found += domain.curriculum_problems(f"domains.{number}")
        longest = self.rollout.max_prompt_tokens + self.rollout.max_response_tokens
        if self.capacity < longest:
            found.append(
                f"capacity({self.capacity}) must hold a whole episode: "
                f"max_prompt_tokens({self.rollout.max_prompt_tokens}) + "
                f"max_response_tokens({self.rollout.max_response_tokens}) = {longest}"
            )
        if model is not None and not found:
            dp = max(1, self.parallel.data_parallel(world_size))
            found += self.parallel.problems(
                model,
                world_size,
                capacity=self.capacity,
                sequences_per_step=dp * self.parallel.pp,
            )
            found += self.rollout.parallel.problems(self.parallel, model, world_size)
        return list(dict.fromkeys(found))


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
        if self.grpo.kl_coef and self.rollout.truncates:
            found.append(
                f"grpo.kl_coef({self.grpo.kl_coef}) compares whole distributions: set "
                "rollout.truncated_logprobs to False, or rollout.top_p to 1 and top_k to 0"
            )
        return found
