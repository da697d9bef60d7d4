"""An engine on an inference server: vLLM, SGLang, or any OpenAI-compatible completions server.

Where the server supports it, token ids are exchanged: the prompt as ids, the response's ids as
vLLM's `token_ids` or as `token_id:N` in the names of its log-probabilities. For a text-only server,
a `TextCodec` converts both ways. Encoding its text again need not give the ids that it sampled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist

from nemocascade.rollout.engine import Completion, Finish, Request, Respond, Sampling
from nemocascade.runtime.http import HttpClient, HttpError
from nemocascade.runtime.world import World

RETRIES = 3
_FIRST_WAIT_S = 0.2
_MAX_BYTES = 256 << 20
"""Limit on a reply: enough for ids, names and log-probabilities of 256K tokens."""
_ID_PREFIX = "token_id:"


class ServerError(RuntimeError):
    """The server is unreachable, rejects a request, or returns an invalid completion."""


class TextCodec(Protocol):
    """Converts text to token ids and back."""

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str: ...


@dataclass(frozen=True)
class _Answer:
    """Generated token ids, their log-probabilities, and the finish reason."""

    ids: list[int]
    logprobs: list[float]
    finish: Finish


class OpenAIEngine:
    """An `Engine` on a server at `url` (`http://host:port`), which serves `model`.

    world: the first rank of each data-parallel group sends the requests and shares the completions
    with the group; None means a single process. weights: writes the current weights as a Hugging
    Face checkpoint folder; called before each run, then the server is told to load them by
    `reload_path`. concurrency: largest number of concurrent requests. codec: for a text-only
    server. logprobs: False accepts responses without log-probabilities, which become NaN.
    at_temperature: the server reports log-probabilities of softmax(logits / temperature), as vLLM
    does with `--logprobs-mode processed_logprobs`; the default is softmax(logits).
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        world: World | None = None,
        weights: Callable[[], Path] | None = None,
        reload_path: str = "/update_weights_from_disk",
        concurrency: int = 64,
        timeout_s: float = 600.0,
        api_key: str = "",
        codec: TextCodec | None = None,
        logprobs: bool = True,
        at_temperature: bool = False,
    ) -> None:
        self.url, self.model, self.world = url.rstrip("/"), model, world
        self.weights, self.reload_path = weights, reload_path
        self.concurrency, self.timeout_s = concurrency, timeout_s
        self._http = HttpClient(key=api_key, connections=concurrency, max_bytes=_MAX_BYTES)
        self.codec, self.logprobs, self.at_temperature = codec, logprobs, at_temperature

    def run(
        self, requests: Sequence[Request], sampling: Sampling, respond: Respond | None = None
    ) -> Iterator[Completion]:
        """Implements `Engine.run`.

        Raises ValueError for settings that no server supports, ServerError if the server fails.
        """
        self._check(sampling)
        if self.weights is not None:
            self.load_weights()
        group = None if self.world is None else self.world.groups.mp
        if group is None or group.size() == 1:
            return self._completions(requests, sampling, respond)
        return iter(self._shared(requests, sampling, respond))

    def load_weights(self) -> None:
        """Write the weights, on all ranks, and make the server load them."""
        if self.weights is None:
            raise ValueError("this engine was given nothing that writes `weights`")
        folder = self.weights()
        if self.world is None or self.world.is_main:
            self._post(self.reload_path, {"model_path": str(folder)})
        if self.world is not None:
            self.world.barrier()

    def _check(self, sampling: Sampling) -> None:
        faults = []
        if any(len(s) > 1 for s in sampling.stop_tokens):
            faults.append(
                "servers stop at single tokens or at strings, not at sequences of tokens: use "
                "stop_strings"
            )
        if self.logprobs and sampling.temperature not in (0, 1) and not self.at_temperature:
            faults.append(
                f"at temperature({sampling.temperature}) the log-probabilities of softmax(logits) "
                "are not those of the policy: let the server give them at the temperature, and set "
                "at_temperature"
            )
        if faults:
            raise ValueError("OpenAIEngine: " + "; ".join(faults))

    def _shared(
        self, requests: Sequence[Request], sampling: Sampling, respond: Respond | None
    ) -> list[Completion]:
        """Completions of the first rank, broadcast to its data-parallel group."""
        assert self.world is not None
        group = self.world.groups.mp
        box: list[Any] = [None]
        if group.rank() == 0:
            try:
                box[0] = list(self._completions(requests, sampling, respond))
            except Exception as error:
                box[0] = error
        dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
        if isinstance(box[0], Exception):
            raise ServerError(f"the first rank of the group failed: {box[0]}") from box[0]
        found: list[Completion] = box[0]
        return found

    def _completions(
        self, requests: Sequence[Request], sampling: Sampling, respond: Respond | None
    ) -> Iterator[Completion]:
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="openai")
        try:
            asked = [pool.submit(self._complete, r, sampling, respond) for r in requests]
            for future in as_completed(asked):
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _complete(
        self, request: Request, sampling: Sampling, respond: Respond | None
    ) -> Completion:
        """Generate one rollout with its environment turns; every policy turn is one request."""
        tokens, written = list(request.prompt), [False] * len(request.prompt)
        logprobs = [0.0] * len(request.prompt)
        limit, turns = len(tokens) + sampling.max_tokens, 0
        while True:
            answer = self._ask(request, tokens, limit - len(tokens), sampling)
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

    def _ask(self, request: Request, tokens: list[int], room: int, sampling: Sampling) -> _Answer:
        prompt: Any = tokens if self.codec is None else self.codec.decode(tokens)
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": room,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            # Unique for every request and turn, and the same in every run.
            "seed": (sampling.seed * 1_000_003 + request.id * 8191 + len(tokens)) % 2**31,
            "stop": list(sampling.stop_strings) or None,
        }
        if self.codec is None:
            body |= {
                "return_token_ids": True,
                "return_tokens_as_token_ids": True,
                "skip_special_tokens": False,
                "include_stop_str_in_output": True,
                "stop_token_ids": [s[0] for s in sampling.stop_tokens] or None,
            }
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        if self.logprobs:
            body["logprobs"] = 0
        body = {name: value for name, value in body.items() if value is not None}
        return self._read(self._post("/v1/completions", body), request)

    def _read(self, found: Any, request: Request) -> _Answer:
        try:
            choice = found["choices"][0]
            given = choice.get("logprobs") or {}
            ids = self._ids_of(choice, given)
            logprobs = given.get("token_logprobs")
            finish: Finish = "length" if choice["finish_reason"] == "length" else "stop"
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ServerError(
                f"request {request.id}: {self.url} answered no completion with ids "
                f"({type(error).__name__}: {error}): {str(found)[:300]}"
            ) from None
        if not self.logprobs:
            return _Answer(ids, [float("nan")] * len(ids), finish)
        if logprobs is None or len(logprobs) != len(ids):
            count = "none" if logprobs is None else str(len(logprobs))
            raise ServerError(
                f"request {request.id}: {self.url} gave {len(ids)} tokens and {count} "
                "log-probabilities: training needs one for each token, so use a server that gives "
                "them, or set logprobs=False where nothing is trained"
            )
        return _Answer(ids, [float(x) for x in logprobs], finish)

    def _ids_of(self, choice: dict[str, Any], logprobs: dict[str, Any]) -> list[int]:
        if self.codec is not None:
            return self.codec.encode(choice["text"], allow_special=True)
        ids = choice.get("token_ids")
        if ids is None:
            names = logprobs["tokens"]
            foreign = [n for n in names if not str(n).startswith(_ID_PREFIX)]
            if foreign:
                raise ValueError(f"tokens are named {foreign[0]!r}, not {_ID_PREFIX}N")
            ids = [str(n).removeprefix(_ID_PREFIX) for n in names]
        return [int(i) for i in ids]

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        """POST JSON, with retries and back-off if the server is unreachable or fails."""
        try:
            text = self._http.post_retrying(
                self.url + path,
                json.dumps(body).encode(),
                self.timeout_s,
                retries=RETRIES,
                backoff_s=_FIRST_WAIT_S,
            )
            return json.loads(text) if text.strip() else None
        except (HttpError, ValueError) as error:
            raise ServerError(f"POST {self.url}{path} failed: {error}") from None
