"""The interface of engines: `Sampling`, `Request`, `Completion`, `Engine`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: divides the logits; 0 takes the most probable token.
    top_k: only the k most probable tokens; 0 is all.
    top_p: of those, renormalised, the fewest whose probabilities add up to at least this.
    max_tokens: that follow the prompt, the environment's included.
    stop_tokens: sequences of ids; the text ends with the first of them that stands at its end.
    stop_strings: likewise, in the decoded text. What stopped it stays part of the text.
    seed: together with a request's id and the position it decides every draw.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_tokens: int = 1024
    stop_tokens: tuple[tuple[int, ...], ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        faults = []
        if not self.temperature >= 0:
            faults.append(f"temperature({self.temperature}) must be at least 0")
        if self.top_k < 0:
            faults.append(f"top_k({self.top_k}) must be at least 0, and 0 is all")
        if not 0 < self.top_p <= 1:
            faults.append(f"top_p({self.top_p}) must lie in (0, 1], and 1 is all")
        if self.max_tokens < 1:
            faults.append(f"max_tokens({self.max_tokens}) must be at least 1")
        if any(not s for s in (*self.stop_tokens, *self.stop_strings)):
            faults.append("an empty stop sequence would stop before the first token")
        if faults:
            raise ValueError("sampling: " + "; ".join(faults))


@dataclass(frozen=True)
class Request:
    """A text to be continued.

    id: different for every request of a run; with the seed it decides the random numbers.
    prompt: ids, at least one. Requests that follow each other with the same prompt share its
        prefill.
    """

    id: int
    prompt: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"request {self.id} has an empty prompt: it needs at least one token")


@dataclass(frozen=True, eq=False)
class Completion:
    """A request and what followed.

    tokens: [n] int64, prompt and all. written: [n] bool, by the model; the prompt and what an
    environment added are not. logprob: [n] float32, of written tokens under the untruncated
    distribution at the sampling temperature (at 1 for temperature 0), as `linear_logprob` computes
    it with that temperature; 0 elsewhere. turns: stretches that the model wrote. finish: `length`
    where max_tokens ended the text. routing: [n - 1, L, K] integers, the experts that each token
    went through in each MoE layer, where the engine records them; the last token went through none.
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
        """The ids after the prompt."""
        ids: list[int] = self.tokens[len(self.request.prompt) :].tolist()
        return ids

    def last_turn(self) -> list[int]:
        """The ids of the model's last stretch."""
        before = torch.nonzero(~self.written).max()
        ids: list[int] = self.tokens[int(before) + 1 :].tolist()
        return ids


Respond = Callable[[Completion], Sequence[int] | None]
"""Given a text that stopped, the tokens to go on with, or None at its end. It may take its time and
runs in a thread of its own, on one rank; the others are told."""


class Engine(Protocol):
    """Continues texts."""

    def run(
        self, requests: Sequence[Request], sampling: Sampling, respond: Respond | None = None
    ) -> Iterator[Completion]:
        """Completions as they finish, each request's once.

        respond: asked at each stop. A text that stops at its last allowed token has finished.
        """


@dataclass
class Counts:
    """The work of a run. steps: decode steps; rows: tokens that those read, over all steps.

    prefills, prefill_tokens: prompts and turns of an environment; prefill_chunks: their number.
    generated: tokens that the policy wrote.
    """

    steps: int = 0
    rows: int = 0
    prefills: int = 0
    prefill_tokens: int = 0
    prefill_chunks: int = 0
    generated: int = 0
