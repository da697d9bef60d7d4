"""One run of the engine on live weights: texts begin, go on a token a step, and end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade.megatron.generation.slot_model import SlotModel
from nemocascade.rollout.engine import Completion, Counts, Finish, Request, Respond, Sampling
from nemocascade.rollout.prefill import PrefillQueue
from nemocascade.rollout.replies import Replies
from nemocascade.rollout.sampling import allowed_tokens, uniforms
from nemocascade.rollout.slots import SlotTable, Text
from nemocascade.rollout.stops import Decode, Stops
from nemocascade.runtime.world import World

# Between two reports of progress to the watchdog.
TELL_S = 1.0


class Generation:
    """One call of `LiveEngine.run`; the arguments are the engine's and the call's."""

    def __init__(
        self,
        world: World,
        model: SlotModel,
        requests: Sequence[Request],
        sampling: Sampling,
        respond: Respond | None,
        *,
        slots: int,
        prefill_tokens: int,
        prefill_chunk: int,
        decode: Decode | None,
        vocabulary: int,
        counts: Counts,
    ) -> None:
        self.world, self.model, self.sampling, self.counts = world, model, sampling, counts
        self.vocabulary = vocabulary
        longest = max((len(r.prompt) for r in requests), default=1) + sampling.max_tokens
        model.longest = longest
        self.table = SlotTable(slots, longest, world.device)
        self.stops = Stops(sampling, model.vocabulary, decode, world.device)
        self.replies = Replies(world, respond)
        self.reader = PrefillQueue(
            model,
            self.table,
            requests,
            sampling,
            counts,
            spare=slots,
            room=prefill_tokens,
            piece=prefill_chunk,
        )
        self.running: list[Text] = []
        self.finished: list[Completion] = []
        self.requests, self.ended = len(requests), 0
        self._told = (0, 0, 0)
        self._told_at = 0.0

    def completions(self) -> Iterator[Completion]:
        """Run to the end."""
        self.world.watch.enter("rollout: generation")
        self.model.refresh()
        self._arrange()
        with self.replies:
            while True:
                self._take_replies()
                reads, decodes, unfinished = self._agree()
                if reads:
                    self._read()
                elif decodes:
                    self._step()
                self.ended += len(self.finished)
                self._tell()
                yield from self.finished
                self.finished.clear()
                if not unfinished:
                    return

    def _tell(self) -> None:
        """Say how far the run is, where it has got on and not all the time."""
        done = (self.ended, self.counts.steps, self.counts.pieces)
        now = time.monotonic()
        if done == self._told or now - self._told_at < TELL_S:
            return
        self._told, self._told_at = done, now
        self.world.watch.progress(
            f"{self.ended} of {self.requests} texts done, {len(self.table.texts)} under way, "
            f"{self.counts.prefill_tokens} tokens read and {self.counts.generated} written"
        )

    def _agree(self) -> tuple[bool, bool, bool]:
        """Whether there is something to read, a text goes on, anything is left: on this rank or on
        one that shares experts with it."""
        mine = (
            self.reader.ready,
            bool(self.running),
            bool(self.table.texts or self.reader.ready),
        )
        if not self._in_step:
            return mine
        flags = torch.tensor(mine, dtype=torch.int32, device=self.world.device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self.world.groups.tp_ep)
        reads, decodes, unfinished = (bool(f) for f in flags.tolist())
        return reads, decodes, unfinished

    @property
    def _in_step(self) -> bool:
        """Experts are spread over data-parallel ranks."""
        return bool(self.world.groups.tp_ep.size() > self.world.parallel.tp)

    def _read(self) -> None:
        """Begin the requests of a kept prompt, read a pass, and draw first tokens."""
        kept = self.reader.begin_from_kept()
        if kept is not None:
            self._begin(*kept)
        self._begin(*self.reader.read(always=self._in_step))

    def _begin(self, readers: list[tuple[list[Text], int]], logits: Tensor | None) -> None:
        """Draw the first token of texts whose prompts were read, each from its row of logits."""
        texts = [text for group, _ in readers for text in group]
        if not texts:
            return
        if logits is not None:
            rows = [row for group, row in readers for _ in group]
            logits = logits[torch.tensor(rows, device=logits.device)]
        for text in texts:
            text.held = text.known
        self.running += texts
        self._draw(texts, *self.table.where(texts), logits)
        self._arrange()

    def _arrange(self) -> None:
        """The rows of the next steps, until a text begins or ends."""
        self.running = [t for t in self.running if not t.pausing]
        self.rows, self.positions = self.table.where(self.running)

    def _step(self) -> None:
        """Read the last token of every running text, and draw the next."""
        tokens = self.table.history[self.rows, self.positions]
        longest = max((t.held for t in self.running), default=0) + 1
        logits = self.model.decode(tokens, self.rows, self.positions, longest)
        if self.model.choices is not None and self.running:
            read = self.model.choices[: len(self.running)]
            self.table.keep_step_routing(self.rows, self.positions, read)
        self.counts.steps += 1
        self.counts.rows += len(self.running)
        for text in self.running:
            text.held += 1
        self.positions = self.positions + 1
        if self.running and self._draw(self.running, self.rows, self.positions, logits):
            self._arrange()

    def _draw(
        self, texts: list[Text], rows: Tensor, positions: Tensor, logits: Tensor | None
    ) -> bool:
        """Draw the next token of texts that have been read to their end. Whether any stopped.

        rows, positions: [n], their slots, and where the tokens go.
        """
        table = self.table
        tokens, logprobs = self._drawn(rows, positions, logits)
        table.history[rows, positions] = tokens
        table.logprob[rows, positions] = logprobs
        self.counts.generated += len(texts)
        full = False
        for text in texts:
            text.known += 1
            full |= text.known >= text.limit
        ends, doubts = self.stops.certain(tokens), self.stops.doubtful(tokens)
        if not full and not bool((ends if doubts is None else ends | doubts).any()):
            return False
        doubtful = [False] * len(texts) if doubts is None else doubts.tolist()
        for text, end, doubt in zip(texts, ends.tolist(), doubtful, strict=True):
            stopped = end or (doubt and self.stops.reached(table.last_turn(text)))
            if stopped or text.known >= text.limit:
                self._pause(text, stopped)
        return any(t.pausing for t in texts)

    def _drawn(
        self, rows: Tensor, positions: Tensor, logits: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Tokens [n] and their log-probabilities [n], on every rank of the data-parallel group."""
        if logits is not None:
            greedy = self.sampling.temperature == 0
            tokens, logprobs = self.model.draw(
                logits,
                None if greedy else uniforms(self.table.keys[rows], positions),
                temperature=self.sampling.temperature or 1.0,
                limit=self.vocabulary,
                allowed=allowed_tokens(logits, self.sampling, self.vocabulary),
            )
        if self.world.parallel.pp == 1:
            return tokens, logprobs
        both = torch.empty(2, rows.numel(), dtype=torch.float64, device=self.world.device)
        if logits is not None:
            both[0], both[1] = tokens, logprobs
        group = self.world.groups.pp
        last = dist.get_global_rank(group, self.world.parallel.pp - 1)
        dist.broadcast(both, src=last, group=group)
        return both[0].long(), both[1].float()

    def _pause(self, text: Text, stopped: bool) -> None:
        """A text stopped or is full: finished, or for the environment to continue."""
        text.pausing = True
        finish: Finish = "stop" if stopped else "length"
        if stopped and text.known < text.limit and self.replies.wanted:
            self.replies.ask(text.slot, self.table.completion(text, finish))
        else:
            self._finish(text, finish)

    def _finish(self, text: Text, finish: Finish) -> None:
        self.finished.append(self.table.completion(text, finish))
        self.table.release(text)

    def _take_replies(self) -> None:
        """Continue or finish the texts that their environments have answered."""
        idle = not (self.running or self.reader.ready)
        for slot, tokens in self.replies.take(idle and not self._in_step):
            text = self.table.texts[slot]
            if tokens is None:
                self._finish(text, "stop")
            elif text.known + len(tokens) >= text.limit:
                self._finish(text, "length")
            else:
                self.table.extend(text, tokens)
                text.pausing = False
                self.reader.add(text)
