"""Requests that arrive while the engine runs, from any thread, and the tokens of their answers."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from nemocascade.rollout.engine import Completion, Request, Sampling, Supply
from nemocascade.serving.echo import PromptScores, score_prompt
from nemocascade.serving.model import OpenModel

# Longest pause of the engine before it looks whether the job was asked to stop.
_WAIT_S = 0.5


class Sink(Protocol):
    """Receives an answer, in the engine's thread."""

    def token(self, token: int, logprob: float) -> None:
        """One more token."""

    def end(self, completion: Completion | None) -> None:
        """The whole answer; None if the engine ended before."""


class OpenRequests:
    """`Work` whose requests are submitted while the engine runs. Thread-safe."""

    is_ordered = False

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}
        self._new: list[int] = []
        self._cancelled: list[int] = []
        self._calls: list[Callable[[], object]] = []
        self._is_open = True
        self._changed = threading.Condition()

    def submit(self, request: Request) -> None:
        """Add a request. Raises RuntimeError after `close`."""
        with self._changed:
            if not self._is_open:
                raise RuntimeError("the engine has ended")
            self.requests[request.id] = request
            self._new.append(request.id)
            self._changed.notify()

    def call(self, work: Callable[[], object]) -> None:
        """Run `work` in the engine's thread, between two passes. Raises RuntimeError after
        `close`."""
        with self._changed:
            if not self._is_open:
                raise RuntimeError("the engine has ended")
            self._calls.append(work)
            self._changed.notify()

    def cancel(self, number: int) -> None:
        """Drop a request; nothing if it has finished."""
        with self._changed:
            if number in self._new:
                self._new.remove(number)
                del self.requests[number]
            elif number in self.requests:
                self._cancelled.append(number)
                self._changed.notify()

    def forget(self, number: int) -> None:
        """Free a finished request."""
        with self._changed:
            self.requests.pop(number, None)

    def close(self) -> None:
        """Let the engine end once it has answered what was submitted."""
        with self._changed:
            self._is_open = False
            self._changed.notify()

    def poll(self, free_slots: int, busy: int) -> Supply:
        """Implements `Work.poll`."""
        with self._changed:
            taken, self._new = self._new[: max(0, free_slots)], self._new[max(0, free_slots) :]
            cancelled, self._cancelled = self._cancelled, []
            for number in cancelled:
                self.requests.pop(number, None)
            return Supply(taken, cancelled, is_open=self._is_open or bool(self._new))

    def idle(self) -> None:
        """Implements `Work.idle`: wait for a request."""
        with self._changed:
            if self._is_open and not (self._new or self._cancelled or self._calls):
                self._changed.wait(_WAIT_S)

    def check(self) -> None:
        """Implements `Work.check`: run what was passed to `call`."""
        with self._changed:
            calls, self._calls = self._calls, []
        for work in calls:
            work()


class Answers:
    """Answers requests of other threads with one engine."""

    def __init__(self, model: OpenModel) -> None:
        self.model = model
        self._work = OpenRequests()
        self._sinks: dict[int, Sink] = {}
        self._futures: set[Future[PromptScores]] = set()
        self._numbers = itertools.count()

    def submit(self, prompt: Sequence[int], sampling: Sampling, draws: int, sink: Sink) -> int:
        """Start an answer; returns its number. draws: decides the random numbers, with the seed.

        Raises RuntimeError once the engine has ended.
        """
        number = next(self._numbers)
        self._sinks[number] = sink
        try:
            self._work.submit(Request(number, tuple(prompt), sampling, draws=draws))
        except RuntimeError:
            del self._sinks[number]
            raise
        return number

    def score(self, prompt: Sequence[int]) -> Future[PromptScores]:
        """Score the tokens of a prompt. Raises RuntimeError once the engine has ended, as the
        future does if it ends before."""
        future: Future[PromptScores] = Future()

        def work() -> None:
            # From here on, a client that has gone cannot cancel it.
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(score_prompt(self.model, prompt))
                # One prompt, such as one too long for the memory, does not end the server.
                except Exception as error:
                    future.set_exception(RuntimeError(f"the prompt cannot be scored: {error}"))
            self._futures.discard(future)

        self._futures.add(future)
        self._work.call(work)
        return future

    def cancel(self, number: int) -> None:
        """Stop an answer that nobody waits for; nothing if it has ended."""
        if self._sinks.pop(number, None) is not None:
            self._work.cancel(number)

    def close(self) -> None:
        """Accept no further request."""
        self._work.close()

    def run(self) -> None:
        """Answer until `close`, in the thread that calls it."""
        model = self.model
        try:
            for completion in model.engine.run(
                self._work, model.sampling, load=model.load, observe=self._observe
            ):
                number = completion.request.id
                self._work.forget(number)
                if sink := self._sinks.pop(number, None):
                    sink.end(completion)
        finally:
            self.close()
            for number in list(self._sinks):
                if sink := self._sinks.pop(number, None):
                    sink.end(None)
            for future in list(self._futures):
                if not future.done():
                    future.set_exception(RuntimeError("the engine has ended"))

    def _observe(
        self, ids: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float]
    ) -> None:
        for number, token, logprob in zip(ids, tokens, logprobs, strict=True):
            if sink := self._sinks.get(number):
                sink.token(token, logprob)
