"""An engine on inference servers, which get the weights after every optimizer step.

Token ids go in and out, so that what trains is what was sampled. A turn that a server cuts off, or
that fails, is asked for again from the last good token, on another server where there is one; after
`retries` the rollout is dropped, and its finish is `abort`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from dataclasses import replace
from threading import Event
from typing import Protocol

import torch
import torch.distributed as dist

from nemocascade.recipe import ModelConfig
from nemocascade.recipe.server import RolloutServerConfig
from nemocascade.rollout.completions import (
    PATH,
    BadReplyError,
    ServerReply,
    drawn_ids,
    read_answer,
    request_body,
)
from nemocascade.rollout.engine import Completion, Request, Respond, Sampling, Work, as_work
from nemocascade.rollout.flight import Flight, request_name
from nemocascade.rollout.servers import Server, ServerError, ServerPool
from nemocascade.rollout.weight_updates import WeightUpdates
from nemocascade.runtime.http import HttpError, backoff
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.stopping import StopAsked
from nemocascade.runtime.world import World

_FIRST_WAIT_S = 0.2
_SHARE_S = 0.5
"""Longest time between two exchanges of finished rollouts in a data-parallel group."""
_POLL_S = 0.1
_IDLE_S = 0.01
"""Intervals for polling the work: with requests in flight, and without."""


class TextCodec(Protocol):
    """Converts text to token ids and back, as a tokenizer does."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class ServerEngine:
    """An `Engine` on the servers that the settings name.

    world: the first rank of each data-parallel group sends the requests and gets the completions;
    None means a single process. updates: brings the weights of the live model to
    the servers; None for servers whose weights never change. vocabulary: ids from here on are
    rejected; model_vocabulary: of the model, if it is larger, see `drawn_ids`. routing: the shape
    of a model whose experts completions carry, for router replay. trains: False accepts answers
    without log-probabilities. codec: for servers that exchange text alone, where nothing trains.
    """

    is_shared = False

    def __init__(
        self,
        settings: RolloutServerConfig,
        *,
        vocabulary: int,
        model_vocabulary: int = 0,
        world: World | None = None,
        updates: WeightUpdates | None = None,
        routing: ModelConfig | None = None,
        trains: bool = True,
        codec: TextCodec | None = None,
    ) -> None:
        self.settings, self.world, self.updates = settings, world, updates
        self.vocabulary, self.routing = vocabulary, routing
        self.drawn = drawn_ids(vocabulary, model_vocabulary)
        self.trains, self.codec = trains, codec
        self.pool = ServerPool(settings, rank=0 if world is None else world.dp_rank)
        self._outdated = updates is not None
        self._found = False

    def run(
        self, requests: Sequence[Request] | Work, sampling: Sampling, respond: Respond | None = None
    ) -> Iterator[Completion]:
        """Implements `Engine.run`. With `updates`, all ranks call it at the same time.

        Raises ValueError for settings that no server supports, ServerError if no server can be
        used.
        """
        work = as_work(requests)
        used = {sampling, *(r.sampling or sampling for r in work.requests.values())}
        if any(len(stop) > 1 for s in used for stop in s.stop_tokens):
            raise ValueError(
                "servers stop at single tokens or at strings, not at sequences of tokens: use "
                "stop_strings"
            )
        if self.updates is not None and self._outdated:
            self.updates.update(self.pool)
            self._outdated = False
        elif self.updates is None and not self._found:
            self.pool.use(self.pool.wait_for_first(lambda _: None))
            self._found = True
        if self.world is not None:
            self.world.watch.enter("rollout: generation")
        group = None if self.world is None else self.world.groups.mp
        if group is None or group.size() == 1:
            return (c for c in self._completions(work, sampling, respond) if c is not None)
        return self._shared(group, work, sampling, respond)

    def release(self) -> None:
        """Implements `Engine.release`: nothing to do, the servers have their own memory."""

    def weights_changed(self) -> None:
        """Implements `Engine.weights_changed`: the next run updates the servers first."""
        self._outdated = self.updates is not None

    def metrics(self) -> dict[str, float]:
        """Implements `Engine.metrics`: failures by kind, and the last weight update."""
        found = {f"server_{name}": float(n) for name, n in sorted(self.pool.counts.items())}
        if self.updates is not None:
            found |= {f"update_{name}": value for name, value in self.updates.seconds.items()}
            found |= {"update_probe": self.updates.probe}
        return found

    def close(self) -> None:
        """Cut off all requests and free what the updates hold."""
        if self.updates is not None:
            self.updates.close()
        self.pool.close()

    def _shared(
        self,
        group: dist.ProcessGroup,
        work: Work,
        sampling: Sampling,
        respond: Respond | None,
    ) -> Iterator[Completion]:
        """The completions, on the first rank of a data-parallel group as they finish; the others
        wait for the end."""
        first, source = group.rank() == 0, dist.get_global_rank(group, 0)
        own = self._completions(work, sampling, respond)
        done = False
        while not done:
            found: list[Completion] = []
            failure, own_error, stopped = "", None, False
            until = time.monotonic() + _SHARE_S
            while first and not done and time.monotonic() < until:
                try:
                    completion = next(own)
                except StopIteration:
                    done = True
                except StopAsked:
                    done = stopped = True
                except Exception as error:
                    own_error, done = error, True
                    failure = f"{type(error).__name__}: {error}"
                else:
                    found += [] if completion is None else [completion]
            box = [(done, failure, stopped)]
            dist.broadcast_object_list(box, src=source, group=group)
            done, failure, stopped = box[0]
            yield from found
            if stopped:
                raise StopAsked
            if own_error is not None:
                raise own_error
            if failure:
                raise ServerError(f"the first rank of the group failed: {failure}")

    def _completions(
        self, work: Work, sampling: Sampling, respond: Respond | None
    ) -> Iterator[Completion | None]:
        """Completions as they finish, and None after each poll interval without one."""
        flight = Flight(self.pool, self.settings.concurrency)
        finished, taken, is_open = 0, 0, True
        try:
            while flight.asked or is_open:
                if self.world is not None and self.world.stop.asked():
                    raise StopAsked
                if is_open:
                    busy = len(flight.asked)
                    work.check()
                    supply = work.poll(self.settings.concurrency - busy, busy)
                    is_open, taken = supply.is_open, taken + len(supply.taken)
                    for request in (work.requests[i] for i in supply.taken):
                        how = request.sampling or sampling
                        complete = functools.partial(self._complete, request, how, respond)
                        flight.ask(request.id, complete)
                    flight.cancel(set(supply.cancelled))
                    if not flight.asked:
                        work.idle()
                        time.sleep(_IDLE_S)
                        yield None
                        continue
                wait_s = _POLL_S if is_open else _SHARE_S
                done, _ = wait(flight.asked, wait_s, return_when=FIRST_COMPLETED)
                found = flight.take(done)
                finished += len(found)
                if self.world is not None:
                    self.world.watch.progress(f"{finished} of {taken} sequences done")
                yield from found
                yield None
        finally:
            flight.close()

    def _complete(
        self, request: Request, sampling: Sampling, respond: Respond | None, stop: Event
    ) -> Completion:
        """Generate one rollout with its environment turns; every policy turn is one request.

        stop: nobody waits for it any more.
        """
        tokens, written = list(request.prompt), [False] * len(request.prompt)
        logprobs = [0.0] * len(request.prompt)
        limit, turns = len(tokens) + sampling.max_tokens, 0
        while True:
            answer = self._turn(request, tokens, limit - len(tokens), sampling, stop)
            turns += 1
            tokens += answer.ids
            written += [True] * len(answer.ids)
            logprobs += answer.logprobs
            completion = Completion(
                request=request,
                tokens=torch.tensor(tokens),
                written=torch.tensor(written),
                logprob=torch.tensor(logprobs, dtype=torch.float32),
                finish=answer.finish,
                turns=turns,
                routing=answer.experts,
            )
            added = None
            if respond is not None and answer.finish == "stop" and len(tokens) < limit:
                added = respond(completion)
            if added is None:
                return completion
            if len(tokens) + len(added) >= limit:
                return replace(completion, finish="length")
            tokens += added
            written += [False] * len(added)
            logprobs += [0.0] * len(added)

    def _turn(
        self, request: Request, tokens: list[int], max_tokens: int, sampling: Sampling, stop: Event
    ) -> ServerReply:
        """One turn, from as many answers as it takes; its finish is `abort` if it was given up."""
        ids: list[int] = []
        logprobs: list[float] = []
        tried: set[Server] = set()
        for attempt in range(self.settings.retries + 1):
            if stop.is_set():
                break
            server = self.pool.take(tried, may_rest=self.updates is None)
            tried.add(server)
            failure, asked_s, gone = "", None, False
            try:
                answer = self._ask(
                    server, request, [*tokens, *ids], max_tokens - len(ids), sampling
                )
            except HttpError as error:
                if stop.is_set():
                    self.pool.give_back(server)
                    return ServerReply(ids, logprobs, "abort")
                failure, asked_s = str(error), error.wait_s
                gone = error.kind in ("unreachable", "connection")
                self.pool.count(error.kind)
                if error.final:
                    self.pool.give_back(server)
                    raise _final(server, error) from None
            except BadReplyError as error:
                failure = str(error)
                self.pool.count("nonsense")
            self.pool.give_back(server, failure, gone=gone)
            if not failure:
                ids += answer.ids
                logprobs += answer.logprobs
                if answer.finish != "abort":
                    return ServerReply(ids, logprobs, answer.finish, answer.experts)
                self.pool.count("aborted")
                if len(ids) >= max_tokens:
                    return ServerReply(ids, logprobs, "length", answer.experts)
                continue
            LOGGER.debug("request %d on %s: %s", request.id, server.url, failure)
            if attempt < self.settings.retries and not gone:
                stop.wait(backoff(attempt, _FIRST_WAIT_S, asked_s))
        if not stop.is_set():
            self.pool.count("dropped")
        return ServerReply(ids, logprobs, "abort")

    def _ask(
        self,
        server: Server,
        request: Request,
        tokens: list[int],
        max_tokens: int,
        sampling: Sampling,
    ) -> ServerReply:
        """A server's answer to one request that continues `tokens`.

        Raises HttpError if there is none, and BadReplyError for one that cannot be used.
        """
        codec = self.codec
        body = request_body(
            self.settings.model,
            tokens,
            max_tokens,
            sampling,
            number=request.id,
            drawn=self.drawn,
            text=None if codec is None else codec.decode(tokens),
        )
        reply = server.post(PATH, body, self.settings.timeout_s, request_name(request.id))
        answer = read_answer(
            reply,
            tokens,
            max_tokens,
            sampling,
            self.vocabulary,
            trains=self.trains,
            encode=None if codec is None else codec.encode,
        )
        return self._checked(answer, len(tokens) + len(answer.ids))

    def _checked(self, answer: ServerReply, length: int) -> ServerReply:
        """The answer with the experts of all tokens but the last, if they are wanted."""
        shape = self.routing
        if shape is None or answer.finish == "abort":
            return replace(answer, experts=None)
        if answer.experts is None:
            raise ServerError(
                "rollout.replay_routing needs the experts of every token, and the servers return "
                "none: start them with --enable-return-routed-experts, or turn it off"
            )
        experts = answer.experts[: length - 1]
        wanted = [length - 1, shape.pattern.count("E"), shape.experts_per_token]
        if list(experts.shape) != wanted:
            raise BadReplyError(f"routed_experts have shape {list(experts.shape)}, not {wanted}")
        if (
            experts.numel()
            and not 0 <= int(experts.min()) <= int(experts.max()) < shape.num_experts
        ):
            raise BadReplyError(f"routed_experts name experts outside 0..{shape.num_experts - 1}")
        return replace(answer, experts=experts)


def _final(server: Server, error: HttpError) -> Exception:
    """The error for a request that no retry can fix."""
    if error.kind == "closed":
        return ServerError("the requests were cut off, because the engine was closed")
    return ServerError(f"the rollout server {server.url} rejects the request: {error}")
