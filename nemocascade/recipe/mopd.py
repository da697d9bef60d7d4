"""The recipe of multi-domain on-policy distillation (MOPD)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.paths import ArtifactPath, OutputPath
from nemocascade.recipe.rl import PolicyRecipe, RolloutConfig
from nemocascade.recipe.rules import NonNegative, Positive, Tokens
from nemocascade.recipe.train import OptimizerConfig


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher of one domain."""

    domain: str = "math"
    artifact: ArtifactPath = ""
    """Artifact folder; tokenizer, vocabulary and shape must be the student's. Empty, in a cascade
    only: the artifact so far with the best held-out score of the domain."""


@dataclass(frozen=True)
class MopdConfig:
    """The objective (Nemotron-Cascade 2, arXiv 2603.19220, Eq. 2-4), and offload of teachers."""

    divergence: Literal["sampled", "reverse_kl", "forward_kl", "jensen_shannon"] = "sampled"
    """`sampled`: Eq. 2-4, whose advantage is log pi_teacher - log pi of the sampled token. Else a
    divergence over the whole vocabulary in every state of the rollouts (arXiv 2306.13649):
    KL(pi || pi_teacher), KL(pi_teacher || pi), or the mean of both from their mixture. It needs the
    teacher's hidden states, hidden_size x 2 bytes for a trained token, and no importance weight."""

    ratio_low: NonNegative = 0.5
    """Mask tokens whose pi_train / pi_rollout is below this; only `sampled`."""

    ratio_high: Positive = 2.0
    """Mask tokens whose pi_train / pi_rollout is above this; only `sampled`."""

    keep: Literal["host", "disk"] = "host"
    """Offload each rank's shard of a teacher to host memory, or to files in RUN that are prefetched
    while rollouts are verified."""

    score_rollouts: bool = True
    """Score the rollouts with verifiers and judges, for metrics only: the objective uses no reward.
    Off saves their time."""

    capacity: Tokens = 131_072
    """Tokens in one packed sequence (micro-batch) of training."""


@dataclass(frozen=True)
class MopdRecipe(PolicyRecipe):
    """Multi-domain on-policy distillation: one teacher per prompt, by its domain."""

    stage: str = "mopd"
    """Name of the stage, for its artifact and messages."""

    run_dir: OutputPath = "runs/mopd"
    """Folder for everything the run writes."""

    teachers: tuple[TeacherConfig, ...] = ()
    """One teacher per domain; domains may share an artifact."""

    mopd: MopdConfig = field(default_factory=MopdConfig)
    rollout: RolloutConfig = field(
        default_factory=lambda: RolloutConfig(
            rollouts_per_prompt=4, max_response_tokens=98_304, dynamic_filtering=False
        )
    )
    optimizer: OptimizerConfig = field(
        default_factory=lambda: OptimizerConfig(
            lr=2e-6,
            min_lr=2e-6,
            schedule="constant",
            warmup_steps=30,
            warmup_start_lr=2e-7,
            beta2=0.95,
            weight_decay=0.0,
        )
    )

    @property
    def capacity(self) -> int:
        return self.mopd.capacity

    def problems(self, world_size: int, model: ModelConfig | None = None) -> list[str]:
        found = super().problems(world_size, model) + self._teacher_problems()
        if not self.mopd.ratio_low < self.mopd.ratio_high:
            found.append(
                f"mopd.ratio_low({self.mopd.ratio_low}) must be below ratio_high"
                f"({self.mopd.ratio_high})"
            )
        bounds, default = (self.mopd.ratio_low, self.mopd.ratio_high), MopdConfig()
        if self.mopd.divergence != "sampled" and bounds != (default.ratio_low, default.ratio_high):
            found.append(
                f"mopd.ratio_low, ratio_high{bounds} bound the ratio of a sampled token, "
                f"which mopd.divergence({self.mopd.divergence}) does not have: leave them out, or "
                "set mopd.divergence to sampled"
            )
        if self.rollout.dynamic_filtering:
            found.append(
                "rollout.dynamic_filtering drops groups by their rewards, which distillation does "
                "not use: set it to False"
            )
        if self.rollout.truncates:
            found.append(
                "rollout.truncated_logprobs compares a truncated student with whole teachers: set "
                "it to False, or rollout.top_p to 1 and top_k to 0"
            )
        if not self.mopd.score_rollouts:
            found += [
                f"domains.{number}.curriculum(adaptive) follows the rewards, which "
                "mopd.score_rollouts(False) does not make: set it to True, or the curriculum to "
                "easy_to_hard"
                for number, domain in enumerate(self.domains)
                if domain.curriculum == "adaptive"
            ]
        if self.rollout.min_best_reward is not None:
            found.append(
                "rollout.min_best_reward masks prompts by their rewards, which distillation does "
                "not use: set it to None"
            )
        return found

    def _teacher_problems(self) -> list[str]:
        """Domains without one teacher, and teachers without an artifact or a domain."""
        taught, domains = [t.domain for t in self.teachers], [d.domain for d in self.domains]
        found = [
            f"teachers name {domain} {taught.count(domain)} times: it needs one teacher"
            for domain in domains
            if taught.count(domain) != 1
        ]
        found += [
            f"teachers: {t.domain} has no artifact: name a folder"
            for t in self.teachers
            if not t.artifact
        ]
        found += [
            f"teachers: {domain} is not a domain of this recipe: take it out, or add it to domains"
            for domain in sorted(set(taught) - set(domains))
        ]
        return found
