"""Requests to a server's completions API, and its replies: token ids in, token ids out.

Ids are vLLM's `token_ids`, or `token_id:N` as the names of the log-probabilities. A reply is used
only if it is whole: ids of the vocabulary, within the limit, with a log-probability each.
"""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nemocascade.rollout.engine import Finish, Sampling

PATH = "/v1/completions"
_ID_PREFIX = "token_id:"
_FINISHES: dict[Any, Finish] = {"stop": "stop", "length": "length", "abort": "abort"}
_SHOWN = 300
# A log-probability may exceed 0 by the rounding of a softmax.
_ROUNDING = 1e-2


class BadReplyError(ValueError):
    """A reply is not a usable completion."""


@dataclass(frozen=True)
class ServerReply:
    """A reply's tokens. logprobs: of each. finish: why the server stopped. experts: [p + n - 1, L,
    K] integers for a prompt of p tokens and an answer of n, if the server returned them."""

    ids: list[int]
    logprobs: list[float]
    finish: Finish
    experts: Tensor | None = None


def request_body(
    model: str,
    tokens: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    *,
    number: int,
    drawn: Mapping[str, Any],
    text: str | None = None,
) -> bytes:
    """A request to continue `tokens` by at most `max_tokens`.

    number: the rollout's; with the seed and the length so far it decides the random numbers. drawn:
    from `drawn_ids`. text: of the tokens, for a server that exchanges text alone.
    """
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(tokens) if text is None else text,
        "max_tokens": max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        # Unique for every request and turn, and the same in every run.
        "seed": (sampling.seed * 1_000_003 + number * 8191 + len(tokens)) % 2**31,
        **drawn,
    }
    if text is None:
        body |= {
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "include_stop_str_in_output": True,
            # The request's stops decide, not those of the server's folder.
            "ignore_eos": True,
        }
    if sampling.stop_strings:
        body["stop"] = list(sampling.stop_strings)
    if sampling.stop_tokens and text is None:
        body["stop_token_ids"] = [s[0] for s in sampling.stop_tokens]
    if sampling.top_k:
        body["top_k"] = sampling.top_k
    return json.dumps(body).encode()


def drawn_ids(vocabulary: int, model_vocabulary: int) -> dict[str, Any]:
    """Fields of a request that keep a server from drawing ids that the tokenizer does not have.

    vocabulary: number of the tokenizer's ids. model_vocabulary: of the model's. Log-probabilities
    of the logits themselves do not change.
    """
    excluded = range(vocabulary, model_vocabulary)
    if len(excluded) <= vocabulary:
        return {"logit_bias": {str(i): -100 for i in excluded}} if excluded else {}
    return {"allowed_token_ids": list(range(vocabulary))}


def read_answer(
    reply: bytes,
    tokens: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    vocabulary: int,
    *,
    trains: bool = True,
    encode: Callable[[str], list[int]] | None = None,
) -> ServerReply:
    """The answer in a server's reply to `request_body`.

    vocabulary: ids from here on are not the model's. trains: every token needs a log-probability;
    False leaves those that are missing NaN. encode: for a server that exchanges text alone; the ids
    need not be those that it sampled.

    Raises BadReplyError for anything that is not a whole completion of `tokens`.
    """
    try:
        choice = json.loads(reply)["choices"][0]
        given = choice.get("logprobs") or {}
        ids = encode(choice["text"]) if encode else [int(i) for i in _ids_of(choice, given)]
        logprobs = [float(x) for x in given.get("token_logprobs") or ()]
        if not trains and len(logprobs) != len(ids):
            logprobs = [math.nan] * len(ids)
        finish = _FINISHES.get(choice["finish_reason"])
        prompt = choice.get("prompt_token_ids")
        experts = choice.get("routed_experts")
    except (
        *(LookupError, TypeError, ValueError, AttributeError, RecursionError),
        OverflowError,
    ) as error:
        raise BadReplyError(
            f"no completion with token ids ({type(error).__name__}: {error}): "
            f"{reply[:_SHOWN].decode(errors='replace')!r}"
        ) from None
    if finish is None:
        raise BadReplyError(f"finish_reason is {choice['finish_reason']!r}")
    if prompt is not None and prompt != list(tokens):
        raise BadReplyError("prompt_token_ids are not those that were sent")
    foreign = next((i for i in ids if not 0 <= i < vocabulary), None)
    if foreign is not None:
        raise BadReplyError(f"token id {foreign} is not in the vocabulary of {vocabulary}")
    if (len(ids) > max_tokens and encode is None) or (not ids and finish != "abort"):
        raise BadReplyError(f"{len(ids)} tokens where 1 to {max_tokens} were asked for")
    if len(logprobs) != len(ids):
        raise BadReplyError(
            f"{len(ids)} tokens with {len(logprobs)} log-probabilities: training needs one for each"
        )
    wrong = next((x for x in logprobs if not math.isfinite(x) or x > _ROUNDING), None)
    # The processed logits of a greedy answer are not probabilities.
    if wrong is not None and sampling.temperature and trains:
        raise BadReplyError(f"a log-probability is {wrong}")
    return ServerReply(ids, logprobs, finish, None if experts is None else _experts(experts))


def _ids_of(choice: dict[str, Any], logprobs: dict[str, Any]) -> Sequence[Any]:
    if choice.get("token_ids") is not None:
        found: Sequence[Any] = choice["token_ids"]
        return found
    names = logprobs.get("tokens") or []
    foreign = [name for name in names if not str(name).startswith(_ID_PREFIX)]
    if foreign:
        raise ValueError(f"tokens are named {foreign[0]!r}, not {_ID_PREFIX}N")
    return [str(name).removeprefix(_ID_PREFIX) for name in names]


def _experts(text: str) -> Tensor:
    """[tokens, L, K] int64 from vLLM's `routed_experts`: an .npy file in base64."""
    try:
        data = base64.b64decode(text, validate=True)
        if not data.startswith(np.lib.format.MAGIC_PREFIX):
            raise ValueError("no .npy file")
        array = np.load(io.BytesIO(data), allow_pickle=False)
        if array.ndim != 3 or array.dtype.kind not in "iu":
            raise ValueError(f"{array.dtype} {list(array.shape)}, not integers [tokens, L, K]")
    # The file's header is a Python literal, and its sizes may be any number.
    except Exception as error:
        raise BadReplyError(f"routed_experts cannot be read: {error}") from None
    return torch.from_numpy(array.astype(np.int64))
