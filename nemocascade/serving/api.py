"""Requests and replies of the OpenAI-compatible API: chat completions and completions.

Fields besides OpenAI's, named as in vLLM: `top_k`, `return_token_ids`, `stop_token_ids`,
`chat_template_kwargs.enable_thinking`, and `reasoning_content` of a message. A field that would
change the answer and is not supported is an error; fields that would not are ignored.
"""

from __future__ import annotations

import contextlib
import functools
import json
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from nemocascade.data.formats import parse_turns
from nemocascade.data.reply import Reply
from nemocascade.recipe import PicklableError
from nemocascade.rollout.engine import Sampling
from nemocascade.runtime.turns import parse_tools
from nemocascade.serving.model import OpenModel
from nemocascade.types import Message, Tool, ToolCall

MOST_CHOICES = 128
_SHOWN = 80
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "top_logprobs": (None, 0),
    "response_format": (None, {"type": "text"}),
    "tool_choice": (None, "auto", "none"),
    "functions": (None, []),
    "function_call": (None, "auto", "none"),
    "suffix": (None, ""),
    "best_of": (None, 1),
    "modalities": (None, ["text"]),
    "logit_processors": (None, []),
}
"""Values that leave the answer as it is, of fields that are not supported otherwise."""


_CONSTANTS = {"True": "true", "False": "false", "None": "null"}
"""JSON of Python's constants, which chat templates write in calls."""


class ApiError(PicklableError, ValueError):
    """A request that cannot be answered. status: of HTTP. param: the field."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def body(self) -> dict[str, Any]:
        """The error in OpenAI's form."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": None}
        return {"error": error}


@dataclass(frozen=True)
class Asked:
    """A parsed request.

    prompts: token ids of each. choices: answers to each. ends: texts that end an answer and are not
    part of it. ids_as_names: a token's text is `token_id:N`. with_echo: the text begins with the
    prompt. thinking: the prompt opens a reasoning block; None for a completion. tools: declared in
    the prompt; without any, a call is text. one_call: of several calls in an answer, only the first
    is returned.
    """

    prompts: list[list[int]]
    sampling: Sampling
    choices: int
    ends: tuple[str, ...] = ()
    is_stream: bool = False
    with_usage: bool = False
    with_logprobs: bool = False
    with_ids: bool = False
    ids_as_names: bool = False
    with_echo: bool = False
    thinking: bool | None = None
    tools: tuple[Tool, ...] = ()
    one_call: bool = False


def read_chat(body: Mapping[str, Any], model: OpenModel) -> Asked:
    """Parse the body of a chat completion. Raises ApiError."""
    if body.get("echo"):
        raise ApiError("echo is not supported here, but in completions: leave it out", "echo")
    messages = _parsed("messages", lambda: parse_turns(body.get("messages")))
    tools: tuple[Tool, ...] = ()
    if body.get("tool_choice") != "none":
        tools = _parsed("tools", lambda: parse_tools(body.get("tools")))
    if tools and not model.tokenizer.template.reads_calls:
        raise ApiError("calls in the form of this model's chat template cannot be read", "tools")
    given = body.get("chat_template_kwargs") or {}
    if not isinstance(given, Mapping):
        raise ApiError("chat_template_kwargs must be an object", "chat_template_kwargs")
    thinking = given.get("enable_thinking", model.settings.thinking)
    if not isinstance(thinking, bool):
        raise ApiError("enable_thinking must be true or false", "chat_template_kwargs")
    turns = messages_of(messages)
    prompt = _parsed(
        "messages", lambda: model.tokenizer.prompt_ids(turns, tools, thinking=thinking)
    )
    asked = _common(body, model, [prompt])
    return replace(
        asked,
        with_logprobs=_typed(body, "logprobs", bool, False),
        thinking=thinking,
        tools=tools,
        one_call=not _typed(body, "parallel_tool_calls", bool, True),
    )


def read_completion(body: Mapping[str, Any], model: OpenModel) -> Asked:
    """Parse the body of a completion; a prompt is text or token ids. Raises ApiError."""
    prompts = _prompts(body.get("prompt"), model)
    asked = _common(body, model, prompts)
    logprobs = body.get("logprobs")
    if logprobs not in (None, False, True, 0, 1):
        raise ApiError("logprobs may be 0 or 1: only the text's own tokens have them", "logprobs")
    with_echo = _typed(body, "echo", bool, False)
    if with_echo and asked.is_stream:
        raise ApiError("echo is not supported in a stream: remove one of them", "echo")
    with_logprobs = logprobs is not None and logprobs is not False
    return replace(asked, with_logprobs=with_logprobs, with_echo=with_echo)


def messages_of(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The turns of a prompt. Raises ApiError where no answer can follow them."""
    for number, message in enumerate(messages):
        if message.role == "system" and number:
            raise ApiError(f"message {number}: a system turn must come first", "messages")
    if messages[-1].role not in ("user", "tool"):
        raise ApiError(
            f"the last turn is the {messages[-1].role}'s: end with a user's or a tool's", "messages"
        )
    return tuple(messages)


def _common(body: Mapping[str, Any], model: OpenModel, prompts: list[list[int]]) -> Asked:
    """Parse the fields that both kinds of requests have."""
    named = body.get("model")
    if named not in (None, "", "default", model.name):
        raise ApiError(f"the model {_shown(named)} is not here, it is {model.name!r}", "model", 404)
    for name, neutral in _NEUTRAL.items():
        if name in body and body[name] not in neutral:
            raise ApiError(f"{name}({_shown(body[name])}) is not supported: leave it out", name)
    _check_bias(body, model)
    stops = _stops(body.get("stop"))
    ends = tuple(_ids(body.get("stop_token_ids") or [], "stop_token_ids", model))
    default = model.sampling
    is_endless = _typed(body, "ignore_eos", bool, False)
    known = () if is_endless else default.stop_tokens
    ends_shown: tuple[str, ...] = ()
    if not is_endless and _typed(body, "skip_special_tokens", bool, True):
        ends_shown = model.tokenizer.template.ends
    if not _typed(body, "include_stop_str_in_output", bool, False):
        ends_shown = (*ends_shown, *stops)
    limit = _limit(body, model)
    try:
        for prompt in prompts:
            model.max_new_tokens(prompt, limit)
        sampling = replace(
            default,
            temperature=_number(body, "temperature", default.temperature),
            top_p=_number(body, "top_p", default.top_p),
            top_k=max(0, _whole(body, "top_k", default.top_k, low=-1)),
            max_tokens=limit,
            stop_tokens=tuple(dict.fromkeys((*known, *((end,) for end in ends)))),
            stop_strings=stops,
            seed=_whole(body, "seed", secrets.randbits(63), low=-(2**63)),
        )
    except ApiError:
        raise
    except ValueError as error:
        raise ApiError(str(error)) from None
    options = body.get("stream_options") or {}
    return Asked(
        prompts=prompts,
        sampling=sampling,
        choices=_whole(body, "n", 1, low=1, high=MOST_CHOICES),
        ends=ends_shown,
        is_stream=_typed(body, "stream", bool, False),
        with_usage=isinstance(options, Mapping) and bool(options.get("include_usage")),
        with_ids=_typed(body, "return_token_ids", bool, False),
        ids_as_names=_typed(body, "return_tokens_as_token_ids", bool, False),
    )


def _limit(body: Mapping[str, Any], model: OpenModel) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        if body.get(name) is not None:
            return _whole(body, name, 0, low=1)
    return model.settings.max_tokens


def _prompts(value: Any, model: OpenModel) -> list[list[int]]:
    """Token ids of one or several prompts."""
    several = value if isinstance(value, list) and value else [value]
    if several is value and all(isinstance(v, int) and not isinstance(v, bool) for v in several):
        several = [several]
    found = []
    for prompt in several:
        if isinstance(prompt, str) and prompt:
            encode = functools.partial(model.tokenizer.encode, prompt, allow_special=True)
            found.append(_parsed("prompt", encode))
        elif isinstance(prompt, list) and prompt:
            found.append(_ids(prompt, "prompt", model))
        else:
            raise ApiError("prompt must be text, or token ids, or a list of either", "prompt")
    return found


def _ids(value: Any, name: str, model: OpenModel) -> list[int]:
    size = model.tokenizer.vocab_size
    is_list = isinstance(value, list)
    if not is_list or any(isinstance(i, bool) or not isinstance(i, int) for i in value):
        raise ApiError(f"{name} must be a list of token ids", name)
    foreign = next((i for i in value if not 0 <= i < size), None)
    if foreign is not None:
        raise ApiError(f"{name}: {_shown(foreign)} is not in the vocabulary of {size}", name)
    return list(value)


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise ApiError("stop must be a text or a list of texts, none of them empty", "stop")
    return tuple(stops)


def _check_bias(body: Mapping[str, Any], model: OpenModel) -> None:
    """A bias may only exclude ids that are never drawn."""
    size = model.tokenizer.vocab_size
    bias = body.get("logit_bias") or {}
    is_map = isinstance(bias, Mapping)
    if not is_map or any(not i.isdecimal() or int(i) < size for i in bias):
        raise ApiError("logit_bias is not supported: leave it out", "logit_bias")
    allowed = body.get("allowed_token_ids")
    if allowed is not None and allowed != list(range(size)):
        raise ApiError("allowed_token_ids is not supported: leave it out", "allowed_token_ids")


def _parsed[T](name: str, parse: Callable[[], T]) -> T:
    try:
        return parse()
    except ApiError:
        raise
    except ValueError as error:
        raise ApiError(f"{name}: {error}", name) from None


def _typed[T](body: Mapping[str, Any], name: str, kind: type[T], default: T) -> T:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise ApiError(f"{name}({_shown(value)}) must be of type {kind.__name__}", name)
    return value


def _number(body: Mapping[str, Any], name: str, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    # A whole number of JSON may be beyond float64.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not -sys.float_info.max <= value <= sys.float_info.max
    ):
        raise ApiError(f"{name}({_shown(value)}) must be a number", name)
    return float(value)


def _whole(
    body: Mapping[str, Any], name: str, default: int, *, low: int, high: int = 2**63 - 1
) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ApiError(f"{name}({_shown(value)}) must be a whole number from {low} to {high}", name)
    return value


def _shown(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def call_fields(calls: Sequence[ToolCall], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, with arguments of the types that the tools declare."""
    schemas = {tool.name: tool.parameters for tool in tools}
    return [
        {
            "index": number,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {
                "name": call.name,
                "arguments": json.dumps(
                    typed_arguments(call, schemas.get(call.name, {})), ensure_ascii=False
                ),
            },
        }
        for number, call in enumerate(calls)
    ]


def typed_arguments(call: ToolCall, schema: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call; text is read as JSON where the tool's schema wants another type."""
    properties = schema.get("properties") or {}
    found = {}
    for name, value in call.arguments.items():
        kinds = _declared_types(properties.get(name))
        if isinstance(value, str) and kinds and "string" not in kinds:
            # Text that is not JSON stays as the model wrote it.
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(_CONSTANTS.get(value, value))
        found[name] = value
    return found


def _declared_types(declared: Any) -> set[str]:
    """The JSON types that a parameter's schema allows; empty if it allows any."""
    if not isinstance(declared, Mapping):
        return set()
    # Optional parameters are often a choice of a type and null.
    choices = declared.get("anyOf") or declared.get("oneOf") or [declared]
    found: set[str] = set()
    for choice in choices if isinstance(choices, list) else []:
        kind = choice.get("type") if isinstance(choice, Mapping) else None
        kinds: list[Any] = kind if isinstance(kind, list) else [kind]
        if not all(isinstance(k, str) for k in kinds):
            return set()
        found |= set(kinds)
    return found


@dataclass(frozen=True)
class ServedAnswer:
    """An answer. text: without its end. reply: parsed, for a chat. names: text of each token."""

    ids: list[int]
    logprobs: list[float]
    names: list[str]
    finish: str
    text: str
    reply: Reply | None = None


def envelope(kind: str, number: str, model: OpenModel, choices: list[Any]) -> dict[str, Any]:
    """The fields around the choices of a reply or of a chunk."""
    return {
        "id": number,
        "object": kind,
        "created": int(time.time()),
        "model": model.name,
        "choices": choices,
    }


def usage(prompts: Sequence[Sequence[int]], written: int) -> dict[str, int]:
    """Numbers of tokens."""
    read = sum(map(len, prompts))
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def choice_fields(
    asked: Asked, index: int, prompt: list[int], answer: ServedAnswer
) -> dict[str, Any]:
    """A finished choice of a reply that is not streamed."""
    fields: dict[str, Any] = {"index": index, "finish_reason": answer.finish}
    fields["logprobs"] = logprob_fields(asked, answer.ids, answer.logprobs, answer.names)
    if asked.with_ids:
        fields |= {"token_ids": answer.ids, "prompt_token_ids": prompt}
    if asked.thinking is None:
        return fields | {"text": answer.text}
    assert answer.reply is not None
    said = answer.reply.message
    message: dict[str, Any] = {"role": "assistant", "content": said.content}
    if said.reasoning:
        message["reasoning_content"] = said.reasoning
    if said.tool_calls:
        calls = call_fields(said.tool_calls, asked.tools)
        message["tool_calls"] = [{k: v for k, v in c.items() if k != "index"} for c in calls]
        fields["finish_reason"] = "tool_calls"
    return fields | {"message": message}


def logprob_fields(
    asked: Asked, ids: Sequence[int], logprobs: Sequence[float], names: Sequence[str]
) -> dict[str, Any] | None:
    """Log-probabilities of tokens, in the form of the request's kind; None if nobody asked."""
    if not asked.with_logprobs:
        return None
    shown = [f"token_id:{i}" for i in ids] if asked.ids_as_names else list(names)
    if asked.thinking is None:
        ends = [0]
        for name in names:
            ends.append(ends[-1] + len(name))
        return {
            "tokens": shown,
            "token_logprobs": list(logprobs),
            "top_logprobs": None,
            "text_offset": ends[:-1],
        }
    return {
        "content": [
            {
                "token": token,
                "logprob": logprob,
                "bytes": list(name.encode("utf-8", "surrogatepass")),
                "top_logprobs": [],
            }
            for token, name, logprob in zip(shown, names, logprobs, strict=True)
        ]
    }
