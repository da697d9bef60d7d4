"""Verification of completions, during or after generation.

A rollout is scored as soon as it is complete. Where verdicts are made by group, scoring waits for
the whole group, but the judge starts on early pairs. A collective verifier, which runs on all
ranks, waits until generation has finished.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Lock
from typing import Any

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe import EnvConfig
from nemocascade.rl.episodes import Episodes
from nemocascade.rl.exchange import send_objects, send_transcripts, share_outcomes
from nemocascade.rl.rollouts import DROPPED, NOT_SCORED, Rollout, TokenSequence, whole_rollout
from nemocascade.rl.tasks import Task
from nemocascade.rollout.engine import Completion, Engine
from nemocascade.rollout.replies import home_of
from nemocascade.runtime.cores import slots_of_rank
from nemocascade.runtime.watchdog import Watchdog
from nemocascade.runtime.world import World
from nemocascade.types import Environment, Message, Prompt, Verdict

_LOOK_S = 1.0
"""Interval in seconds for polling a judge's activity while waiting for verdicts."""

OnVerdict = Callable[[Task, Rollout], object]
"""Takes a scored rollout of a task."""
OnScored = Callable[[int, Rollout], object]
"""Takes a scored rollout, with the id of its request."""


class Verification:
    """Scores the rollouts of one generation on this rank in a thread pool.

    tasks: by request id. groups: ids of the requests of the same task, by request id. scored: False
    skips verification. compared: False scores each rollout by itself, also in domains with verdicts
    by group. on_scored: called with every rollout once it has its verdict, from the thread that
    scored it. is_needed: False for a request whose rollout is not scored, because it was cancelled.
    """

    def __init__(
        self,
        episodes: Episodes,
        environments: Mapping[str, Environment],
        tokenizer: Tokenizer,
        tasks: Mapping[int, Task],
        *,
        groups: Mapping[int, range],
        scored: bool,
        compared: bool,
        threads: int,
        on_scored: OnScored = lambda number, rollout: None,
        is_needed: Callable[[int], bool] = lambda number: True,
    ) -> None:
        self.on_scored, self.is_needed = on_scored, is_needed
        self.episodes, self.environments, self.tokenizer = episodes, environments, tokenizer
        self.tasks, self.groups, self.scored = tasks, groups, scored
        self.compared = compared
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        self._futures: list[Future[None]] = []
        self._rollouts: dict[int, Rollout] = {}
        self._lock = Lock()
        self._wait = True
        self._failure: BaseException | None = None
        self._ended = 0

    @property
    def pending(self) -> int:
        """Number of completions that are not scored yet."""
        return len(self._futures) - self._ended

    @property
    def activity(self) -> int:
        """Counts what the judges do, see `Environment.activity`."""
        return sum(environment.activity for environment in self.environments.values())

    def check(self) -> None:
        """Raise the error of a verifier that has failed."""
        if self._failure is not None:
            raise self._failure

    def add(self, completion: Completion) -> None:
        """Submit a completion for scoring; returns at once."""
        future = self._pool.submit(self._finish, completion)
        self._futures.append(future)
        future.add_done_callback(self._end)

    def rollouts(self, watch: Watchdog) -> dict[int, Rollout]:
        """Wait for all verdicts and return the rollouts by request id."""
        _wait_for(self._futures, self.environments.values(), watch, "verdicts")
        for future in self._futures:
            future.result()
        return self._rollouts

    def give_up(self) -> None:
        """Skip the wait in `close`: the stage has failed, and nobody reads the verdicts."""
        self._wait = False

    def close(self) -> None:
        """Stop the threads once their current work is done."""
        self._pool.shutdown(wait=self._wait, cancel_futures=True)

    def _end(self, future: Future[None]) -> None:
        with self._lock:
            self._ended += 1
            if not future.cancelled():
                self._failure = self._failure or future.exception()

    def _finish(self, completion: Completion) -> None:
        """Parse a response and score it, or score its group if it completes that group."""
        number = completion.request.id
        if not self.is_needed(number):
            return
        task = self.tasks[number]
        environment = self.environments[task.prompt.domain]
        response = self.episodes.response(completion)
        later = environment.collective or not self.scored
        by_group = environment.by_group and self.compared
        verdict = NOT_SCORED
        if completion.finish == "abort":
            verdict = DROPPED
        elif not later and not by_group:
            verdict = self.episodes.host_failure(number) or environment.score(task.prompt, response)
        rollout = self._read(completion, response, verdict)
        with self._lock:
            self._rollouts[number] = rollout
            ids = self.groups[number]
            group = [self._rollouts.get(n) for n in ids]
        if later:
            return
        if not by_group:
            self.on_scored(number, rollout)
            return
        written = {i: r.response for i, r in enumerate(group) if r is not None and not r.dropped}
        if None in group:
            if not rollout.dropped:
                environment.begin_group(task.prompt, written, ids.index(number))
            return
        (verdicts,) = environment.score_groups([(task.prompt, list(written.values()))])
        with self._lock:
            for i, verdict in zip(written, verdicts, strict=True):
                n = ids[i]
                self._rollouts[n] = self._rollouts[n].scored(verdict, task.prompt.domain)
            scored = [(n, self._rollouts[n]) for n in ids]
        for n, member in scored:
            self.on_scored(n, member)

    def _read(
        self, completion: Completion, response: Sequence[Message], verdict: Verdict
    ) -> Rollout:
        return whole_rollout(
            TokenSequence(
                completion.tokens, completion.written, completion.logprob, completion.routing
            ),
            verdict,
            domain=self.tasks[completion.request.id].prompt.domain,
            text=self.tokenizer.decode(completion.response),
            response=tuple(response),
            turns=completion.turns,
            truncated=completion.finish == "length",
            dropped=completion.finish == "abort",
        )


def verifying_ranks(world: World, engine: Engine) -> int:
    """Number of ranks of a replica that verify: those that get its completions."""
    return world.replica_size if engine.is_shared else 1


def rank_envs(envs: EnvConfig, world: World, engine: Engine) -> EnvConfig:
    """Settings of a rank's verifiers: the ranks of a replica share its requests to a judge."""
    concurrency = -(-envs.judge.concurrency // verifying_ranks(world, engine))
    return replace(envs, judge=replace(envs.judge, concurrency=concurrency))


def verifier_threads(envs: EnvConfig) -> int:
    """Concurrent verifiers on a rank: as many as its sandbox runs programs, and more for a judge
    server, since waiting uses no CPU. envs: from `rank_envs`."""
    slots = slots_of_rank(envs.sandbox.workers)
    return max(slots, envs.judge.concurrency) if envs.judge.kind == "server" else slots


def judging_rank(replicas: Sequence[Sequence[int]], number: int) -> int:
    """The rank that judges the group of task `number` outside generation: usually the one that
    verified it. replicas: see `World.replicas`."""
    ranks = replicas[number % len(replicas)]
    return ranks[home_of(number, len(ranks))]


def score_apart(
    world: World,
    environment: Environment,
    groups: Sequence[tuple[int, Prompt, Sequence[Rollout]]],
) -> list[list[Rollout]]:
    """The rollouts of groups with their verdicts, outside generation; every rank calls it.

    groups: number, prompt and outcomes of each. `judging_rank` judges a group; its prompt matters
    on that rank only.
    """
    replicas = world.replicas()
    rollouts = [r for _, _, group in groups for r in group]
    at = [judging_rank(replicas, number) for number, _, group in groups for _ in group]
    texts = send_transcripts(world, rollouts, [[rank] for rank in at])
    asked: list[tuple[Prompt, Sequence[Sequence[Message]]]] = []
    places = iter(range(len(rollouts)))
    for _, prompt, group in groups:
        mine = [texts[k].response for k in itertools.islice(places, len(group)) if k in texts]
        if mine:
            asked.append((prompt, mine))
    verdicts = iter(itertools.chain(*_scored(world, environment, asked)))
    made = {k: next(verdicts) for k in texts}
    back = send_objects(world, at, made, [[r.owner] for r in rollouts])
    own = {k: r.scored(back[k], environment.domain) for k, r in enumerate(rollouts) if k in back}
    outcomes = iter(share_outcomes(world, range(len(rollouts)), own).values())
    return [list(itertools.islice(outcomes, len(group))) for _, _, group in groups]


def _scored(
    world: World,
    environment: Environment,
    groups: Sequence[tuple[Prompt, Sequence[Sequence[Message]]]],
) -> list[list[Verdict]]:
    """Verdicts on this rank's groups. A collective verifier runs on every rank, and generates in
    the main thread."""
    if environment.collective:
        return environment.score_groups(groups)
    with ThreadPoolExecutor(1, thread_name_prefix="verify") as pool:
        found = pool.submit(environment.score_groups, groups)
        _wait_for([found], [environment], world.watch, "calls of a verifier")
    return found.result()


def _wait_for(
    futures: Sequence[Future[Any]],
    environments: Collection[Environment],
    watch: Watchdog,
    what: str,
) -> None:
    """Wait for all futures. A finished future or judge activity counts as progress."""
    open_, before = set(futures), -1
    while open_:
        ended, open_ = wait(open_, timeout=_LOOK_S, return_when=FIRST_COMPLETED)
        activity = sum(e.activity for e in environments)
        if ended or activity != before:
            watch.progress(f"{len(futures) - len(open_)} of {len(futures)} {what}")
            before = activity
