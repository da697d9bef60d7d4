"""Collects scored rollouts: generation and verification run concurrently.

Tasks are sharded over the data-parallel ranks and the outcomes are shared. Every rank then has the
outcomes of all rollouts of a step, in the order of the tasks, on any parallel layout. Tokens and
texts stay on the rank that verified them, see `exchange`.
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
from nemocascade.rl.exchange import share_outcomes
from nemocascade.rl.rollouts import Rollout
from nemocascade.rl.tasks import Task, TaskStream
from nemocascade.rl.verification import (
    OnVerdict,
    Verification,
    score_apart,
    verifying_ranks,
)
from nemocascade.rollout.engine import Engine, Request, Sampling
from nemocascade.rollout.replies import home_of
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

    threads: concurrent verifiers on each rank that verifies.
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
        threads: int,
    ) -> None:
        self.world, self.engine, self.tokenizer = world, engine, tokenizer
        self.environments, self.settings, self.seed = environments, settings, seed
        self.threads = threads
        self.on_verdict: OnVerdict = lambda task, rollout: None
        """Called with every rollout as soon as it has its verdict, from a thread of the rank that
        verified it, or from its main thread after a collective verifier."""

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
        """Generate and score `copies` rollouts of each task, in order; the same outcomes on every
        rank.

        Sampling depends on the seed, the task's number and the copy, not on the ranks.
        scored: False skips verification. compared: False scores each rollout by itself, also in
        domains whose verdicts compare the rollouts of a group.
        """
        world = self.world
        mine = tasks[world.dp_rank :: world.dp_size]
        by_id = {task.number * copies + copy: task for task in mine for copy in range(copies)}
        numbers = [task.number * copies + copy for task in tasks for copy in range(copies)]
        found = self._generate(by_id, copies, sampling or self.sampling(), scored, compared)
        world.watch.enter("rollout: exchange")
        outcomes = iter(share_outcomes(world, numbers, found))
        groups = [Group(task, tuple(itertools.islice(outcomes, copies))) for task in tasks]
        return self._score_collectively(groups, compared) if scored else groups

    def _generate(
        self,
        by_id: Mapping[int, Task],
        copies: int,
        sampling: Sampling,
        scored: bool,
        compared: bool,
    ) -> dict[int, Rollout]:
        """This rank's share of its replica's rollouts, by request id. Verification overlaps with
        generation unless the verifiers need all ranks."""
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
        prompts = {task.number: tuple(task.ids.tolist()) for task in by_id.values()}
        requests = [Request(number, prompts[task.number]) for number, task in by_id.items()]
        try:
            for completion in self.engine.run(requests, sampling, episodes.respond):
                episodes.close(completion.request.id)
                if self._verifies(completion.request.id, by_id[completion.request.id]):
                    verification.add(completion)
            self.world.watch.enter("rollout: verdicts")
            return verification.rollouts(self.world.watch)
        except BaseException:
            verification.give_up()
            raise
        finally:
            verification.close()
            episodes.close_all()

    @property
    def verifier_slots(self) -> int:
        """Number of concurrent verifiers of all ranks."""
        return self.threads * self.world.dp_size * verifying_ranks(self.world, self.engine)

    def _verifies(self, number: int, task: Task) -> bool:
        """True on the rank that verifies a completion: the one that answered its tool calls, or one
        rank for all rollouts of a task that are compared."""
        ranks = verifying_ranks(self.world, self.engine)
        compared = self.environments[task.prompt.domain].by_group
        return ranks == 1 or self.world.replica_rank == home_of(
            task.number if compared else number, ranks
        )

    def _score_collectively(self, groups: Sequence[Group], compared: bool) -> list[Group]:
        """Add the verdicts of collective verifiers, which run on all ranks at once."""
        scored = list(groups)
        for name, environment in self.environments.items():
            chosen = [k for k, g in enumerate(groups) if g.task.prompt.domain == name]
            if not environment.collective or not chosen:
                continue
            self.world.watch.enter("rollout: judge")
            asked = [
                (k, i) for k in chosen for i, r in enumerate(groups[k].rollouts) if not r.dropped
            ]
            parts = [[(k, i)] for k, i in asked]
            if compared:
                parts = [list(part) for _, part in itertools.groupby(asked, key=lambda a: a[0])]
            found = score_apart(
                self.world,
                environment,
                [
                    (task.number, task.prompt, [groups[k].rollouts[i] for k, i in part])
                    for part in parts
                    for task in [groups[part[0][0]].task]
                ],
            )
            judged = dict(zip(asked, itertools.chain(*found), strict=True))
            for k in chosen:
                rollouts = tuple(judged.get((k, i), r) for i, r in enumerate(groups[k].rollouts))
                scored[k] = replace(groups[k], rollouts=rollouts)
                for rollout in rollouts:
                    if rollout.transcript is not None:
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
