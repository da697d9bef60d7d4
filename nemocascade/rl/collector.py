"""Collects scored rollouts: generation and verification run concurrently.

Tasks are sharded over the replicas of the model and the results are gathered. Every rank then has
all rollouts of a step, in the order of the tasks, on any parallel layout.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.grpo import GrpoConfig
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.rl.advantages import group_advantages, is_informative, overlong_penalty
from nemocascade.rl.episodes import Episodes
from nemocascade.rl.tasks import Task, TaskStream
from nemocascade.rl.verification import (
    THREADS,
    OnVerdict,
    Rollout,
    Verification,
    score_after,
    shows,
)
from nemocascade.rollout.engine import Engine, Request, Sampling
from nemocascade.runtime.world import World
from nemocascade.types import Environment, Prompt, Verdict

UNTRUNCATED_REWARD = "reward_before_stop_penalty"
"""Name in a verdict's details of a truncated rollout's own reward."""


@dataclass(frozen=True, eq=False)
class Group:
    """The rollouts of one task. advantage: [G] float64, set by `advantages_of`."""

    task: Task
    rollouts: tuple[Rollout, ...]
    advantage: Tensor | None = None

    def rewards(self, settings: RolloutConfig) -> tuple[Tensor, Tensor]:
        """Rewards minus the overlong penalty, float64, and their validity, bool; both [G]."""
        valid = torch.tensor([r.verdict.reward is not None for r in self.rollouts])
        rewards = torch.tensor(
            [
                (r.verdict.reward or 0.0) - overlong_penalty(r.length, settings)
                for r in self.rollouts
            ],
            dtype=torch.float64,
        )
        return rewards, valid


@dataclass(frozen=True)
class Gathered:
    """The groups collected for a step.

    groups: those that train. drawn: number of tasks that were drawn. tried: the groups of all
    drawn tasks. masked: number of groups that do not train because no reward is above
    `min_best_reward`.
    """

    groups: tuple[Group, ...]
    drawn: int
    tried: tuple[Group, ...]
    masked: int = 0


class Collector:
    """Generates rollouts of the current policy and verifies them.

    threads: concurrent verifiers on each replica.
    """

    def __init__(
        self,
        world: World,
        engine: Engine,
        tokenizer: Tokenizer,
        environments: Mapping[str, Environment],
        settings: RolloutConfig,
        *,
        seed: int,
        threads: int = THREADS,
    ) -> None:
        self.world, self.engine, self.tokenizer = world, engine, tokenizer
        self.environments, self.settings, self.seed = environments, settings, seed
        self.threads = threads
        self.on_verdict: OnVerdict = lambda task, rollout: None
        """Called with every rollout as soon as it has its verdict, from a thread of the rank that
        verified it. After a collective verifier the main rank calls it."""

    def sampling(self) -> Sampling:
        """Sampling settings of the recipe; generation stops at the template's end of turn."""
        s = self.settings
        return Sampling(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            truncated_logprobs=s.truncated_logprobs,
            max_tokens=s.max_response_tokens,
            stop_tokens=tuple((end,) for end in self.tokenizer.end_ids),
            seed=self.seed,
        )

    def roll_out(
        self,
        tasks: Sequence[Task],
        copies: int,
        sampling: Sampling | None = None,
        *,
        scored: bool = True,
        compared: bool = True,
    ) -> list[Group]:
        """Generate and score `copies` rollouts of each task, in order; the same list on every rank.

        Sampling depends on the seed, the task's number and the copy, not on the ranks.
        scored: False skips verification. compared: False scores each rollout by itself, also in
        domains whose verdicts compare the rollouts of a group.
        """
        world = self.world
        mine = tasks[world.replica_rank :: world.num_replicas]
        by_id = {task.number * copies + copy: task for task in mine for copy in range(copies)}
        everything: dict[int, Rollout] = {}
        found = self._generate(by_id, copies, sampling or self.sampling(), scored, compared)
        world.watch.enter("rollout: exchange")
        # Ranks may finish further apart than the timeout of a collective.
        world.watch.meet()
        for part in world.all_gather_object(found):
            everything |= part
        groups = [
            Group(task, tuple(everything[task.number * copies + copy] for copy in range(copies)))
            for task in tasks
        ]
        return self._score_collectively(groups, compared) if scored else groups

    def _generate(
        self,
        by_id: Mapping[int, Task],
        copies: int,
        sampling: Sampling,
        scored: bool,
        compared: bool,
    ) -> dict[int, Rollout]:
        """Rollouts of this replica by request id, on its verifying rank. Verification overlaps
        with generation unless the verifiers need all ranks."""
        episodes = Episodes(
            self.tokenizer, self.environments, self.settings, by_id, self.world.watch
        )
        verification = Verification(
            episodes,
            self.environments,
            self.tokenizer,
            by_id,
            copies=copies,
            scored=scored,
            compared=compared,
            threads=self.threads,
            on_verdict=self.on_verdict,
        )
        requests = [Request(number, task.ids) for number, task in by_id.items()]
        try:
            for completion in self.engine.run(requests, sampling, episodes.respond):
                episodes.close(completion.request.id)
                if shows(self.world):
                    verification.add(completion)
            self.world.watch.enter("rollout: verdicts")
            return verification.rollouts(self.world.watch)
        except BaseException:
            verification.give_up()
            raise
        finally:
            verification.close()
            episodes.close_all()

    def _score_collectively(self, groups: Sequence[Group], compared: bool) -> list[Group]:
        """Add the verdicts of collective verifiers, which run on all ranks at once."""
        scored = list(groups)
        for name, environment in self.environments.items():
            chosen = [k for k, g in enumerate(groups) if g.task.prompt.domain == name]
            if not environment.collective or not chosen:
                continue
            self.world.watch.enter("rollout: judge")
            whole = [[r.response for r in groups[k].rollouts if not r.dropped] for k in chosen]
            responses = [
                (groups[k].task.prompt, found) for k, found in zip(chosen, whole, strict=True)
            ]
            if not compared:
                responses = [(prompt, [r]) for prompt, group in responses for r in group]
            verdicts = itertools.chain(*score_after(self.world, environment, responses))
            for k in chosen:
                rollouts = tuple(
                    r if r.dropped else replace(r, verdict=next(verdicts))
                    for r in groups[k].rollouts
                )
                scored[k] = replace(groups[k], rollouts=rollouts)
                for rollout in rollouts if self.world.is_main else ():
                    self.on_verdict(groups[k].task, rollout)
        return scored


def gather(
    collector: Collector, stream: TaskStream, settings: RolloutConfig, step: int = 0
) -> Gathered:
    """Collect the groups that a step trains on, and tell the stream their verdicts.

    With dynamic filtering, groups whose rewards are all equal are dropped and replaced by new
    tasks, up to `max_draws * prompts_per_step` tasks in total. Groups masked by `min_best_reward`
    are not replaced. step: counted from 0.
    """
    wanted, most = settings.prompts_per_step, settings.max_draws * settings.prompts_per_step
    kept: list[Group] = []
    tried: list[Group] = []
    while True:
        count = min(wanted - len(kept), most - len(tried))
        if not settings.dynamic_filtering and tried:
            count = 0
        if count <= 0:
            trained = tuple(g for g in kept if not _masked(g, settings))
            return Gathered(trained, len(tried), tuple(tried), len(kept) - len(trained))
        groups = collector.roll_out(stream.take(count, step), settings.rollouts_per_prompt)
        groups = [_with_stop_penalty(group, settings) for group in groups]
        stream.observe(verdicts_of(groups))
        tried += groups
        kept += [
            g for g in groups if not settings.dynamic_filtering or is_informative_group(g, settings)
        ]


def verdicts_of(groups: Sequence[Group]) -> list[tuple[Prompt, list[Verdict]]]:
    """The prompt and the verdicts of each group, in order."""
    return [(g.task.prompt, [r.verdict for r in g.rollouts]) for g in groups]


def advantages_of(groups: Sequence[Group], rollout: RolloutConfig, grpo: GrpoConfig) -> list[Group]:
    """Copies of the groups with their advantages set."""
    found = []
    for group in groups:
        rewards, valid = group.rewards(rollout)
        advantage = group_advantages(rewards[None], valid[None], grpo)[0]
        found.append(replace(group, advantage=advantage))
    return found


def _with_stop_penalty(group: Group, settings: RolloutConfig) -> Group:
    """Scale the rewards of truncated rollouts; their own ones are kept in the verdicts' details."""
    coefficient = settings.stop_properly_penalty_coef
    if coefficient is None:
        return group
    rollouts = []
    for rollout in group.rollouts:
        verdict = rollout.verdict
        if rollout.truncated and verdict.reward is not None:
            details = {**verdict.details, UNTRUNCATED_REWARD: verdict.reward}
            verdict = replace(verdict, reward=coefficient * verdict.reward, details=details)
        rollouts.append(replace(rollout, verdict=verdict))
    return replace(group, rollouts=tuple(rollouts))


def _masked(group: Group, settings: RolloutConfig) -> bool:
    """True if no reward of the group is above `min_best_reward`."""
    if settings.min_best_reward is None:
        return False
    rewards = [r.verdict.reward for r in group.rollouts if r.verdict.reward is not None]
    return not any(reward > settings.min_best_reward for reward in rewards)


def is_informative_group(group: Group, settings: RolloutConfig) -> bool:
    """True if the group's rewards differ."""
    rewards, valid = group.rewards(settings)
    return bool(is_informative(rewards[None], valid[None])[0])
