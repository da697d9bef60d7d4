"""One generation run on live weights: prefills, decode steps, and environment turns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade.megatron.generation import SampleSettings
from nemocascade.megatron.generation.kv_cache import Load
from nemocascade.megatron.generation.model_runner import ModelRunner
from nemocascade.rollout.blocks import BlockPool
from nemocascade.rollout.capacity import largest_of_sharers, shares_experts
from nemocascade.rollout.engine import Completion, Counts, Finish, Observe, Respond, Sampling, Work
from nemocascade.rollout.intake import Intake
from nemocascade.rollout.prefill_queue import PrefillQueue
from nemocascade.rollout.replies import Replies
from nemocascade.rollout.residency import Residency
from nemocascade.rollout.slots import ActiveSequence, BatchLimits, RuleRows, SlotTable, TokenRows
from nemocascade.rollout.stops import Decode, Stops
from nemocascade.runtime.stopping import StopAsked
from nemocascade.runtime.world import World

# Sampling rules that are kept, besides those in use.
MOST_RULES = 256
# Shortest interval between progress reports to the watchdog.
TELL_S = 1.0


class _Pass(NamedTuple):
    """The next pass of the ranks that share experts: the largest value of each.

    is_prefill, is_decode: a prefill can run, a sequence decodes. is_unfinished: anything is left to
    do. rows: number of decoding sequences. longest: cached tokens of one, and the next. is_stopped:
    the job was asked to stop.
    """

    is_prefill: int
    is_decode: int
    is_unfinished: int
    rows: int
    longest: int
    is_stopped: int


class Generation:
    """One call of `LiveEngine.run`; the arguments are the engine's and the call's."""

    def __init__(
        self,
        world: World,
        model: ModelRunner,
        work: Work,
        sampling: Sampling,
        respond: Respond | None,
        *,
        limits: BatchLimits,
        load: Load,
        decode: Decode | None,
        vocabulary: int,
        observe: Observe | None = None,
    ) -> None:
        self.world, self.model, self.sampling = world, model, sampling
        self.vocabulary, self.counts = vocabulary, Counts()
        self.decode, self.observe = decode, observe
        # Sequences that wait for their environment may leave their slot to others.
        seats = limits.slots * (1 if respond is None else 2)
        self.table = SlotTable(limits.slots, seats, load.longest, world.device)
        pool = BlockPool(model.table.blocks, model.table.size)
        self.residency = Residency(model, self.table, pool, self.counts)
        self.stops: dict[Sampling, Stops] = {}
        for how in {sampling, *(r.sampling or sampling for r in work.requests.values())}:
            self._stops_of(how.rule)
        self.replies = Replies(world, respond, limits.tool_calls)
        self.intake = Intake(world, work)
        self.prefills = PrefillQueue(self.residency, sampling, limits, together=work.is_ordered)
        self.running: list[ActiveSequence] = []
        self.rows: TokenRows | None = None
        """The decode batch; None: to be rebuilt, because a sequence has started or stopped."""
        self.finished: list[Completion] = []
        self.cancelled: set[int] = set()
        """Ids of requests that are still to be dropped."""
        self.ended = 0
        self._told = (0, 0, 0)
        self._told_at = 0.0

    def completions(self) -> Iterator[Completion]:
        """Generate until every request has finished.

        Raises StopAsked if the job was asked to stop, at the same pass on all ranks that run the
        same passes.
        """
        self.world.watch.enter("rollout: generation")
        self.model.refresh()
        with self.replies, self.model.graphs():
            while True:
                self._take_replies()
                self._take_requests()
                self._suspend_waiting()
                pass_ = self._agree()
                if pass_.is_stopped:
                    raise StopAsked
                if pass_.is_prefill or pass_.is_decode:
                    self.world.watch.waits("")
                started = time.perf_counter()
                if pass_.is_prefill:
                    self._prefill()
                    self.counts.prefill_s += time.perf_counter() - started
                elif pass_.is_decode:
                    self._step(pass_)
                    self.counts.decode_s += time.perf_counter() - started
                elif self.intake.is_open and not self.table.sequences:
                    self.intake.wait()
                    self.counts.idle_s += time.perf_counter() - started
                self.ended += len(self.finished)
                self._tell()
                yield from self.finished
                self.finished.clear()
                if not pass_.is_unfinished:
                    return

    def _tell(self) -> None:
        """Report progress to the watchdog, at most every `TELL_S`."""
        done = (self.ended, self.counts.steps, self.counts.prefill_chunks)
        now = time.monotonic()
        if done == self._told or now - self._told_at < TELL_S:
            return
        self._told, self._told_at = done, now
        self.world.watch.progress(
            f"{self.ended} of {self.intake.taken} sequences done, "
            f"{len(self.table.sequences)} in progress, "
            f"{self.counts.prefill_tokens} tokens read and {self.counts.generated} written"
        )

    def _agree(self) -> _Pass:
        """The next pass of this rank and of the ranks that share experts with it."""
        mine = _Pass(
            self.prefills.ready,
            bool(self.running),
            bool(self.table.sequences or self.prefills.waiting or self.intake.is_open),
            len(self.running),
            max((t.cached for t in self.running), default=0) + 1,
            self.intake.is_stopped(),
        )
        return _Pass(*largest_of_sharers(self.world, mine)) if self._in_step else mine

    @property
    def _in_step(self) -> bool:
        """True if ranks must run the same passes."""
        return shares_experts(self.world)

    def _suspend_waiting(self) -> None:
        """Return suspended sequences to the device, and reserve blocks for the next tokens; both
        may suspend others."""
        residency = self.residency
        residency.headroom = len(self.running)
        for sequence in residency.resume():
            if sequence.length > sequence.cached + 1:
                self.prefills.add(sequence)
            else:
                self.running.append(sequence)
                self.rows = None
        residency.headroom = len(self.running)
        self.prefills.suspend_waiting()
        if self.prefills.ready:
            return
        full = [t for t in self.running if t.cached >= len(t.blocks) * residency.pool.size]
        for sequence in sorted(full, key=lambda t: t.order):
            if sequence.slot >= 0:
                residency.grow(sequence, sequence.cached + 1)
        if full:
            self._drop_suspended()

    def _drop_suspended(self) -> None:
        """Exclude suspended sequences from decode steps."""
        if any(sequence.slot < 0 for sequence in self.running):
            self.running = [sequence for sequence in self.running if sequence.slot >= 0]
            self.rows = None

    def _prefill(self) -> None:
        """Start requests from a stored prompt state, run a prefill pass, and draw first tokens."""
        kept = self.prefills.start_from_kept()
        if kept is not None:
            self._start(*kept)
        self._start(*self.prefills.run(always=self._in_step))

    def _start(
        self, prefilled: list[tuple[list[ActiveSequence], int]], logits: Tensor | None
    ) -> None:
        """Draw the first token after complete prefills, each from its row of logits."""
        sequences = [sequence for group, _ in prefilled for sequence in group]
        if not sequences:
            return
        if logits is not None:
            # No index tensor: its copy to the device would cost more.
            logits = torch.stack([logits[row] for group, row in prefilled for _ in group])
        for sequence in sequences:
            sequence.cached = sequence.length
        self.running += sequences
        self.rows = None
        self._draw(self.table.rows(sequences), logits)

    def _step(self, pass_: _Pass) -> None:
        """Decode the last token of every running sequence and draw the next one."""
        if self.rows is None:
            self.rows = self.table.rows(self.running)
        rows = self.rows
        logits = self.model.decode(
            rows.tokens, rows.slots, rows.positions, pass_.longest, pass_.rows
        )
        self.counts.steps += 1
        self.counts.rows += len(rows.sequences)
        for sequence in rows.sequences:
            sequence.cached += 1
        rows.advance()
        if rows.sequences:
            self._draw(rows, logits, self.model.choices)

    def _draw(self, rows: TokenRows, logits: Tensor | None, choices: Tensor | None = None) -> None:
        """Draw the token at each row's position, and pause the sequences that it ends.

        choices: [n or more, L, K], the experts of the tokens before, if they are recorded.
        """
        rows.tokens, logprob = self._drawn(rows, logits)
        read = [rows.tokens[:, None], logprob[:, None]]
        if choices is not None:
            read.append(choices[: len(rows.sequences)].flatten(1))
        # The only copy to the host, and so its only wait. float64 represents all values exactly.
        found = torch.cat([part.double() for part in read], dim=1).cpu()
        tokens = found[:, 0].long()
        self.table.append(rows, tokens, found[:, 1].float())
        if choices is not None:
            experts = found[:, 2:].to(choices.dtype).unflatten(1, choices.shape[1:])
            self.table.record_step_routing(rows, experts)
        self.counts.generated += len(rows.sequences)
        if self.observe is not None:
            ids = [sequence.request.id for sequence in rows.sequences]
            self.observe(ids, tokens.tolist(), found[:, 1].tolist())
        self._stop(rows, tokens)

    def _stop(self, rows: TokenRows, tokens: Tensor) -> None:
        """Pause sequences that their last tokens [n] complete."""
        for part in rows.parts:
            row_indices = part.row_indices
            sequences = (
                rows.sequences if row_indices is None else [rows.sequences[n] for n in row_indices]
            )
            last = tokens if row_indices is None else tokens[row_indices]
            stops = self._stops_of(part.rule)
            ends, doubts = stops.certain(last), stops.doubtful(last)
            doubtful = [False] * len(sequences) if doubts is None else doubts.tolist()
            for sequence, end, doubt in zip(sequences, ends.tolist(), doubtful, strict=True):
                stopped = end or (doubt and stops.reached(self.table.last_turn(sequence)))
                if stopped or sequence.length >= sequence.limit:
                    self._pause(sequence, stopped)
        if any(sequence.is_paused for sequence in rows.sequences):
            self.running = [sequence for sequence in self.running if not sequence.is_paused]
            self.rows = None

    def _stops_of(self, rule: Sampling) -> Stops:
        if (stops := self.stops.get(rule)) is not None:
            return stops
        if len(self.stops) >= MOST_RULES:
            used = {sequence.rule for sequence in self.table.sequences.values()}
            self.stops = {known: s for known, s in self.stops.items() if known in used}
            self.table.keep_rules(used)
        self.stops[rule] = stops = Stops(rule, self.model.vocabulary, self.decode)
        return stops

    def _drawn(self, rows: TokenRows, logits: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens [n] and their log-probabilities [n], on every rank of the data-parallel group."""
        if logits is not None:
            found = [self._drawn_part(rows, logits, part) for part in rows.parts]
            tokens, logprobs = found[0]
            if len(found) > 1:
                order = torch.cat([part.rows for part in rows.parts if part.rows is not None])
                tokens, logprobs = (
                    torch.empty_like(torch.cat(each)).index_copy_(0, order, torch.cat(each))
                    for each in zip(*found, strict=True)
                )
        if self.world.parallel.pp == 1:
            return tokens, logprobs
        both = torch.empty(2, len(rows.sequences), dtype=torch.float64, device=self.world.device)
        if logits is not None:
            both[0], both[1] = tokens, logprobs
        group = self.world.groups.pp
        last = dist.get_global_rank(group, self.world.parallel.pp - 1)
        dist.broadcast(both, src=last, group=group)
        return both[0].long(), both[1].float()

    def _drawn_part(self, rows: TokenRows, logits: Tensor, part: RuleRows) -> tuple[Tensor, Tensor]:
        """Tokens [m] and their log-probabilities [m] of the rows of one sampling rule."""
        s, keys, positions = part.rule, rows.keys, rows.positions
        if part.rows is not None:
            logits, keys, positions = logits[part.rows], keys[part.rows], positions[part.rows]
        settings = SampleSettings(
            s.temperature, self.vocabulary, s.top_k, s.top_p, s.truncated_logprobs
        )
        return self.model.draw(logits, keys, positions, settings)

    def _pause(self, sequence: ActiveSequence, stopped: bool) -> None:
        """Finish a sequence that stopped or is full, or ask the environment for the next turn."""
        sequence.is_paused = True
        finish: Finish = "stop" if stopped else "length"
        if stopped and sequence.length < sequence.limit and self.replies.wanted:
            self.replies.ask(sequence.seat, self.table.completion(sequence, finish))
        else:
            self._finish(sequence, finish)

    def _finish(self, sequence: ActiveSequence, finish: Finish) -> None:
        self.finished.append(self.table.completion(sequence, finish))
        self.residency.release(sequence)

    def _take_requests(self) -> None:
        """Queue the requests that this replica takes next, and drop those that are cancelled."""
        residency = self.residency
        waiting, busy = self.prefills.waiting, len(self.table.sequences)
        free = len(self.table.free) + (len(residency.waiting) if self.replies.wanted else 0)
        free_slots = min(free, len(self.table.free_seats))
        requests, cancelled = self.intake.poll(
            free_slots - waiting - len(residency.returning),
            busy + waiting,
            idle=self._is_idle,
            finished=self.ended,
        )
        self.prefills.append(requests)
        self.cancelled |= cancelled
        if not self.cancelled:
            return
        self.prefills.cancel(self.cancelled)
        left = [t for t in self.table.sequences.values() if t.request.id in self.cancelled]
        # The others wait for a reply of the environment, or for a prefill that they share.
        dropped = [t for t in left if not (t.is_paused or t.is_prefilling)]
        for sequence in dropped:
            # Excludes it from decode steps.
            sequence.is_paused = True
            residency.release(sequence)
        if dropped:
            self.running = [sequence for sequence in self.running if not sequence.is_paused]
            self.rows = None
        self.cancelled = {sequence.request.id for sequence in left} - {
            t.request.id for t in dropped
        }

    @property
    def _is_idle(self) -> bool:
        """True if nothing can be generated before a reply or a request arrives."""
        return not (self.running or self.prefills.ready or self.residency.returning)

    def _take_replies(self) -> None:
        """Continue or finish the sequences that their environments have answered."""
        replies = self.replies.take(self._is_idle and not self._in_step)
        for seat, tokens in replies:
            sequence = self.table.sequences[seat]
            if sequence.request.id in self.cancelled:
                self.residency.release(sequence)
            elif tokens is None:
                self._finish(sequence, "stop")
            elif sequence.length + len(tokens) >= sequence.limit:
                self._finish(sequence, "length")
            else:
                self.table.extend(sequence, tokens)
                sequence.is_paused = False
                if sequence.slot >= 0:
                    self.residency.grow(sequence, sequence.length)
                if sequence.slot >= 0:
                    self.prefills.add(sequence)
        if replies:
            self._drop_suspended()
