"""Collects scored rollouts: generation and verification run concurrently.

The replicas take the rollouts from a queue, and the outcomes are shared. Every rank then has the
outcomes of all rollouts of a step, in the order of the tasks, on any parallel layout. Tokens and
texts stay on the rank that verified them, see `exchange`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.grpo import GrpoConfig
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.rl.advantages import group_advantages, is_informative, overlong_penalty
from nemocascade.rl.drawing import Drawing
from nemocascade.rl.episodes import Episodes
from nemocascade.rl.exchange import share_outcomes
from nemocascade.rl.journal import Journal, Journals, Kept
from nemocascade.rl.restoring import Restored
from nemocascade.rl.rollouts import Rollout
from nemocascade.rl.tasks import GroupRequest, Task
from nemocascade.rl.verification import (
    OnVerdict,
    Verification,
    score_apart,
    verifying_ranks,
)
from nemocascade.rl.work_queue import Queues, WorkQueue
from nemocascade.rollout.engine import Engine, Request, Sampling
from nemocascade.rollout.replies import home_of
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World
from nemocascade.types import Environment, Prompt, Verdict

UNTRUNCATED_REWARD = "reward_before_stop_penalty"
"""Name in a verdict's details of a truncated rollout's own reward."""
TIMES = ("generation_time_s", "verify_wait_s", "verify_time_s", "verdicts")
"""Names of `Collector.take_times`."""


@dataclass(frozen=True, eq=False)
class Group:
    """The rollouts of one task. advantage: [G] float64, set by `advantages_of`."""

    task: Task
    rollouts: tuple[Rollout, ...]
    advantage: Tensor | None = None

    def rewards(self, settings: RolloutConfig) -> tuple[Tensor, Tensor]:
        """Rewards minus the overlong penalty, float64, and their validity, bool; both [G]."""
        valid = torch.tensor([r.verdict.reward is not None for r in self.rollouts])
        rewards = [_penalized(r, settings) for r in self.rollouts]
        return torch.tensor(rewards, dtype=torch.float64), valid


@dataclass(frozen=True)
class Gathered:
    """The groups collected for a step.

    groups: those that train. drawn: number of tasks up to the last that decides. tried: the groups
    of all these. masked: number of groups that do not train because no reward is above
    `min_best_reward`. ahead: number of tasks that were started beyond these, in vain.
    """

    groups: tuple[Group, ...]
    drawn: int
    tried: tuple[Group, ...]
    masked: int = 0
    ahead: int = 0


class Collector:
    """Generates rollouts of the current policy and verifies them.

    threads: concurrent verifiers on each rank that verifies. journals: of the run; None keeps no
    journal. restored: number of rollouts that the last journal gave, see `journalled`.
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
        journals: Journals | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self.world, self.engine, self.tokenizer = world, engine, tokenizer
        self.journals, self.restored = journals, 0
        self._journal: Journal | None = None
        self.environments, self.settings, self.seed = environments, settings, seed
        self.threads = threads
        self.limits = limits or {}
        """Largest number of tokens in a response by domain of the stage; 0 = the stage's."""
        self.queues = Queues(world)
        self._times = dict.fromkeys(TIMES, 0.0)
        self.on_verdict: OnVerdict = lambda task, rollout: None
        """Called with every rollout as soon as it has its verdict, from a thread of the rank that
        verified it, or from its main thread after a collective verifier."""

    def limited(self, sampling: Sampling, domain: str) -> Sampling:
        """`sampling` with the domain's own limit on the length of a response, if it has one."""
        limit = self.limits.get(domain, 0)
        return replace(sampling, max_tokens=min(sampling.max_tokens, limit)) if limit else sampling

    def sampling(self) -> Sampling:
        """Sampling settings of the recipe; generation stops at the template's end of turn."""
        s = self.settings
        return Sampling(
            temperature=s.temperature,
            top_k=s.top_k,
            top_p=s.top_p,
            truncated_logprobs=s.truncated_logprobs,
            max_tokens=s.max_response_tokens,
            stop_tokens=self.tokenizer.stop_tokens,
            seed=self.seed,
        )

    @contextmanager
    def journalled(self, name: str) -> Iterator[None]:
        """Context manager: rollouts are appended to RUN/journal/`name` as they come, and those that
        it holds are not generated again."""
        self.restored = 0
        if self.journals is None:
            yield
            return
        with self.journals.opened(name) as self._journal:
            try:
                yield
            finally:
                self._journal = None

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
        wanted = self.requests(tasks, copies, sampling, compared=scored and compared)
        return self.roll_out_each(wanted, scored=scored, compared=compared)

    def roll_out_each(
        self, wanted: Sequence[GroupRequest], *, scored: bool = True, compared: bool = True
    ) -> list[Group]:
        """`roll_out` for groups that may differ in sampling and number, all in one pass."""
        groups = self.generate(wanted, scored=scored, compared=compared)
        return self._score_collectively(groups, compared) if scored else groups

    def requests(
        self,
        tasks: Sequence[Task],
        copies: int,
        sampling: Sampling | None = None,
        *,
        compared: bool = True,
    ) -> list[GroupRequest]:
        """Requests for `copies` rollouts of each task; their ids follow from the task's number.

        compared: verdicts may compare the rollouts of a task, as its domain says.
        """
        sampling = sampling or self.sampling()
        compared = compared and copies > 1
        found = []
        for task in tasks:
            environment = self.environments[task.prompt.domain]
            is_whole = compared and environment.by_group and not environment.collective
            ids = range(task.number * copies, (task.number + 1) * copies)
            how = self.limited(sampling, task.prompt.domain)
            found.append(GroupRequest(task, ids, how, is_whole))
        return found

    def generate(
        self,
        wanted: Sequence[GroupRequest],
        drawing: Drawing | None = None,
        *,
        scored: bool = True,
        compared: bool = True,
    ) -> list[Group]:
        """Generate groups in one pass, and score them except for collective verdicts, see
        `roll_out`; the same list on every rank.

        drawing: `wanted` are its candidates, and only the groups that it needs are returned. Raises
        StopAsked on every rank, within seconds, if the job is asked to stop.
        """
        world = self.world
        wanted = [
            replace(g, is_compared=self.environments[g.task.prompt.domain].by_group) for g in wanted
        ]
        restored = self._restored(wanted, drawing, scored=scored, compared=compared)
        queue = self.queues.open(
            wanted,
            drawing,
            restored=restored.ids,
            is_journalled=self.journals is not None,
        )
        with world.leaving_together():
            found = self._generate(queue, restored, scored, compared)
        world.watch.enter("rollout: exchange")
        numbers = [number for group in wanted for number in group.ids]
        outcomes = share_outcomes(world, numbers, found, partial=drawing is not None)
        groups = [
            Group(group.task, tuple(outcomes[number] for number in group.ids))
            for group in wanted
            if all(number in outcomes for number in group.ids)
        ]
        if drawing is not None:
            # Other ranks than the one that takes requests have not read the last verdicts.
            told = [_will_inform(group, self.settings) for group in groups]
            groups = groups[: drawing.first_enough(told)]
        lengths = {g.task.prompt.id: _mean_length(g) for g in groups}
        self.queues.close(queue, len(groups), lengths)
        return groups

    def _restored(
        self,
        wanted: Sequence[GroupRequest],
        drawing: Drawing | None,
        *,
        scored: bool,
        compared: bool,
    ) -> Restored:
        """The rollouts that the journal holds; `drawing` learns their verdicts."""
        journal, kept = self._journal, Kept()
        if journal is not None:
            kept = journal.kept(wanted, lambda r: decisive_reward(r, self.settings))
        restored = Restored(
            journal, kept, wanted, self.environments, scored=scored, compared=compared
        )
        if journal is not None and restored.ids:
            self.restored += len(restored.ids)
            asked = sum(len(group.ids) for group in wanted)
            LOGGER.info("%s: %d of %d rollouts restored", journal.folder, len(restored.ids), asked)
        if drawing is not None:
            for index, group in enumerate(wanted):
                for number in group.ids:
                    if number in restored.rewards:
                        drawing.report(index, restored.rewards[number])
        return restored

    def _generate(
        self, queue: WorkQueue, restored: Restored, scored: bool, compared: bool
    ) -> dict[int, Rollout]:
        """This rank's share of its replica's rollouts, by request id. Verification overlaps with
        generation unless the verifiers need all ranks."""
        by_id = {number: group.task for group in queue.groups for number in group.ids}

        def on_scored(number: int, rollout: Rollout) -> None:
            self.on_verdict(by_id[number], rollout)
            queue.report(number, decisive_reward(rollout, self.settings))

        episodes = Episodes(
            self.tokenizer, self.environments, self.settings, by_id, self.world.watch
        )
        verification = Verification(
            episodes,
            self.environments,
            self.tokenizer,
            by_id,
            groups={number: group.ids for group in queue.groups for number in group.ids},
            scored=scored,
            compared=compared,
            threads=self.threads,
            on_scored=on_scored,
            is_needed=queue.is_needed,
            journal=self._journal,
            restored=restored,
        )
        queue.verification = verification
        started = time.perf_counter()
        try:
            verification.restore()
            if not queue.is_empty:
                for completion in self.engine.run(queue, self.sampling(), episodes.respond):
                    episodes.close(completion.request.id)
                    if self._verifies(completion.request):
                        verification.add(completion)
            generated = time.perf_counter()
            self.world.watch.enter("rollout: verdicts")
            found = verification.rollouts(self.world)
            ended = time.perf_counter()
            self._add_times(generated - started, ended - generated, verification)
            return {n: rollout for n, rollout in found.items() if queue.is_needed(n)}
        except BaseException:
            verification.give_up()
            raise
        finally:
            # Otherwise a step's tensors would stay until the next garbage collection.
            queue.verification = None
            verification.close()
            episodes.close_all()

    def _add_times(self, generation_s: float, wait_s: float, verification: Verification) -> None:
        work = (verification.busy_s, verification.verdicts)
        for name, value in zip(TIMES, (generation_s, wait_s, *work), strict=True):
            self._times[name] += value
        for name, value in verification.busy_by_domain.items() if len(self.limits) > 1 else ():
            name = f"verify_time_s/{name}"
            self._times[name] = self._times.get(name, 0.0) + value

    def take_times(self) -> dict[str, float]:
        """On this rank since the last call: seconds of generation, of the wait for verdicts after
        it, and of all verdicts together, and the number of verdicts."""
        found, self._times = self._times, dict.fromkeys(TIMES, 0.0)
        return found

    @property
    def verifier_slots(self) -> int:
        """Number of concurrent verifiers of all ranks."""
        return self.threads * self.world.dp_size * verifying_ranks(self.world, self.engine)

    def _verifies(self, request: Request) -> bool:
        """True on the rank that verifies a completion: the one that answered its tool calls."""
        ranks = verifying_ranks(self.world, self.engine)
        return ranks == 1 or self.world.replica_rank == home_of(request, ranks)

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


def with_stop_penalty(rollout: Rollout, settings: RolloutConfig) -> Rollout:
    """Scale the reward of a truncated rollout; its own one is kept in the verdict's details."""
    coefficient, verdict = settings.stop_properly_penalty_coef, rollout.verdict
    if coefficient is None or not rollout.truncated or verdict.reward is None:
        return rollout
    details = {**verdict.details, UNTRUNCATED_REWARD: verdict.reward}
    verdict = replace(verdict, reward=coefficient * verdict.reward, details=details)
    return replace(rollout, verdict=verdict)


def decisive_reward(rollout: Rollout, settings: RolloutConfig) -> float | None:
    """The reward that a scored rollout has in its group, see `Group.rewards`; None without one."""
    if rollout.verdict.reward is None:
        return None
    return _penalized(with_stop_penalty(rollout, settings), settings)


def is_informative_group(group: Group, settings: RolloutConfig) -> bool:
    """True if the group's rewards differ."""
    rewards, valid = group.rewards(settings)
    return bool(is_informative(rewards[None], valid[None])[0])


def _will_inform(group: Group, settings: RolloutConfig) -> bool:
    """True if the rewards will differ once truncated rollouts are penalised."""
    return len({decisive_reward(r, settings) for r in group.rollouts} - {None}) > 1


def _penalized(rollout: Rollout, settings: RolloutConfig) -> float:
    """The reward minus the overlong penalty; without a reward, minus the penalty alone."""
    return (rollout.verdict.reward or 0.0) - overlong_penalty(rollout.length, settings)


def _mean_length(group: Group) -> float:
    return sum(rollout.length for rollout in group.rollouts) / len(group.rollouts)
