"""The work of a step of an RL or MOPD recipe: its settings, and assumptions about rollouts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from nemocascade.plan.lengths import Lengths, find_lengths
from nemocascade.recipe import GrpoRecipe, MopdRecipe, PolicyRecipe
from nemocascade.recipe.rules import Count, Natural, NonNegative, Range

PROMPT_TOKENS = 2000
"""Assumed tokens of a prompt."""
INFORMATIVE_SHARE = 0.6
"""Assumed share of groups whose rewards differ."""
CORES = 12
"""Assumed processor cores of a rank: 96 on a host of 8 GPUs."""
VERIFY_S = {"code": 80.0, "swe_agentless": 60.0, "swe_agentic": 60.0}
"""Core seconds of a verdict, by domain. Code is published: 2,048 executions in 427 s on 384 cores
(arXiv 2603.19220). The others are assumed."""
OTHER_VERIFY_S = 0.1
TESTS = 12
"""Assumed number of a program's tests that can run side by side."""
TURN_TOKENS = {"swe_agentic": 1000}
"""Assumed tokens of a turn with its tool's result, by domain; others have one turn."""
TOOL_SHARE, TOOL_S = 0.5, 2.0
"""Assumed part of an agent's tokens that tools wrote, and seconds of a call."""
FILL = 0.95
"""Assumed part of the rows of training's packs that hold tokens."""


@dataclass(frozen=True, kw_only=True)
class RolloutAssumptions:
    """Assumptions about the rollouts of an RL or MOPD recipe."""

    response_lengths: str = ""
    """Tokens of responses: lognormal:MEDIAN:DEVIATION, or the metrics.jsonl of a run. Empty:
    those of the run of `--from`, else log-normal with a sixth of the limit as median and a
    deviation of 1."""

    prompt_tokens: Count = PROMPT_TOKENS
    """Tokens of a prompt."""

    informative_share: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Share of the groups whose rewards differ, with dynamic filtering; None = 0.6, or that of the
    run of `--from`."""

    verify_s: NonNegative | None = None
    """Core seconds of a verdict; None = by domain: 80 for code, 60 for SWE, else 0.1."""

    tool_s: NonNegative = TOOL_S
    """Seconds of a tool's call."""

    turn_tokens: Natural | None = None
    """Tokens of an episode's turn with its tool's result; 0 = one turn. None = by domain: 1,000 for
    agentic SWE, else one turn."""

    cores: Count = CORES
    """Processor cores of a rank, for verifiers."""


@dataclass(frozen=True)
class EpisodeCosts:
    """Time outside of the model.

    turn: tokens of a turn with its tool's result; 0: one turn. tool_share: part of them that the
    tool wrote. most_turns: of an episode. merged: turns that are one event, for speed: their tool
    calls and prefills come one after another. tool_s: seconds of a call. verify_s: core seconds of
    a verdict. side: cores that one verdict can use. cores: of a rank.
    """

    turn: int = 0
    tool_share: float = 0.0
    most_turns: int = 1
    merged: int = 1
    tool_s: float = 0.0
    verify_s: float = 0.0
    side: int = 1
    cores: int = 1

    def turns(self, length: int) -> int:
        """Number of turns of an episode of `length` tokens."""
        return max(1, min(self.most_turns, round(length / self.turn))) if self.turn else 1


@dataclass(frozen=True)
class StepWork:
    """A step's rollouts. wanted: prompts that train. drawn: those that start, on average. copies:
    rollouts of each. most: candidates of dynamic filtering; 0 without. share: of informative
    groups. teachers: weight sets that score the step's sequences beside the policy. exact: by
    their hidden states, for a divergence over the vocabulary."""

    wanted: int
    copies: int
    most: int
    share: float
    margin: float
    prompt: int
    lengths: Lengths
    costs: EpisodeCosts
    teachers: int
    exact: bool = False

    @property
    def drawn(self) -> float:
        """Prompts that a step starts, on average: enough informative ones, with the margin."""
        if not self.most:
            return self.wanted
        spare = self.margin * math.sqrt(self.wanted * (1.0 - self.share))
        return min(self.most, (self.wanted + spare) / self.share)

    @property
    def rollouts(self) -> int:
        """Rollouts that a step starts, on average."""
        return round(self.drawn * self.copies)

    @property
    def trained_tokens(self) -> float:
        """Tokens that a step trains on, on average."""
        trained = min(self.wanted, self.most * self.share) if self.most else self.wanted
        return trained * self.copies * (self.prompt + self.lengths.mean)

    @property
    def generated_tokens(self) -> float:
        """Those of them that the policy generated."""
        return self.trained_tokens * self.lengths.mean / (self.prompt + self.lengths.mean)

    @property
    def live_tokens(self) -> float:
        """Cached tokens of a sequence in the middle of its generation."""
        return self.prompt + self.lengths.token_mean() / 2

    def packs(self, capacity: int) -> int:
        """Packs of a step's training sequences."""
        return max(1, round(self.trained_tokens / capacity / FILL))


def work_of_recipe(recipe: PolicyRecipe, assumed: RolloutAssumptions) -> StepWork:
    """The work of a step of the recipe. Raises PlanError for lengths that cannot be read."""
    r = recipe.rollout
    names, shares = [d.domain for d in recipe.domains], [d.share for d in recipe.domains]

    def mean(values: Mapping[str, float], other: float) -> float:
        found = (values.get(name, other) * s for name, s in zip(names, shares, strict=True))
        return sum(found) / sum(shares)

    turn = assumed.turn_tokens
    if turn is None:
        turn = round(mean(TURN_TOKENS, 0))
    verify = assumed.verify_s
    if verify is None:
        verify = mean(VERIFY_S, OTHER_VERIFY_S)
    teachers, exact = 0, False
    if isinstance(recipe, MopdRecipe):
        teachers = len({t.artifact for t in recipe.teachers})
        exact = recipe.mopd.divergence != "sampled"
        verify = verify if recipe.mopd.score_rollouts else 0.0
    elif isinstance(recipe, GrpoRecipe) and recipe.grpo.kl_coef:
        teachers = 1
    return StepWork(
        wanted=r.prompts_per_step,
        copies=r.rollouts_per_prompt,
        most=r.max_draws * r.prompts_per_step if r.dynamic_filtering else 0,
        share=INFORMATIVE_SHARE if assumed.informative_share is None else assumed.informative_share,
        margin=r.draw_margin,
        prompt=min(assumed.prompt_tokens, r.max_prompt_tokens),
        lengths=find_lengths(assumed.response_lengths, r.max_response_tokens),
        costs=EpisodeCosts(
            turn=turn,
            tool_share=TOOL_SHARE if turn else 0.0,
            most_turns=r.max_turns,
            tool_s=assumed.tool_s,
            verify_s=verify,
            side=TESTS if any(name in VERIFY_S for name in names) else 1,
            cores=recipe.envs.sandbox.local_workers or assumed.cores,
        ),
        teachers=teachers,
        exact=exact,
    )
