"""The reinforcement-learning recipe: settings of a GRPO stage and those it shares with MOPD."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from nemocascade.recipe.domains import DomainConfig
from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.grpo import GrpoConfig
from nemocascade.recipe.lora import LoraConfig
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

    slots: Natural = 64
    """Concurrent sequences on a data-parallel rank of the generation layout. 0 = as many as the
    memory of the caches allows at the first rollouts, for sequences at half of the largest length.
    On a GPU the number affects rounding: set it where a resumed step must have the same bits."""

    kv_gib: NonNegative = 0.0
    """GiB of the KV cache and the Mamba states on a rank. If all sequences together need more, some
    are moved to host memory meanwhile, which changes no result. 0 = on a GPU `kv_memory_fraction`,
    on a CPU 4 GiB; no more is allocated than `slots` sequences of the largest length need."""

    kv_memory_fraction: Probability = 0.8
    """Share of a GPU's free memory, after weights and optimizer state, that the KV cache and the
    Mamba states may have. The rest is for activations."""

    parallel: RolloutParallelConfig = field(default_factory=RolloutParallelConfig)
    """Layout of the live engine's replicas; servers have their own."""

    offload: bool = False
    """While rollouts are generated, keep the optimizer's state in host memory and free the gradient
    buffers."""

    journal: bool = True
    """Append every finished rollout with its verdict to RUN/journal, from which a killed or stopped
    step resumes. Deleted once a checkpoint covers the step."""

    prefill_tokens: Natural = 0
    """Prefill prompts together, up to this many tokens, where one replica generates a fixed set of
    prompts without a journal; 0 = each alone, which makes a prompt's states bit-identical whatever
    other prompts there are."""

    prefill_chunk: Natural = 8192
    """Chunked prefill: a longer prompt or tool result is prefilled in chunks of this many tokens,
    so that activation memory does not grow with the prompt. Changing it changes log-probabilities
    by rounding. 0 = no chunks."""

    dynamic_filtering: bool = True
    """Drop groups whose rewards are all equal, and draw other prompts to replace them."""

    filter_by: Literal["step", "domain"] = "step"
    """With several domains: `step` trains on the first informative groups of any domain, so one
    whose rewards are often equal trains less than its share. `domain`, which needs
    `dynamic_filtering`, draws until each domain has its share of `prompts_per_step`, as far as
    `max_draws` allows."""

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
    (NeMo-RL's name): 0 = a truncated response scores 0. None = its reward is kept. Held-out rewards
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
    def layout(self) -> RolloutParallelConfig:
        """Layout of the replicas that generate on the training ranks; with servers none does, and
        it is training's."""
        return self.parallel if self.engine == "live" else RolloutParallelConfig()

    @property
    def truncates(self) -> bool:
        """True if log-probabilities are those of a truncated distribution."""
        return self.truncated_logprobs and (self.top_p < 1 or self.top_k > 0)

    def problems(self) -> list[str]:
        """Every rule that these settings break."""
        found = []
        if not self.overlong_buffer < max(1, self.max_response_tokens):
            found.append(
                f"rollout.overlong_buffer({self.overlong_buffer}) must be in "
                f"0..max_response_tokens({self.max_response_tokens})"
            )
        if self.filter_by == "domain" and not self.dynamic_filtering:
            found.append(
                "rollout.filter_by(domain) chooses which groups dynamic filtering draws, and "
                "rollout.dynamic_filtering is False: set --rollout.filter-by step, or in an RL "
                "stage --rollout.dynamic-filtering True"
            )
        if self.engine == "server":
            found += self.server.problems()
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
    lora: LoraConfig = field(default_factory=LoraConfig)
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
        found += self.optimizer.problems() + self.engine.problems() + self.rollout.problems()
        found += self.envs.problems() + self.log.problems()
        found += self.lora.problems(self.engine, model)
        if not self.init_from:
            found.append("init_from is empty: name the artifact folder of the stage before")
        if self.engine.overlap_parameter_gather:
            found.append(
                "engine.overlap_parameter_gather(True) is for SFT, for rollouts read all weights "
                "right after a step: set --engine.overlap-parameter-gather False"
            )
        if not self.domains:
            found.append("domains is empty: name at least one")
        names = [d.domain for d in self.domains]
        found += [
            f"domains names {n} twice" for n in sorted({n for n in names if names.count(n) > 1})
        ]
        for number, domain in enumerate(self.domains):
            found += domain.curriculum_problems(f"domains.{number}")
        found += self._mixture_problems() if not found else []
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
            found += self.rollout.layout.problems(self.parallel, model, world_size)
            found += self.engine.layout_problems(self.parallel, model)
        return list(dict.fromkeys(found))

    def _mixture_problems(self) -> list[str]:
        """Settings of single domains that do not fit the stage's."""
        rollout, found = self.rollout, []
        for number, domain in enumerate(self.domains):
            name, limit = f"domains.{number}.max_response_tokens", domain.max_response_tokens
            if limit > rollout.max_response_tokens:
                found.append(
                    f"{name}({limit}) is above rollout.max_response_tokens"
                    f"({rollout.max_response_tokens}), for which memory is planned: raise that one"
                )
            if limit and rollout.overlong_penalty:
                found.append(
                    f"{name}({limit}) with rollout.overlong_penalty({rollout.overlong_penalty}): "
                    "the penalty grows towards one limit for all domains: leave one of them at 0"
                )
        if rollout.dynamic_filtering and rollout.filter_by == "domain":
            quotas = prompt_quotas(
                {d.domain: d.share for d in self.domains}, rollout.prompts_per_step
            )
            if none := [name for name, count in quotas.items() if not count]:
                found.append(
                    f"rollout.filter_by(domain): {', '.join(none)} would train on no group of "
                    f"prompts_per_step({rollout.prompts_per_step}): raise its share, or "
                    "prompts_per_step"
                )
        return found


def prompt_quotas(shares: Mapping[str, float], prompts: int) -> dict[str, int]:
    """Prompts of each domain in a step of `prompts`, by largest remainder."""
    total = sum(shares.values())
    exact = {name: prompts * share / total for name, share in shares.items()}
    found = {name: int(value) for name, value in exact.items()}
    rest = sorted(exact, key=lambda name: found[name] - exact[name])
    for name in rest[: prompts - sum(found.values())]:
        found[name] += 1
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
        if self.grpo.kl_coef and self.rollout.truncates:
            found.append(
                f"grpo.kl_coef({self.grpo.kl_coef}) compares whole distributions: set "
                "rollout.truncated_logprobs to False, or rollout.top_p to 1 and top_k to 0"
            )
        return found
