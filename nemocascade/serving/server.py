"""`nemocascade serve`: an OpenAI-compatible server on the live engine."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from nemocascade.recipe import RecipeError
from nemocascade.recipe.errors import UserError
from nemocascade.rollout.engine import Completion
from nemocascade.runtime.launcher import world_size_of_environment
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.strict_json import parse_json
from nemocascade.serving.answers import Answers
from nemocascade.serving.api import (
    ApiError,
    Asked,
    ServedAnswer,
    call_fields,
    choice_fields,
    envelope,
    logprob_fields,
    read_chat,
    read_completion,
    usage,
)
from nemocascade.serving.echo import PromptScores, echo_fields
from nemocascade.serving.model import OpenModel, open_model
from nemocascade.serving.settings import ServeSettings
from nemocascade.serving.text import ReplyText, StreamDecoder, TextDelta

MOST_BYTES = 64 << 20
"""Largest body of a request."""
_DISCONNECT_S = 1.0


class ServeError(UserError, RuntimeError):
    """The server cannot listen."""


def serve(settings: ServeSettings) -> None:
    """Serve until Ctrl-C or SIGTERM.

    Raises RecipeError for several ranks, CapacityError if memory does not hold a sequence as long
    as the context, and ServeError if the address cannot be used.
    """
    if (size := world_size_of_environment()) > 1:
        raise RecipeError(
            [f"serve runs in one process, and there are {size}: start it without torchrun"]
        )
    with open_model(settings) as model:
        model.engine.reserve(model.load)
        answers = Answers(model)
        config = uvicorn.Config(
            application(answers),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
        )
        server = uvicorn.Server(config)
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        thread = threading.Thread(target=_listen, args=(server, answers), name="http", daemon=True)
        thread.start()
        try:
            while not server.started and thread.is_alive():
                thread.join(0.05)
            if not server.started:
                raise ServeError(
                    f"cannot listen at {settings.host}:{settings.port}: choose another --port, or "
                    "end the process that has it"
                )
            port = server.servers[0].sockets[0].getsockname()[1]
            LOGGER.info("%s at http://%s:%d/v1 (Ctrl-C ends)", model.name, settings.host, port)
            # The engine runs here, so that its errors and Ctrl-C end the program.
            answers.run()
        except KeyboardInterrupt:
            LOGGER.info("ended by Ctrl-C")
        finally:
            answers.close()
            server.should_exit = True
            thread.join(10)


def _listen(server: uvicorn.Server, answers: Answers) -> None:
    try:
        server.run()
    # uvicorn exits if it cannot bind.
    except SystemExit:
        pass
    finally:
        answers.close()


def application(answers: Answers) -> Starlette:
    """The routes of the API."""
    model = answers.model

    card = {
        "id": model.name,
        "object": "model",
        "created": int(time.time()),
        "owned_by": "nemocascade",
        "max_model_len": model.context,
    }

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [card]})

    async def named(request: Request) -> Response:
        if (asked := request.path_params["name"]) != model.name:
            error = ApiError(f"the model {asked!r} is not here, it is {model.name!r}", "model", 404)
            return JSONResponse(error.body(), error.status)
        return JSONResponse(card)

    async def health(_: Request) -> Response:
        return Response()

    async def chat(request: Request) -> Response:
        return await _answer(request, answers, read_chat, "chat.completion", "chatcmpl")

    async def completions(request: Request) -> Response:
        return await _answer(request, answers, read_completion, "text_completion", "cmpl")

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/v1/models", models),
            Route("/v1/models/{name:path}", named),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", completions, methods=["POST"]),
        ],
        exception_handlers={Exception: _failed},
    )


async def _failed(request: Request, error: Exception) -> Response:
    """Log an error of this program, which uvicorn's silenced logger would not show."""
    LOGGER.error("%s failed", request.url.path, exc_info=error)
    found = ApiError(f"{type(error).__name__}: see the log of the server", status=500)
    return JSONResponse(found.body(), found.status)


async def _answer(
    request: Request,
    answers: Answers,
    read: Callable[[Mapping[str, Any], OpenModel], Asked],
    kind: str,
    prefix: str,
) -> Response:
    try:
        body = await _body(request)
        # Templates and tokenizers take a while.
        asked = await asyncio.to_thread(read, body, answers.model)
        choices = [
            _Choice(answers, asked, prompt, place)
            for place, prompt in enumerate(p for p in asked.prompts for _ in range(asked.choices))
        ]
        number = f"{prefix}-{secrets.token_hex(12)}"
        for choice in choices:
            choice.start()
    except ApiError as error:
        return JSONResponse(error.body(), error.status)
    if asked.is_stream:
        chunks = _chunks(choices, asked, number, kind, answers.model)
        return StreamingResponse(chunks, media_type="text/event-stream")
    watch = asyncio.create_task(_cancelled_by(request, choices))
    try:
        found = [await choice.whole() for choice in choices]
        scores = [await choice.scores() for choice in choices]
    except ApiError as error:
        return JSONResponse(error.body(), error.status)
    finally:
        watch.cancel()
        for choice in choices:
            choice.cancel()
    fields = [
        choice_fields(asked, c.place, c.prompt, a) for c, a in zip(choices, found, strict=True)
    ]
    if asked.with_echo:
        for field, choice, answer, scored in zip(fields, choices, found, scores, strict=True):
            field |= echo_fields(asked, choice.prompt, scored, answer, answers.model)
    reply = envelope(kind, number, answers.model, fields)
    reply["usage"] = usage(asked.prompts, sum(len(a.ids) for a in found))
    return JSONResponse(reply)


async def _body(request: Request) -> Mapping[str, Any]:
    data = b""
    async for part in request.stream():
        data += part
        if len(data) > MOST_BYTES:
            raise ApiError(f"the body has more than {MOST_BYTES} bytes", status=413)
    try:
        body = parse_json(data)
    except ValueError as error:
        raise ApiError(f"the body is not JSON: {error}") from None
    if not isinstance(body, Mapping):
        raise ApiError("the body must be a JSON object")
    return body


async def _cancelled_by(request: Request, choices: list[_Choice]) -> None:
    """End the choices once the client has gone."""
    while not await request.is_disconnected():
        await asyncio.sleep(_DISCONNECT_S)
    for choice in choices:
        choice.cancel()


async def _chunks(
    choices: list[_Choice], asked: Asked, number: str, kind: str, model: OpenModel
) -> AsyncIterator[str]:
    """The events of a streamed reply."""
    name = f"{kind}.chunk" if asked.thinking is not None else kind
    merged: asyncio.Queue[dict[str, Any] | ApiError | None] = asyncio.Queue()

    async def follow(choice: _Choice) -> None:
        try:
            async for fields in choice.deltas():
                await merged.put(fields)
        except ApiError as error:
            await merged.put(error)
        await merged.put(None)

    tasks = [asyncio.create_task(follow(choice)) for choice in choices]
    left = len(tasks)
    try:
        while left:
            found = await merged.get()
            if found is None:
                left -= 1
            elif isinstance(found, ApiError):
                yield _event(found.body())
                return
            else:
                yield _event(envelope(name, number, model, [found]))
        if asked.with_usage:
            written = sum(choice.written for choice in choices)
            yield _event(
                envelope(name, number, model, []) | {"usage": usage(asked.prompts, written)}
            )
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        for choice in choices:
            choice.cancel()


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _fields(delta: TextDelta) -> dict[str, Any]:
    return {"reasoning_content" if delta.part == "reasoning" else "content": delta.text}


class _Choice:
    """One answer of a request: a `Sink` whose tokens are read in the server's event loop.

    place: among all answers of the request. Those to one prompt are consecutive.
    """

    def __init__(self, answers: Answers, asked: Asked, prompt: list[int], place: int) -> None:
        self._answers, self._asked, self.prompt, self.place = answers, asked, prompt, place
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, float] | Completion | None] = asyncio.Queue()
        self._decoder = StreamDecoder(answers.model.tokenizer)
        self._number: int | None = None
        self.written = 0

    def start(self) -> None:
        """Submit the request. Raises ApiError once the engine has ended."""
        sampling = self._asked.sampling
        max_tokens = self._answers.model.max_new_tokens(self.prompt, sampling.max_tokens)
        try:
            self._number = self._answers.submit(
                self.prompt,
                replace(sampling, max_tokens=max_tokens),
                self.place % self._asked.choices,
                self,
            )
        except RuntimeError as error:
            raise ApiError(str(error), status=503) from None

    def cancel(self) -> None:
        """End the answer, if it has not ended."""
        if self._number is not None:
            self._answers.cancel(self._number)

    def token(self, token: int, logprob: float) -> None:
        """Implements `Sink.token`."""
        self._put((token, logprob))

    def end(self, completion: Completion | None) -> None:
        """Implements `Sink.end`."""
        self._put(completion)

    def _put(self, item: tuple[int, float] | Completion | None) -> None:
        # At the end of the program, nobody listens any longer.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def whole(self) -> ServedAnswer:
        """The finished answer. Raises ApiError if the engine ended before."""
        ids: list[int] = []
        logprobs: list[float] = []
        names: list[str] = []
        text = self._text()
        while isinstance(item := await self._queue.get(), tuple):
            ids.append(item[0])
            logprobs.append(item[1])
            names.append(self._decoder.add(item[0]))
            text.add(names[-1])
        text.add(self._decoder.rest())
        return self._finished(item, text, ids, logprobs, names)

    async def scores(self) -> PromptScores | None:
        """Scores of the prompt's tokens, if it is repeated with them. Raises ApiError if they
        cannot be had."""
        if not (self._asked.with_echo and self._asked.with_logprobs):
            return None
        try:
            return await asyncio.wrap_future(self._answers.score(self.prompt))
        except RuntimeError as error:
            raise ApiError(str(error), status=503) from None

    async def deltas(self) -> AsyncIterator[dict[str, Any]]:
        """The fields of each chunk. Raises ApiError if the engine ended before."""
        asked, text = self._asked, self._text()
        is_chat = asked.thinking is not None
        if is_chat:
            yield self._chunk({"role": "assistant", "content": ""})
        ids: list[int] = []
        while isinstance(item := await self._queue.get(), tuple):
            token, logprob = item
            ids.append(token)
            self.written += 1
            name = self._decoder.add(token)
            new = text.add(name)
            extra: dict[str, Any] = {}
            if asked.with_logprobs:
                extra["logprobs"] = logprob_fields(asked, [token], [logprob], [name])
            if asked.with_ids:
                extra["token_ids"] = [token]
                if len(ids) == 1:
                    extra["prompt_token_ids"] = self.prompt
            deltas = list(map(_fields, new)) or ([{}] if extra else [])
            for number, delta in enumerate(deltas):
                yield self._chunk(delta, **(extra if number == 0 else {}))
        for part in text.add(self._decoder.rest()):
            yield self._chunk(_fields(part))
        answer = self._finished(item, text, ids, [], [])
        reason = answer.finish
        if answer.reply is not None:
            for part in text.finish(answer.reply):
                yield self._chunk(_fields(part))
            if calls := call_fields(answer.reply.message.tool_calls, asked.tools):
                yield self._chunk({"tool_calls": calls})
                reason = "tool_calls"
        elif rest := text.rest():
            yield self._chunk({"content": rest})
        yield self._chunk({}, finish_reason=reason)

    def _chunk(self, delta: dict[str, Any], **extra: Any) -> dict[str, Any]:
        fields: dict[str, Any] = {"index": self.place, "finish_reason": None, **extra}
        if self._asked.thinking is None:
            return fields | {"text": delta.get("content", "")}
        return fields | {"delta": delta}

    def _text(self) -> ReplyText:
        asked, template = self._asked, self._answers.model.tokenizer.template
        if asked.thinking is None:
            return ReplyText(None, asked.ends)
        reasoning = template.reasoning(asked.thinking)
        return ReplyText(reasoning, asked.ends, with_calls=bool(asked.tools))

    def _finished(
        self,
        completion: Completion | None,
        text: ReplyText,
        ids: list[int],
        logprobs: list[float],
        names: list[str],
    ) -> ServedAnswer:
        if completion is None:
            raise ApiError("the engine has ended", status=503)
        thinking = self._asked.thinking
        reply = None
        if thinking is not None:
            template = self._answers.model.tokenizer.template
            reply = template.parse(text.raw, thinking=thinking, with_calls=bool(self._asked.tools))
            if self._asked.one_call:
                message = replace(reply.message, tool_calls=reply.message.tool_calls[:1])
                reply = replace(reply, message=message)
        return ServedAnswer(ids, logprobs, names, completion.finish, text.raw, reply)
