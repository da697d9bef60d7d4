"""One run of the engine on live weights: texts begin, go on a token a step, and end."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade.megatron.inference import SlotModel
from nemocascade.megatron.world import World
from nemocascade.rollout.engine import Completion, Counts, Finish, Request, Respond, Sampling
from nemocascade.rollout.replies import Replies
from nemocascade.rollout.sampling import allowed_tokens, uniforms
from nemocascade.rollout.slots import SlotTable, Text
from nemocascade.rollout.stops import Decode, Stops

# A text that an environment continued is read again as a whole where that reads at most this many
# times as many tokens as were added; otherwise its slot reads the added ones, one a step.
REREAD = 8


@dataclass
class Group:
    """Requests that continue one prompt and have not begun.

    kept: the prompt was read, and its state stands in the slot beyond the others. logits: [1, V]
    after it, on the last stage. choices: [m, L, K], its experts, where they are recorded.
    """

    prompt: tuple[int, ...]
    requests: deque[Request]
    kept: bool = False
    logits: Tensor | None = None
    choices: Tensor | None = None


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
        decode: Decode | None,
        vocabulary: int,
        counts: Counts,
    ) -> None:
        self.world, self.model, self.sampling, self.counts = world, model, sampling, counts
        self.spare, self.room, self.vocabulary = slots, prefill_tokens, vocabulary
        longest = max((len(r.prompt) for r in requests), default=1) + sampling.max_tokens
        self.table = SlotTable(slots, longest, world.device)
        self.stops = Stops(sampling, model.vocabulary, decode, world.device)
        self.replies = Replies(world, respond)
        self.groups: deque[Group] = deque()
        for request in requests:
            if not self.groups or self.groups[-1].prompt != request.prompt:
                self.groups.append(Group(request.prompt, deque()))
            self.groups[-1].requests.append(request)
        self.running: list[Text] = []
        self.rereading: list[Text] = []
        self.finished: list[Completion] = []

    def completions(self) -> Iterator[Completion]:
        """Run to the end."""
        self.model.refresh()
        self._arrange()
        with self.replies:
            while True:
                self._take_replies()
                reads, decodes, unfinished = self._agree()
                if reads:
                    self._read_prompts()
                elif decodes:
                    self._step()
                yield from self.finished
                self.finished.clear()
                if not unfinished:
                    return

    def _agree(self) -> tuple[bool, bool, bool]:
        """Whether a prompt can be read, a text goes on, anything is left: on this rank or on one
        that shares experts with it."""
        reads = bool(self.rereading or (self.groups and self.table.free))
        mine = (reads, bool(self.running), bool(self.table.texts or self.groups))
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

    def _read_prompts(self) -> None:
        """Read what fits into a pack of the prompts that wait, and draw the first tokens."""
        self._begin_from_kept()
        prompts: list[Tensor] = []
        readers: list[list[Text]] = []
        used = 0
        while self.rereading and self._fits(used, self.rereading[0].known):
            text = self.rereading.pop(0)
            prompts.append(self.table.history[text.slot, : text.known])
            readers.append([text])
            used += text.known
        kept: Group | None = None
        while self.groups and self.table.free and self._fits(used, len(self.groups[0].prompt)):
            group = self.groups[0]
            prompts.append(torch.tensor(group.prompt))
            readers.append(self._admit(group))
            used += len(group.prompt)
            if group.requests:
                kept = group
                break
            self.groups.popleft()
        if not prompts and not self._in_step:
            return
        places = [[t.slot for t in texts] for texts in readers]
        if kept is not None:
            places[-1].append(self.spare)
        logits = self.model.prefill(prompts, places)
        self.counts.prefills += len(prompts)
        self.counts.prefill_tokens += used
        choices = self._choices_of(prompts)
        if kept is not None:
            kept.kept, kept.logits = True, None if logits is None else logits[-1:]
            kept.choices = choices[-1]
        for texts, found in zip(readers, choices, strict=True):
            self._keep_routing(texts, found)
        self._begin([(texts, row) for row, texts in enumerate(readers)], logits)

    def _choices_of(self, prompts: list[Tensor]) -> list[Tensor | None]:
        """The recorded experts of each prompt of the pack, in order."""
        if self.model.choices is None:
            return [None] * len(prompts)
        lengths = [p.numel() for p in prompts]
        padding = self.model.choices.shape[0] - sum(lengths)
        return list(self.model.choices.split([*lengths, padding])[:-1])

    def _keep_routing(self, texts: list[Text], choices: Tensor | None) -> None:
        if choices is None:
            return
        for text in texts:
            # What was recorded when a token was first read stays.
            self.table.keep_routing(text.slot, text.held, choices[text.held :])

    def _fits(self, used: int, length: int) -> bool:
        return not used or used + length <= self.room

    def _admit(self, group: Group) -> list[Text]:
        count = min(len(group.requests), len(self.table.free))
        return self.table.admit([group.requests.popleft() for _ in range(count)], self.sampling)

    def _begin_from_kept(self) -> None:
        """Give free slots to the requests of a prompt that was read for others before."""
        if not self.groups or not self.groups[0].kept or not self.table.free:
            return
        group = self.groups[0]
        texts = self._admit(group)
        self.model.copy(self.spare, [t.slot for t in texts], len(group.prompt))
        self._keep_routing(texts, group.choices)
        self._begin([(texts, 0)], group.logits)
        if not group.requests:
            self.groups.popleft()

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
        """Read a token of every running text, and draw the next where that was the last known."""
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
        at_end = [i for i, t in enumerate(self.running) if t.held == t.known]
        texts = [self.running[i] for i in at_end]
        rows, positions = self.rows, self.positions
        if len(at_end) < len(self.running):
            rows, positions = self.table.where(texts)
            if logits is not None:
                logits = logits[torch.tensor(at_end, dtype=torch.int64, device=logits.device)]
        if texts and self._draw(texts, rows, positions, logits):
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
        idle = not (self.running or self.rereading or (self.groups and self.table.free))
        for slot, tokens in self.replies.take(idle and not self._in_step):
            text = self.table.texts[slot]
            if tokens is None:
                self._finish(text, "stop")
            elif text.known + len(tokens) >= text.limit:
                self._finish(text, "length")
            else:
                self.table.extend(text, tokens)
                text.pausing = False
                if text.known <= REREAD * len(tokens):
                    self.rereading.append(text)
                else:
                    self.running.append(text)
                    self._arrange()
