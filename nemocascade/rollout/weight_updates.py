"""Weight updates: after an optimizer step the servers get the new weights, and prove it.

One update: the servers pause, receive every tensor, drop what they cached under the old weights,
and resume; then each generates some tokens, whose log-probabilities are compared with the
trainer's. No rollout is requested before that has succeeded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nemocascade.recipe.server import RolloutServerConfig
from nemocascade.rollout.completions import PATH, drawn_ids, read_answer, request_body
from nemocascade.rollout.engine import Sampling
from nemocascade.rollout.server_calls import CALL_S, Calls, Failures
from nemocascade.rollout.servers import Server, ServerError, ServerPool
from nemocascade.rollout.transfer import Transfer
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.stopping import StopAsked
from nemocascade.runtime.world import World

PROBE_TOKENS = 64
PROBE_PROMPT = 256
"""Tokens of the probe's prompt at most: long enough that a server caches it."""
_ATTEMPTS = 2
_CALLS: dict[str, dict[str, tuple[str, ...]]] = {
    "vllm": {"pause": ("/pause?mode={mode}",), "resume": ("/reset_prefix_cache", "/resume")},
    "sglang": {
        "pause": ("/pause_generation",),
        "resume": ("/flush_cache", "/continue_generation"),
    },
}

Logprobs = Callable[[Tensor, int], Tensor]
"""Log-probabilities under the trainer's weights of a sequence's tokens [n] int64 after the first p,
[n - p] float32 on the host; every rank calls it with the same arguments."""


class WeightUpdates:
    """Keeps the servers of a pool on the weights of a live model. Every rank creates and calls it.

    sampling: of the rollouts. vocabulary, model_vocabulary: see `drawn_ids`. longest: most tokens
    of a sequence. alarm: largest difference of log-probabilities that passes. logprobs: the
    trainer's.

    After an update: seconds, by phase, and probe, the largest difference of log-probabilities.
    """

    def __init__(
        self,
        world: World,
        settings: RolloutServerConfig,
        transfer: Transfer,
        logprobs: Logprobs,
        *,
        sampling: Sampling,
        vocabulary: int,
        model_vocabulary: int,
        longest: int,
        alarm: float,
    ) -> None:
        self.world, self.settings, self.transfer = world, settings, transfer
        self.logprobs, self.alarm, self.vocabulary = logprobs, alarm, vocabulary
        self.max_tokens = max(1, min(PROBE_TOKENS, longest // 2))
        self.sampling = replace(
            sampling,
            top_p=1.0,
            top_k=0,
            stop_tokens=(),
            stop_strings=(),
            max_tokens=self.max_tokens,
        )
        length = max(1, min(PROBE_PROMPT, longest - self.max_tokens))
        generator = torch.Generator().manual_seed(0)
        self.prompt: list[int] = torch.randint(vocabulary, (length,), generator=generator).tolist()
        self.drawn = drawn_ids(vocabulary, model_vocabulary)
        self.calls = Calls(world)
        self.seconds: dict[str, float] = {}
        self.probe, self.updates = 0.0, 0

    def update(self, pool: ServerPool) -> None:
        """Bring the current weights to every server that answers; the others are excluded.

        Raises ServerError on every rank if no server has them, or if a server's log-probabilities
        differ from the trainer's after a second attempt; StopAsked if the job was asked to stop
        while it waits for servers.
        """
        watch = self.world.watch
        self.updates += 1
        for attempt in range(1, _ATTEMPTS + 1):
            watch.enter("rollout servers: who answers")
            keys = self.calls.main(lambda: pool.wait_for_first(self._waiting))
            failures = self._attempt(pool.use(keys))
            if not (failures.reasons or failures.alarms):
                return
            pool.count("failed_updates")
            LOGGER.warning(
                "weight update %d, attempt %d: %s", self.updates, attempt, failures.text()
            )
        good = {url: key for url, key in keys.items() if url not in failures.reasons}
        if failures.alarms or not good:
            raise ServerError(
                f"weight update {self.updates} failed {_ATTEMPTS} times: {failures.text()}"
            )
        pool.use(good)

    def _waiting(self, line: str) -> None:
        """Show that the main rank waits for servers; raises StopAsked if it should stop."""
        self.world.watch.progress(line)
        if self.world.stop.asked():
            raise StopAsked

    def close(self) -> None:
        """Free what the transfer holds."""
        self.transfer.close()

    def _attempt(self, servers: Sequence[Server]) -> Failures:
        """Make one update; returns its failures, the same on every rank."""
        watch, failures = self.world.watch, Failures()
        calls = _CALLS[self.settings.api]
        started = time.perf_counter()
        watch.enter("rollout servers: weights")
        self._call(servers, calls["pause"], failures)
        if not failures.reasons:
            self.transfer.send(servers, failures)
        # Also servers that failed: the next attempt starts from servers that run.
        self._call(servers, calls["resume"], failures)
        transferred = time.perf_counter()
        watch.enter("rollout servers: probe")
        self._probe(failures.without(servers), failures)
        self.seconds = {
            "weights_s": transferred - started,
            "probe_s": time.perf_counter() - transferred,
        }
        return failures

    def _call(self, servers: Sequence[Server], paths: Sequence[str], failures: Failures) -> None:
        def call(server: Server) -> None:
            for path in paths:
                server.call(path.format(mode=self.settings.pause), {}, CALL_S)

        self.calls.each(servers, call, failures)

    def _probe(self, servers: Sequence[Server], failures: Failures) -> None:
        """Compare the log-probabilities of tokens that each server generates with the trainer's."""
        answers: dict[str, tuple[list[int], list[float]]] = {}
        prompt, max_tokens, sampling = self.prompt, self.max_tokens, self.sampling
        name, timeout_s = self.settings.model, self.settings.update_timeout_s

        def ask(server: Server) -> None:
            body = request_body(name, prompt, max_tokens, sampling, number=0, drawn=self.drawn)
            reply = server.post(PATH, body, timeout_s)
            found = read_answer(reply, prompt, max_tokens, sampling, self.vocabulary)
            answers[server.url] = found.ids, found.logprobs

        self.calls.each(servers, ask, failures)
        self.probe = 0.0
        shared: dict[str, Any] = self.world.broadcast_object(answers)
        for url, (ids, theirs) in sorted(shared.items()):
            ours = self.logprobs(torch.tensor([*prompt, *ids]), len(prompt))
            # A NaN must not pass: it compares with nothing.
            largest = float((ours - torch.tensor(theirs)).abs().nan_to_num(torch.inf).max())
            self.probe = max(self.probe, largest)
            if largest > self.alarm:
                failures.alarms[url] = (
                    f"the log-probabilities of {len(ids)} tokens differ from the trainer's by up "
                    f"to {largest:.3g}, and rollout.server.probe_alarm is {self.alarm:g}"
                )
