"""Verification of completions, during or after generation.

A rollout is scored as soon as it is complete. Where verdicts are made by group, scoring waits for
the whole group, but the judge starts on early pairs. A collective verifier, which runs on all
ranks, waits until generation has finished.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

from torch import Tensor

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.rl.episodes import Episodes
from nemocascade.rl.tasks import Task
from nemocascade.rollout.engine import Completion
from nemocascade.runtime.watchdog import Watchdog
from nemocascade.runtime.world import World
from nemocascade.types import Environment, Message, Prompt, Verdict

THREADS = 8
"""Concurrent verifiers that use the CPU."""

_LOOK_S = 1.0
"""Interval in seconds for polling a judge's activity while waiting for verdicts."""

NOT_SCORED = Verdict(None, "not scored")
DROPPED = Verdict(None, "the rollout server gave this text up", fault="host")


@dataclass(frozen=True, eq=False)
class Rollout:
    """One scored rollout. Tensors are those of its `Completion`: [n], including the prompt.

    dropped: a server gave the text up, so it is neither compared with others nor trained.
    """

    tokens: Tensor
    written: Tensor
    logprob: Tensor
    prompt_tokens: int
    truncated: bool
    turns: int
    text: str
    verdict: Verdict
    response: tuple[Message, ...] = ()
    dropped: bool = False
    routing: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens that the policy generated."""
        return int(self.written.sum())


OnVerdict = Callable[[Task, Rollout], object]
"""Takes a scored rollout of a task."""


class Verification:
    """Scores the rollouts of one generation on this rank in a thread pool.

    tasks: by request id; `copies` requests share one task. scored: False skips verification.
    compared: False scores each rollout by itself, also in domains with verdicts by group.
    on_verdict: called with every rollout once it has its verdict, from the thread that scored it.
    """

    def __init__(
        self,
        episodes: Episodes,
        environments: Mapping[str, Environment],
        tokenizer: Tokenizer,
        tasks: Mapping[int, Task],
        *,
        copies: int,
        scored: bool,
        compared: bool,
        threads: int,
        on_verdict: OnVerdict = lambda task, rollout: None,
    ) -> None:
        self.on_verdict = on_verdict
        self.episodes, self.environments, self.tokenizer = episodes, environments, tokenizer
        self.tasks, self.copies, self.scored = tasks, copies, scored
        self.compared = compared
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="verify")
        self._futures: list[Future[None]] = []
        self._rollouts: dict[int, Rollout] = {}
        self._lock = Lock()
        self._wait = True

    def add(self, completion: Completion) -> None:
        """Submit a completion for scoring; returns at once."""
        self._futures.append(self._pool.submit(self._finish, completion))

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

    def _finish(self, completion: Completion) -> None:
        """Parse a response and score it, or score its group if it completes that group."""
        number = completion.request.id
        task = self.tasks[number]
        environment = self.environments[task.prompt.domain]
        response = self.episodes.response(completion)
        later = environment.collective or not self.scored
        by_group = environment.by_group and self.compared
        rollout = self._read(completion, response)
        if rollout.dropped:
            rollout = replace(rollout, verdict=DROPPED)
        elif not later and not by_group:
            verdict = self.episodes.host_failure(number) or environment.score(task.prompt, response)
            rollout = replace(rollout, verdict=verdict)
        with self._lock:
            self._rollouts[number] = rollout
            first = task.number * self.copies
            group = [self._rollouts.get(n) for n in range(first, first + self.copies)]
        if later:
            return
        if not by_group:
            self.on_verdict(task, rollout)
            return
        written = {i: r.response for i, r in enumerate(group) if r is not None and not r.dropped}
        if None in group:
            if not rollout.dropped:
                environment.begin_group(task.prompt, written, number - first)
            return
        (verdicts,) = environment.score_groups([(task.prompt, list(written.values()))])
        with self._lock:
            for i, verdict in zip(written, verdicts, strict=True):
                n = first + i
                self._rollouts[n] = replace(self._rollouts[n], verdict=verdict)
            scored = [self._rollouts[n] for n in range(first, first + self.copies)]
        for member in scored:
            self.on_verdict(task, member)

    def _read(self, completion: Completion, response: Sequence[Message]) -> Rollout:
        return Rollout(
            tokens=completion.tokens,
            written=completion.written,
            logprob=completion.logprob,
            prompt_tokens=len(completion.request.prompt),
            truncated=completion.finish == "length",
            turns=completion.turns,
            text=self.tokenizer.decode(completion.response),
            verdict=NOT_SCORED,
            response=tuple(response),
            dropped=completion.finish == "abort",
            routing=completion.routing,
        )


def verifier_threads(judge: JudgeConfig) -> int:
    """Concurrent verifiers on a rank: more for a judge server, since waiting uses no CPU."""
    return max(THREADS, judge.concurrency) if judge.kind == "server" else THREADS


def shows(world: World) -> bool:
    """True on the one rank of each replica that verifies."""
    return world.tp_rank == 0 and world.is_first_stage


def score_after(
    world: World,
    environment: Environment,
    groups: Sequence[tuple[Prompt, Sequence[Sequence[Message]]]],
) -> list[list[Verdict]]:
    """Verdicts on groups that every rank knows, outside generation; the same on every rank.

    Every rank calls it. Groups are sharded over data-parallel ranks unless the verifier is
    collective.
    """
    if environment.collective:
        return environment.score_groups(groups)
    mine: dict[int, list[Verdict]] = {}
    if shows(world):
        numbers = range(world.replica_rank, len(groups), world.num_replicas)
        with ThreadPoolExecutor(1, thread_name_prefix="verify") as pool:
            found = pool.submit(environment.score_groups, [groups[n] for n in numbers])
            _wait_for([found], [environment], world.watch, "calls of a verifier")
        mine = dict(zip(numbers, found.result(), strict=True))
    everything: dict[int, list[Verdict]] = {}
    world.watch.meet()
    for part in world.all_gather_object(mine):
        everything |= part
    return [everything[n] for n in range(len(groups))]


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
