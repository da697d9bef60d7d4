"""The interface of engines: `Sampling`, `Request`, `Work`, `Completion`, `Engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

Finish = Literal["stop", "length", "abort"]
"""Why a rollout ended: a stop sequence, `max_tokens`, or a server that gave it up. A text that was
given up has no verdict and does not train."""


COLDEST, HOTTEST = 1e-4, 1e4
"""Smallest and largest temperature: logits divided by it stay finite in float32."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings.

    temperature: divides the logits; 0 is greedy decoding, otherwise within COLDEST..HOTTEST.
    top_k: keep only the k most probable tokens; 0 keeps all.
    top_p: of those, renormalised, keep the fewest whose probabilities sum to at least this.
    truncated_logprobs: report log-probabilities of what top_k and top_p leave, renormalised.
    max_tokens: limit on tokens after the prompt, including the environment's.
    stop_tokens: sequences of token ids; generation stops when a turn ends with one of them.
    stop_strings: the same for the decoded text. A stop sequence remains part of the rollout.
    seed: decides every draw, together with the request's id and the token's position.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    truncated_logprobs: bool = False
    max_tokens: int = 1024
    stop_tokens: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if self.temperature and not COLDEST <= self.temperature <= HOTTEST:
            faults.append(
                f"temperature({self.temperature}) must be 0, which is greedy, or in "
                f"{COLDEST}..{HOTTEST}"
            )
        if self.top_k < 0:
            faults.append(f"top_k({self.top_k}) must be at least 0, and 0 is all")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p({self.top_p}) must be in (0, 1], and 1 is all")
        if self.max_tokens < 1:
            faults.append(f"max_tokens({self.max_tokens}) must be at least 1")
        if any(not s for s in (*self.stop_tokens, *self.stop_strings)):
            faults.append("an empty stop sequence would stop before the first token")
        if faults:
            raise ValueError("sampling: " + "; ".join(faults))

    @property
    def rule(self) -> Sampling:
        """The settings that are equal for sequences whose tokens are drawn together."""
        return replace(self, max_tokens=1, seed=0)


@dataclass(frozen=True)
class Request:
    """A prompt to be continued.

    id: unique among the requests of a run; with the seed it decides the random numbers.
    prompt: token ids, at least one. Consecutive requests with the same prompt share its prefill.
    sampling: how it is continued; None: by the settings of the run. home: requests with the same
    number have their tools, and their verifier, on one rank of a replica; None: the id. draws: in
    place of the id, decides the random numbers.
    """

    id: int
    prompt: tuple[int, ...]
    sampling: Sampling | None = None
    home: int | None = None
    draws: int | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"request {self.id} has an empty prompt: it needs at least one token")


class Supply(NamedTuple):
    """The answer of `Work.poll`.

    taken: ids of requests to start, in order. cancelled: ids of requests, taken before, that nobody
    needs any longer. is_open: False once there is nothing left to take or to cancel.
    """

    taken: Sequence[int] = ()
    cancelled: Sequence[int] = ()
    is_open: bool = False


class Work(Protocol):
    """Requests that an engine takes as its slots become free, and that may be cancelled."""

    @property
    def requests(self) -> Mapping[int, Request]:
        """Every request that may be taken, by id; the same on every rank."""

    @property
    def is_ordered(self) -> bool:
        """True if what is taken, and when, follows from the requests alone. Prompts may then be
        prefilled together without making results depend on timing."""

    def poll(self, free_slots: int, busy: int) -> Supply:
        """Return requests for so many free slots, without waiting for any.

        The first rank of a replica calls it, or all of its ranks if the work is ordered.
        busy: number of requests that were taken and have not finished. More than `free_slots`
        may be returned; they then wait for a slot.
        """

    def idle(self) -> None:
        """Called by every rank of a replica each time that nothing is left to generate."""

    def check(self) -> None:
        """Called by every rank before a poll: raise what has failed on this rank meanwhile."""


class RequestList:
    """`Work` that is a list of requests, all of which are taken at once.

    Raises ValueError if two requests have one id.
    """

    is_ordered = True

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests: dict[int, Request] = {r.id: r for r in requests}
        if len(self.requests) < len(requests):
            raise ValueError("two requests have one id: their random numbers would be the same")

    def poll(self, free_slots: int, busy: int) -> Supply:
        """Implements `Work.poll`."""
        return Supply(tuple(self.requests))

    def idle(self) -> None:
        """Implements `Work.idle`."""

    def check(self) -> None:
        """Implements `Work.check`."""


@dataclass(frozen=True, eq=False)
class Completion:
    """A request with its finished rollout.

    tokens: [n] int64, including the prompt. written: [n] bool, True for tokens generated by the
    policy, False for the prompt and the environment's turns. logprob: [n] float32, log-probability
    of generated tokens at the sampling temperature (1 if that is 0), computed as in
    `linear_logprob`, of the untruncated distribution unless `truncated_logprobs`; 0 elsewhere.
    turns: number of the policy's turns. finish: see `Finish`. routing:
    [n - 1, L, K] integers, the experts of each token in each MoE layer, if the engine records them;
    the last token was not routed.
    """

    request: Request
    tokens: Tensor
    written: Tensor
    logprob: Tensor
    finish: Finish
    turns: int = 1
    routing: Tensor | None = None

    @property
    def response(self) -> list[int]:
        """Token ids after the prompt."""
        ids: list[int] = self.tokens[len(self.request.prompt) :].tolist()
        return ids

    def last_turn(self) -> list[int]:
        """Token ids of the policy's last turn."""
        before = torch.nonzero(~self.written).max()
        ids: list[int] = self.tokens[int(before) + 1 :].tolist()
        return ids


def as_work(requests: Sequence[Request] | Work) -> Work:
    """The requests as `Work`."""
    return RequestList(requests) if isinstance(requests, Sequence) else requests


Observe = Callable[[Sequence[int], Sequence[int], Sequence[float]], object]
"""Takes the tokens of a step as they are drawn: ids of requests, their tokens, and the
log-probabilities of these."""

Respond = Callable[[Completion], Sequence[int] | None]
"""Maps a stopped rollout to the environment's next tokens, or to None if the episode has ended. It
may be slow: it runs in a worker thread of one rank, and the ranks share the result."""


class Engine(Protocol):
    """Generates rollouts.

    is_shared: every rank of a replica gets every completion; otherwise its first rank alone does.
    """

    is_shared: bool

    def run(
        self, requests: Sequence[Request] | Work, sampling: Sampling, respond: Respond | None = None
    ) -> Iterator[Completion]:
        """Yield the completion of each request that is not cancelled, as soon as it has finished.

        respond: called at each stop, unless the rollout has reached max_tokens. Raises StopAsked
        within seconds if the job is asked to stop.
        """

    def weights_changed(self) -> None:
        """The weights of the model have changed; rollouts are generated with the new ones."""

    def metrics(self) -> dict[str, float]:
        """Counts and times of the engine for metrics.jsonl, by name; {} if there is none."""

    def release(self) -> None:
        """Free the memory that only generation uses, before the ranks train; the next run allocates
        it again. Every rank calls it; safe to call twice."""

    def close(self) -> None:
        """Free what the engine holds outside of the model."""


@dataclass
class Counts:
    """Work counters of a run.

    steps: decode steps. rows: tokens decoded, summed over all steps. prefills: number of prefilled
    prompts and environment turns. prefill_tokens: their tokens. prefill_chunks: their chunks.
    generated: tokens sampled from the policy. preemptions: running sequences, or answered by their
    environment, that lost their blocks to an older one. offloads: states moved to host memory, for
    these and for those that waited for their environment. decode_s, prefill_s: seconds of decode
    steps and of prefills, with the draws of their tokens. idle_s: seconds without a sequence, while
    the work is open.
    """

    steps: int = 0
    rows: int = 0
    prefills: int = 0
    prefill_tokens: int = 0
    prefill_chunks: int = 0
    generated: int = 0
    decode_s: float = 0.0
    prefill_s: float = 0.0
    idle_s: float = 0.0
    preemptions: int = 0
    offloads: int = 0
