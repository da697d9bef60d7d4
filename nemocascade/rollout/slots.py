"""Which text lives in which slot, and how far it is.

Tokens lie on the model's device; the host counts by itself how many there are, so that a step waits
for the device once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemocascade.rollout.engine import Completion, Finish, Request, Sampling
from nemocascade.rollout.sampling import request_keys


@dataclass
class Text:
    """A request under way.

    held: tokens that the model has read. known: tokens that there are: in steps one more than held;
    a text with more to read is read first. limit: tokens at most. given: stretches [start, end)
    after the prompt that an environment wrote. pausing: it takes no part in steps.
    """

    request: Request
    slot: int
    held: int
    known: int
    limit: int
    given: list[tuple[int, int]] = field(default_factory=list)
    pausing: bool = False

    @property
    def turn_start(self) -> int:
        """Where the model's last stretch begins."""
        return self.given[-1][1] if self.given else len(self.request.prompt)


class SlotTable:
    """history: [S, longest] int64 and logprob: [S, longest] float32, the texts; keys: [S] int64, of
    their random numbers; all on the device. texts: by slot. free: slots without a text.
    routing: [S, longest, L, K], the experts of tokens that were read, once there are any.
    """

    def __init__(self, slots: int, longest: int, device: torch.device) -> None:
        self.device = device
        self.history = torch.zeros(slots, longest, dtype=torch.int64, device=device)
        self.logprob = torch.zeros(slots, longest, device=device)
        self.keys = torch.zeros(slots, dtype=torch.int64, device=device)
        self.routing: Tensor | None = None
        self.texts: dict[int, Text] = {}
        self.free = list(range(slots - 1, -1, -1))

    def admit(self, requests: list[Request], sampling: Sampling) -> list[Text]:
        """Give each request a slot and write its prompt there."""
        ids = torch.tensor([r.id for r in requests], dtype=torch.int64)
        keys = request_keys(sampling.seed, ids).to(self.device)
        texts = []
        for request, key in zip(requests, keys, strict=True):
            slot, length = self.free.pop(), len(request.prompt)
            self.keys[slot] = key
            self.history[slot, :length] = torch.tensor(request.prompt, device=self.device)
            self.logprob[slot] = 0
            text = Text(request, slot, 0, length, length + sampling.max_tokens)
            self.texts[slot] = text
            texts.append(text)
        return texts

    def where(self, texts: list[Text]) -> tuple[Tensor, Tensor]:
        """[n] slots, and [n] tokens that each holds: where its next one is read or written."""
        table = torch.tensor([(t.slot, t.held) for t in texts], dtype=torch.int64).view(-1, 2)
        slots, held = table.to(self.device).unbind(1)
        return slots.contiguous(), held.contiguous()

    def last_turn(self, text: Text) -> Tensor:
        """[m] ids of the model's last stretch."""
        return self.history[text.slot, text.turn_start : text.known]

    def keep_routing(self, slot: int, first: int, choices: Tensor) -> None:
        """Keep the experts [m, L, K] of a text's tokens from number `first` on."""
        self._routing_like(choices)[slot, first : first + choices.shape[0]] = choices

    def keep_step_routing(self, slots: Tensor, positions: Tensor, choices: Tensor) -> None:
        """Keep the experts [n, L, K] of one token of each slot."""
        self._routing_like(choices)[slots, positions] = choices

    def routing_of(self, text: Text, length: int) -> Tensor:
        """[length, L, K], the experts of a text's first tokens; they are recorded."""
        assert self.routing is not None
        return self.routing[text.slot, :length]

    def _routing_like(self, choices: Tensor) -> Tensor:
        if self.routing is None:
            self.routing = choices.new_zeros(*self.history.shape, *choices.shape[1:])
        return self.routing

    def extend(self, text: Text, tokens: Sequence[int]) -> None:
        """Add an environment's tokens."""
        start, end = text.known, text.known + len(tokens)
        self.history[text.slot, start:end] = torch.tensor(tokens, device=self.device)
        self.logprob[text.slot, start:end] = 0
        text.known = end
        text.given.append((start, end))

    def completion(self, text: Text, finish: Finish) -> Completion:
        """A text as it stands.

        Raises FloatingPointError if a log-probability is not finite: the model's logits were not.
        """
        length = text.known
        logprob = self.logprob[text.slot, :length].cpu()
        if not bool(torch.isfinite(logprob).all()):
            at = int(torch.nonzero(~torch.isfinite(logprob))[0])
            raise FloatingPointError(
                f"request {text.request.id}: the log-probability of token {at} is "
                f"{float(logprob[at])}: the model's weights or states are not finite"
            )
        written = torch.ones(length, dtype=torch.bool)
        written[: len(text.request.prompt)] = False
        for start, end in text.given:
            written[start:end] = False
        return Completion(
            request=text.request,
            tokens=self.history[text.slot, :length].cpu().clone(),
            written=written,
            logprob=logprob.clone(),
            finish=finish,
            turns=1 + len(text.given),
            routing=None
            if self.routing is None
            else self.routing[text.slot, : length - 1].cpu().clone(),
        )

    def release(self, text: Text) -> None:
        """The text has finished."""
        del self.texts[text.slot]
        self.free.append(text.slot)
