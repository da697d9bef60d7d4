"""The slot table: the sequences of a run with their tokens, log-probabilities and progress.

It is on the host, which reads each step's tokens once. So stop sequences, prefills and completions
need no copy from the device.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemocascade.megatron.generation import to_device
from nemocascade.megatron.generation.model_runner import Saved
from nemocascade.rollout.engine import Completion, Finish, Request, Sampling
from nemocascade.rollout.sampling import request_keys


@dataclass(frozen=True)
class BatchLimits:
    """Limits of continuous batching on a data-parallel rank.

    slots: number of concurrent sequences. prefill_tokens: prompts are prefilled together up to
    this many tokens; 0 prefills each alone. prefill_chunk: largest number of tokens of one
    sequence in a pass; 0 is unlimited. tool_calls: concurrent calls of tools on a rank.

    Raises ValueError if there is no slot, or a size is negative.
    """

    slots: int = 64
    prefill_tokens: int = 0
    prefill_chunk: int = 0
    tool_calls: int = 1

    def __post_init__(self) -> None:
        if self.slots < 1:
            raise ValueError(f"slots({self.slots}) must be at least 1")
        if self.prefill_tokens < 0 or self.prefill_chunk < 0:
            raise ValueError(
                f"prefill_tokens({self.prefill_tokens}) and prefill_chunk({self.prefill_chunk}) "
                "must be at least 0"
            )


@dataclass(eq=False)
class ActiveSequence:
    """The sequence of a request: its prompt and all following tokens.

    seat: its row of the table. slot: on the device, -1 if its state is in host memory, in `saved`.
    order: number of sequences that started before it. origin: the same object for the sequences of
    one prefill. blocks: of the KV cache. cached: tokens in these. length: tokens of the sequence. A
    running sequence has one token more than `cached`; with more, it needs a prefill. limit: largest
    allowed length. rule: how its tokens are drawn, see `Sampling.rule`. given: spans [start, end)
    after the prompt that an environment wrote. is_paused: excluded from decode steps, because it
    has ended or waits for its environment. is_prefilling: a prefill of it is queued or running.
    """

    request: Request
    seat: int
    slot: int
    order: int
    cached: int
    length: int
    limit: int
    rule: Sampling
    origin: object = None
    blocks: list[int] = field(default_factory=list)
    saved: Saved | None = None
    given: list[tuple[int, int]] = field(default_factory=list)
    is_paused: bool = False
    is_prefilling: bool = False

    @property
    def turn_start(self) -> int:
        """Position at which the policy's last turn starts."""
        return self.given[-1][1] if self.given else len(self.request.prompt)


@dataclass(frozen=True, eq=False)
class RuleRows:
    """The rows that are drawn by one sampling rule. row_indices: their numbers; rows: the same [m]
    int64 on the device. None in both is all rows."""

    rule: Sampling
    row_indices: list[int] | None = None
    rows: Tensor | None = None


@dataclass(eq=False)
class TokenRows:
    """Rows of sequences that draw a token, [n] int64 each.

    sequences: the sequence of each row. seats, positions_on_host: its seat, and the position of a
    token, on the host. On the device: slots, positions; tokens, those at `positions`, if they are
    known; keys, of the random numbers. parts: the rows of each sampling rule.
    """

    sequences: list[ActiveSequence]
    parts: list[RuleRows]
    seats: Tensor
    positions_on_host: Tensor
    slots: Tensor
    positions: Tensor
    tokens: Tensor
    keys: Tensor

    def advance(self) -> None:
        """Move to the next position of each row."""
        self.positions_on_host = self.positions_on_host + 1
        self.positions = self.positions + 1


class SlotTable:
    """Tokens of all sequences, on the host, at S seats. There may be more seats than slots.

    history [S, longest] int64, the tokens; logprob [S, longest] float32; keys [S] int64, the keys
    of the random numbers; routing [S, longest, L, K], the experts of cached tokens, None until some
    are recorded; sequences, the sequences by seat; free and free_seats, unused slots and seats.
    device: of `rows`.
    """

    def __init__(self, slots: int, seats: int, longest: int, device: torch.device) -> None:
        self.device = device
        self.history = torch.zeros(seats, longest, dtype=torch.int64)
        self.logprob = torch.zeros(seats, longest)
        self.keys = torch.zeros(seats, dtype=torch.int64)
        self.routing: Tensor | None = None
        self.sequences: dict[int, ActiveSequence] = {}
        self.free = list(range(slots - 1, -1, -1))
        self.free_seats = list(range(seats - 1, -1, -1))
        self._started = 0
        self._rules: dict[Sampling, Sampling] = {}

    def admit(
        self, requests: list[Request], sampling: Sampling, origin: object
    ) -> list[ActiveSequence]:
        """Assign a slot and a seat to each request and write its prompt there.

        sampling: of the run. origin: see `ActiveSequence`.
        """
        sequences = []
        for request in requests:
            seat, length = self.free_seats.pop(), len(request.prompt)
            how = request.sampling or sampling
            number = request.id if request.draws is None else request.draws
            self.keys[seat] = request_keys(how.seed, torch.tensor([number]))
            self.history[seat, :length] = torch.tensor(request.prompt)
            self.logprob[seat] = 0
            # One object for equal rules, which are compared at every change of the batch.
            rule = self._rules.setdefault(how.rule, how.rule)
            sequence = ActiveSequence(
                request,
                seat,
                self.free.pop(),
                self._started,
                cached=0,
                length=length,
                limit=length + how.max_tokens,
                rule=rule,
                origin=origin,
            )
            self._started += 1
            self.sequences[seat] = sequence
            sequences.append(sequence)
        return sequences

    def keep_rules(self, used: Collection[Sampling]) -> None:
        """Forget the sampling rules that no sequence uses."""
        self._rules = {rule: rule for rule in self._rules.values() if rule in used}

    def free_slot(self, sequence: ActiveSequence) -> None:
        """Free the slot of a sequence that is suspended."""
        self.free.append(sequence.slot)
        sequence.slot = -1

    def assign_slot(self, sequence: ActiveSequence) -> None:
        """Assign a slot to a suspended sequence."""
        sequence.slot = self.free.pop()

    def rows(self, sequences: list[ActiveSequence]) -> TokenRows:
        """The rows of `sequences`, each at the position after its cached tokens."""
        seats, slots, positions = (
            torch.tensor(column, dtype=torch.int64)
            for column in (
                [t.seat for t in sequences],
                [t.slot for t in sequences],
                [t.cached for t in sequences],
            )
        )
        known = [slots, positions, self.history[seats, positions], self.keys[seats]]
        by_rule: dict[int, list[int]] = {}
        for row, sequence in enumerate(sequences):
            by_rule.setdefault(id(sequence.rule), []).append(row)
        several = len(by_rule) > 1
        if several:
            known += [
                torch.tensor(row_indices, dtype=torch.int64) for row_indices in by_rule.values()
            ]
        moved = to_device(known, self.device)
        parts = [
            RuleRows(sequences[p[0]].rule, p, moved[4 + n])
            if several
            else RuleRows(sequences[0].rule)
            for n, p in enumerate(by_rule.values())
        ]
        return TokenRows(sequences, parts, seats, positions, *moved[:4])

    def append(self, rows: TokenRows, tokens: Tensor, logprob: Tensor) -> None:
        """Append the tokens [n] int64 that were drawn at the rows' positions."""
        at = rows.seats, rows.positions_on_host
        self.history[at], self.logprob[at] = tokens, logprob
        for sequence in rows.sequences:
            sequence.length += 1

    def last_turn(self, sequence: ActiveSequence) -> Tensor:
        """[m] ids of the policy's last turn."""
        return self.history[sequence.seat, sequence.turn_start : sequence.length]

    def record_routing(self, sequence: ActiveSequence, first: int, choices: Tensor) -> None:
        """Record the experts [m, L, K] of a sequence's tokens from position `first` on."""
        self._routing_like(choices)[sequence.seat, first : first + choices.shape[0]] = choices

    def record_step_routing(self, rows: TokenRows, choices: Tensor) -> None:
        """Record the experts [n, L, K] of the token before each row's position."""
        self._routing_like(choices)[rows.seats, rows.positions_on_host - 1] = choices

    def routing_of(self, sequence: ActiveSequence, length: int) -> Tensor:
        """[length, L, K]: the recorded experts of a sequence's first tokens."""
        assert self.routing is not None
        return self.routing[sequence.seat, :length]

    def _routing_like(self, choices: Tensor) -> Tensor:
        if self.routing is None:
            self.routing = choices.new_zeros(*self.history.shape, *choices.shape[1:])
        return self.routing

    def extend(self, sequence: ActiveSequence, tokens: Sequence[int]) -> None:
        """Append an environment's tokens."""
        start, end = sequence.length, sequence.length + len(tokens)
        self.history[sequence.seat, start:end] = torch.tensor(tokens)
        self.logprob[sequence.seat, start:end] = 0
        sequence.length = end
        sequence.given.append((start, end))

    def completion(self, sequence: ActiveSequence, finish: Finish) -> Completion:
        """The completion of a sequence.

        Raises FloatingPointError if a log-probability is not finite: the model's logits were not.
        """
        length = sequence.length
        logprob = self.logprob[sequence.seat, :length].clone()
        if not bool(torch.isfinite(logprob).all()):
            at = int(torch.nonzero(~torch.isfinite(logprob))[0])
            raise FloatingPointError(
                f"request {sequence.request.id}: the log-probability of token {at} is "
                f"{float(logprob[at])}: the model's weights or states are not finite"
            )
        written = torch.ones(length, dtype=torch.bool)
        written[: len(sequence.request.prompt)] = False
        for start, end in sequence.given:
            written[start:end] = False
        return Completion(
            request=sequence.request,
            tokens=self.history[sequence.seat, :length].clone(),
            written=written,
            logprob=logprob,
            finish=finish,
            turns=1 + len(sequence.given),
            routing=None
            if self.routing is None
            else self.routing[sequence.seat, : length - 1].clone(),
        )

    def release(self, sequence: ActiveSequence) -> None:
        """Remove a finished sequence, and free its seat and its slot."""
        del self.sequences[sequence.seat]
        self.free_seats.append(sequence.seat)
        if sequence.slot >= 0:
            self.free_slot(sequence)
