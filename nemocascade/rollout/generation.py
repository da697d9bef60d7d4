"""One generation run on live weights: prefills, decode steps, and environment turns."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade.megatron.generation.model_runner import ModelRunner
from nemocascade.rollout.engine import Completion, Counts, Finish, Respond, Sampling, Work
from nemocascade.rollout.intake import Intake
from nemocascade.rollout.prefill_queue import PrefillQueue
from nemocascade.rollout.replies import Replies
from nemocascade.rollout.sampling import uniforms
from nemocascade.rollout.slots import BatchLimits, Part, Rows, SlotTable, Text
from nemocascade.rollout.stops import Decode, Stops
from nemocascade.runtime.world import World

# Shortest interval between progress reports to the watchdog.
TELL_S = 1.0


class _Pass(NamedTuple):
    """The next pass of the ranks that share experts: the largest value of each.

    is_prefill, is_decode: a prefill can run, a sequence decodes. is_unfinished: anything is left to
    do. rows: number of decoding sequences. longest: cached tokens of one, and the next. context:
    tokens that the caches hold.
    """

    is_prefill: int
    is_decode: int
    is_unfinished: int
    rows: int
    longest: int
    context: int


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
        decode: Decode | None,
        vocabulary: int,
    ) -> None:
        self.world, self.model, self.sampling = world, model, sampling
        self.vocabulary, self.counts = vocabulary, Counts()
        requests = work.requests.values()
        lengths = (len(r.prompt) + (r.sampling or sampling).max_tokens for r in requests)
        model.longest = max(lengths, default=1 + sampling.max_tokens)
        model.most_rows = min(limits.slots, len(requests))
        self.table = SlotTable(limits.slots, model.longest, world.device)
        rules = {s.rule for s in {sampling, *(r.sampling or sampling for r in requests)}}
        self.stops = {rule: Stops(rule, model.vocabulary, decode) for rule in rules}
        self.replies = Replies(world, respond, limits.tool_calls)
        self.intake = Intake(world, work)
        self.prefills = PrefillQueue(
            model, self.table, sampling, self.counts, limits, together=work.is_ordered
        )
        self.running: list[Text] = []
        self.rows: Rows | None = None
        """The decode batch; None: to be rebuilt, because a sequence has started or stopped."""
        self.finished: list[Completion] = []
        self.cancelled: set[int] = set()
        """Ids of requests that are still to be dropped."""
        self.ended = 0
        self._told = (0, 0, 0)
        self._told_at = 0.0

    def completions(self) -> Iterator[Completion]:
        """Generate until every request has finished."""
        self.world.watch.enter("rollout: generation")
        self.model.refresh()
        if self._in_step:
            # Their caches grow alike, and their largest steps are of one size.
            sizes = self._largest((self.model.longest, self.model.most_rows))
            self.model.longest, self.model.most_rows = sizes
        with self.replies, self.model.graphs():
            while True:
                self._take_replies()
                self._take_requests()
                pass_ = self._agree()
                if pass_.is_prefill or pass_.is_decode:
                    self.world.watch.waits("")
                if pass_.is_prefill:
                    self._prefill()
                elif pass_.is_decode:
                    self._step(pass_)
                elif self.intake.is_open and not self.table.texts:
                    self.intake.wait()
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
            f"{self.ended} of {self.intake.taken} texts done, {len(self.table.texts)} under way, "
            f"{self.counts.prefill_tokens} tokens read and {self.counts.generated} written"
        )

    def _agree(self) -> _Pass:
        """The next pass of this rank and of the ranks that share experts with it."""
        mine = _Pass(
            self.prefills.ready,
            bool(self.running),
            bool(self.table.texts or self.prefills.ready or self.intake.is_open),
            len(self.running),
            max((t.cached for t in self.running), default=0) + 1,
            self.model.context,
        )
        if not self._in_step:
            return mine
        pass_ = _Pass(*self._largest(mine))
        self.model.allocate(pass_.context)
        return pass_

    def _largest(self, values: Sequence[int]) -> list[int]:
        """The largest of each value over the ranks that share experts.

        Reduced by gloo on the host, which knows them: nothing waits for the device.
        """
        found = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.world.groups.tp_ep)
        return list(map(int, found))

    @property
    def _in_step(self) -> bool:
        """True if ranks must run the same passes: experts are sharded over data-parallel ranks."""
        return bool(self.world.parallel.tp % self.world.groups.tp_ep.size())

    def _prefill(self) -> None:
        """Start requests from a stored prompt state, run a prefill pass, and draw first tokens."""
        kept = self.prefills.start_from_kept()
        if kept is not None:
            self._start(*kept)
        self._start(*self.prefills.run(always=self._in_step))

    def _start(self, prefilled: list[tuple[list[Text], int]], logits: Tensor | None) -> None:
        """Draw the first token after complete prefills, each from its row of logits."""
        texts = [text for group, _ in prefilled for text in group]
        if not texts:
            return
        if logits is not None:
            # No index tensor: its copy to the device would cost more.
            logits = torch.stack([logits[row] for group, row in prefilled for _ in group])
        for text in texts:
            text.cached = text.length
        self.running += texts
        self.rows = None
        self._draw(self.table.rows(texts), logits)

    def _step(self, pass_: _Pass) -> None:
        """Decode the last token of every running sequence and draw the next one."""
        if self.rows is None:
            self.rows = self.table.rows(self.running)
        rows = self.rows
        logits = self.model.decode(
            rows.tokens, rows.slots, rows.positions, pass_.longest, pass_.rows
        )
        self.counts.steps += 1
        self.counts.rows += len(rows.texts)
        for text in rows.texts:
            text.cached += 1
        rows.advance()
        if rows.texts:
            self._draw(rows, logits, self.model.choices)

    def _draw(self, rows: Rows, logits: Tensor | None, choices: Tensor | None = None) -> None:
        """Draw the token at each row's position, and pause the sequences that it ends.

        choices: [n or more, L, K], the experts of the tokens before, if they are recorded.
        """
        rows.tokens, logprob = self._drawn(rows, logits)
        read = [rows.tokens[:, None], logprob[:, None]]
        if choices is not None:
            read.append(choices[: len(rows.texts)].flatten(1))
        # The only copy to the host, and so its only wait. float64 represents all values exactly.
        found = torch.cat([part.double() for part in read], dim=1).cpu()
        tokens = found[:, 0].long()
        self.table.append(rows, tokens, found[:, 1].float())
        if choices is not None:
            experts = found[:, 2:].to(choices.dtype).unflatten(1, choices.shape[1:])
            self.table.record_step_routing(rows, experts)
        self.counts.generated += len(rows.texts)
        self._stop(rows, tokens)

    def _stop(self, rows: Rows, tokens: Tensor) -> None:
        """Pause sequences that their last tokens [n] complete."""
        for part in rows.parts:
            places = part.places
            texts = rows.texts if places is None else [rows.texts[n] for n in places]
            last = tokens if places is None else tokens[places]
            stops = self.stops[part.rule]
            ends, doubts = stops.certain(last), stops.doubtful(last)
            doubtful = [False] * len(texts) if doubts is None else doubts.tolist()
            for text, end, doubt in zip(texts, ends.tolist(), doubtful, strict=True):
                stopped = end or (doubt and stops.reached(self.table.last_turn(text)))
                if stopped or text.length >= text.limit:
                    self._pause(text, stopped)
        if any(text.pausing for text in rows.texts):
            self.running = [text for text in self.running if not text.pausing]
            self.rows = None

    def _drawn(self, rows: Rows, logits: Tensor | None) -> tuple[Tensor, Tensor]:
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
        both = torch.empty(2, len(rows.texts), dtype=torch.float64, device=self.world.device)
        if logits is not None:
            both[0], both[1] = tokens, logprobs
        group = self.world.groups.pp
        last = dist.get_global_rank(group, self.world.parallel.pp - 1)
        dist.broadcast(both, src=last, group=group)
        return both[0].long(), both[1].float()

    def _drawn_part(self, rows: Rows, logits: Tensor, part: Part) -> tuple[Tensor, Tensor]:
        """Tokens [m] and their log-probabilities [m] of the rows of one sampling rule."""
        s, keys, positions = part.rule, rows.keys, rows.positions
        if part.rows is not None:
            logits, keys, positions = logits[part.rows], keys[part.rows], positions[part.rows]
        greedy = s.temperature == 0
        return self.model.draw(
            logits,
            None if greedy else uniforms(keys, positions),
            temperature=s.temperature or 1.0,
            limit=self.vocabulary,
            # The most probable token is always kept.
            top_k=0 if greedy else s.top_k,
            top_p=1.0 if greedy else s.top_p,
            truncated_logprobs=s.truncated_logprobs,
        )

    def _pause(self, text: Text, stopped: bool) -> None:
        """Finish a sequence that stopped or is full, or ask the environment for the next turn."""
        text.pausing = True
        finish: Finish = "stop" if stopped else "length"
        if stopped and text.length < text.limit and self.replies.wanted:
            self.replies.ask(text.slot, self.table.completion(text, finish))
        else:
            self._finish(text, finish)

    def _finish(self, text: Text, finish: Finish) -> None:
        self.finished.append(self.table.completion(text, finish))
        self.table.release(text)

    def _take_requests(self) -> None:
        """Queue the requests that this replica takes next, and drop those that are cancelled."""
        waiting, busy = self.prefills.waiting, len(self.table.texts)
        requests, cancelled = self.intake.poll(
            len(self.table.free) - waiting,
            busy + waiting,
            idle=not (self.running or self.prefills.ready),
            finished=self.ended,
        )
        self.prefills.append(requests)
        self.cancelled |= cancelled
        if not self.cancelled:
            return
        self.prefills.cancel(self.cancelled)
        left = [t for t in self.table.texts.values() if t.request.id in self.cancelled]
        # The others wait for a reply of the environment, or for a prefill that they share.
        dropped = [t for t in left if not (t.pausing or self.prefills.is_filling(t))]
        for text in dropped:
            # Excludes it from decode steps.
            text.pausing = True
            self.table.release(text)
        if dropped:
            self.running = [text for text in self.running if not text.pausing]
            self.rows = None
        self.cancelled = {text.request.id for text in left} - {t.request.id for t in dropped}

    def _take_replies(self) -> None:
        """Continue or finish the sequences that their environments have answered."""
        idle = not (self.running or self.prefills.ready)
        for slot, tokens in self.replies.take(idle and not self._in_step):
            text = self.table.texts[slot]
            if text.request.id in self.cancelled:
                self.table.release(text)
            elif tokens is None:
                self._finish(text, "stop")
            elif text.length + len(tokens) >= text.limit:
                self._finish(text, "length")
            else:
                self.table.extend(text, tokens)
                text.pausing = False
                self.prefills.add(text)
