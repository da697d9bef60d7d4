"""Verification of completions, during or after generation.

A rollout is scored as soon as it is complete. Where verdicts are made by group, scoring waits for
the whole group, but the judge starts on early pairs. A collective verifier, which runs on all
ranks, waits until generation has finished.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from threading import Lock
from typing import Any

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe import EnvConfig
from nemocascade.rl.episodes import Episodes
from nemocascade.rl.exchange import send_objects, send_transcripts, share_outcomes
from nemocascade.rl.journal import Journal
from nemocascade.rl.restoring import Restored
from nemocascade.rl.rollouts import DROPPED, NOT_SCORED, Rollout, TokenSequence, whole_rollout
from nemocascade.rl.tasks import Task
from nemocascade.rollout.engine import Completion, Engine
from nemocascade.rollout.replies import mixed
from nemocascade.runtime.ray_cluster import program_slots
from nemocascade.runtime.stopping import StopAsked
from nemocascade.runtime.world import World
from nemocascade.types import Environment, Message, Prompt, Verdict

_POLL_S = 1.0
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
    journal: rollouts and verdicts are appended to it. restored: rollouts that it had before.
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
        journal: Journal | None = None,
        restored: Restored | None = None,
    ) -> None:
        self.on_scored, self.is_needed = on_scored, is_needed
        self.journal, self.restored = journal, restored
        self.episodes, self.environments, self.tokenizer = episodes, environments, tokenizer
        self.tasks, self.groups, self.scored = tasks, groups, scored
        self.compared = compared
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        # Rollouts are kept while all verifiers are busy.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read")
        self._loads: list[Future[None]] = []
        self._futures: list[Future[None]] = []
        self._rollouts: dict[int, Rollout] = {}
        self._lock = Lock()
        self._wait = True
        self._failure: BaseException | None = None
        self._ended = 0
        self.busy_s = 0.0
        """Seconds of all verdicts so far, those of groups included."""
        self.busy_by_domain: dict[str, float] = {}

    @property
    def pending(self) -> int:
        """Number of completions that are not scored yet."""
        return len(self._futures) - self._ended

    @property
    def verdicts(self) -> int:
        """Number of rollouts that are scored, or need no score."""
        return len(self._rollouts)

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
        self._submit(self._reader, self._finish, completion)

    def restore(self) -> None:
        """Submit this rank's share of the restored rollouts; returns at once."""
        if self.restored is None:
            return
        for number in filter(self.restored.is_mine, self.restored.complete):
            self._loads.append(self._submit(self._reader, self._restore, number))
        for number in filter(self.restored.is_mine, self.restored.unscored):
            self._submit(self._pool, self._verify, number)
        for ids in self.restored.groups:
            if self.restored.is_mine(ids[0]):
                self._submit(self._pool, self._verify_group, ids)

    def rollouts(self, world: World) -> dict[int, Rollout]:
        """Wait for all verdicts and return the rollouts by request id. Raises StopAsked if the job
        is asked to stop meanwhile."""
        # A rollout that has been read is submitted for its verdict.
        while open_ := [future for future in self._futures if not future.done()]:
            _wait_for(open_, self.environments.values(), world, "texts and verdicts")
        for future in self._futures:
            future.result()
        return self._rollouts

    def give_up(self) -> None:
        """Skip the wait for verdicts in `close`: the stage ends, and nobody reads them."""
        self._wait = False
        for load in self._loads:
            load.cancel()

    def close(self) -> None:
        """Stop the threads once their current work is done. What has been generated is read first,
        so that the journal has it."""
        self._reader.shutdown(wait=self._wait or self.journal is not None)
        self._pool.shutdown(wait=self._wait, cancel_futures=True)

    def _submit(
        self, pool: ThreadPoolExecutor, work: Callable[..., None], *about: Any
    ) -> Future[None]:
        future = pool.submit(self._timed, work, *about)
        self._futures.append(future)
        future.add_done_callback(self._end)
        return future

    def _timed(self, work: Callable[..., None], *about: Any) -> None:
        started = time.perf_counter()
        try:
            work(*about)
        finally:
            seconds = time.perf_counter() - started
            domain = self.tasks[_first_id(about[0])].prompt.domain
            with self._lock:
                self.busy_s += seconds
                self.busy_by_domain[domain] = self.busy_by_domain.get(domain, 0.0) + seconds

    def _end(self, future: Future[None]) -> None:
        with self._lock:
            self._ended += 1
            if not future.cancelled():
                self._failure = self._failure or future.exception()

    def _finish(self, completion: Completion) -> None:
        """Parse a response, keep it, and submit it for scoring."""
        number = completion.request.id
        if not self.is_needed(number):
            return
        verdict = NOT_SCORED
        if completion.finish == "abort":
            verdict = DROPPED
        elif self._is_alone(number):
            verdict = self.episodes.host_failure(number) or NOT_SCORED
        rollout = self._read(completion, self.episodes.response(completion), verdict)
        has_failed = self.episodes.host_failure(number) is not None
        if self.journal is not None and verdict is NOT_SCORED and not has_failed:
            self.journal.add(number, rollout)
        self._submit(self._pool, self._score, number, rollout)

    def _is_alone(self, number: int) -> bool:
        """True if a rollout is scored as soon as it is complete, and by itself."""
        environment = self.environments[self.tasks[number].prompt.domain]
        is_compared = environment.by_group and self.compared
        return self.scored and not environment.collective and not is_compared

    def _score(self, number: int, rollout: Rollout) -> None:
        """Score a complete rollout, or its group if it completes that group."""
        if not self.is_needed(number):
            return
        task = self.tasks[number]
        environment = self.environments[task.prompt.domain]
        is_alone = self._is_alone(number)
        if is_alone and rollout.verdict is NOT_SCORED:
            verdict = environment.score(task.prompt, list(rollout.response))
            rollout = rollout.scored(verdict, task.prompt.domain)
            if self.journal is not None:
                self.journal.add_verdict(number, rollout)
        ids = self.groups[number]
        waiting = self._waiting(ids)
        with self._lock:
            for n, member in waiting.items():
                self._rollouts.setdefault(n, member)
            self._rollouts[number] = rollout
            group = [self._rollouts.get(n) for n in ids]
        if environment.collective or not self.scored:
            return
        if is_alone:
            self.on_scored(number, rollout)
        elif None not in group:
            self._score_group(ids)
        elif not rollout.dropped:
            others = ((i, r) for i, r in enumerate(group) if r is not None)
            written = {i: r.response for i, r in others if not r.dropped}
            environment.begin_group(task.prompt, written, ids.index(number))

    def _score_group(self, ids: Sequence[int]) -> None:
        """Score the complete rollouts of a group."""
        prompt = self.tasks[ids[0]].prompt
        with self._lock:
            group = {n: self._rollouts[n] for n in ids}
        written = {n: r.response for n, r in group.items() if not r.dropped}
        environment = self.environments[prompt.domain]
        (verdicts,) = environment.score_groups([(prompt, list(written.values()))])
        for n, verdict in zip(written, verdicts, strict=True):
            group[n] = group[n].scored(verdict, prompt.domain)
            if self.journal is not None:
                self.journal.add_verdict(n, group[n])
        with self._lock:
            self._rollouts |= group
        for n, member in group.items():
            self.on_scored(n, member)

    def _waiting(self, ids: Sequence[int]) -> dict[int, Rollout]:
        """The restored rollouts of a group that wait for the others."""
        if self.restored is None:
            return {}
        missing = [n for n in ids if n in self.restored.partial and n not in self._rollouts]
        return {n: self.restored.load(n) for n in missing}

    def _restore(self, number: int) -> None:
        """Take a restored rollout that needs nothing more."""
        assert self.restored is not None
        rollout = self.restored.load(number)
        with self._lock:
            self._rollouts[number] = rollout

    def _verify(self, number: int) -> None:
        """Score a restored rollout by itself."""
        self._restore(number)
        self._score(number, self._rollouts[number])

    def _verify_group(self, ids: Sequence[int]) -> None:
        """Score the restored rollouts of a group."""
        if self.is_needed(ids[0]):
            for number in ids:
                self._restore(number)
            self._score_group(ids)

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
    """Settings of a rank's verifiers: the ranks of a replica share its requests to a judge, and
    all that verify share the slots of Ray's nodes. Raises SandboxUnavailable without these."""
    sharing = verifying_ranks(world, engine)
    concurrency = -(-envs.judge.concurrency // sharing)
    sandbox = envs.sandbox
    if sandbox.workers == "ray":
        programs = program_slots(sandbox, sharing * len(world.replicas()))
        sandbox = replace(sandbox, ray=replace(sandbox.ray, programs=programs))
    return replace(envs, judge=replace(envs.judge, concurrency=concurrency), sandbox=sandbox)


def verifier_threads(envs: EnvConfig) -> int:
    """Concurrent verifiers on a rank: as many as its sandbox runs programs, and more for a judge
    server, since waiting uses no CPU. envs: from `rank_envs`."""
    slots = program_slots(envs.sandbox)
    return max(slots, envs.judge.concurrency) if envs.judge.kind == "server" else slots


def judging_rank(replicas: Sequence[Sequence[int]], number: int) -> int:
    """The rank that judges the group of task `number` outside generation: usually the one that
    verified it. replicas: see `World.replicas`."""
    ranks = replicas[number % len(replicas)]
    return ranks[mixed(number, len(ranks))]


def _first_id(about: int | Sequence[int] | Completion) -> int:
    """Id of the first request that a job is about."""
    if isinstance(about, Completion):
        return about.request.id
    return about if isinstance(about, int) else about[0]


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
    with world.leaving_together():
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
    pool = ThreadPoolExecutor(1, thread_name_prefix="verify")
    try:
        found = pool.submit(environment.score_groups, groups)
        _wait_for([found], [environment], world, "calls of a verifier")
        return found.result()
    finally:
        pool.shutdown(wait=False)


def _wait_for(
    futures: Sequence[Future[Any]],
    environments: Collection[Environment],
    world: World,
    what: str,
) -> None:
    """Wait for all futures. A finished future or judge activity counts as progress. Raises
    StopAsked if the job is asked to stop."""
    open_, before = set(futures), -1
    while open_:
        if world.stop.asked():
            raise StopAsked
        ended, open_ = wait(open_, timeout=_POLL_S, return_when=FIRST_COMPLETED)
        activity = sum(e.activity for e in environments)
        if ended or activity != before:
            world.watch.progress(f"{len(futures) - len(open_)} of {len(futures)} {what}")
            before = activity
