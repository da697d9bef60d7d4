"""Replies of judges and of inference servers: HTTP bytes, server-sent events, JSON, verdicts."""

from __future__ import annotations

import base64
import functools
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz.harness import Target
from fuzz.mutations import Choices, edited, json_bytes, mutated, spoiled

from nemocascade.judges.cache import AnswerCache
from nemocascade.judges.prompts import comparison_text, grade_text, parse_comparison, parse_grade
from nemocascade.judges.server import _text_of
from nemocascade.rollout.completions import BadReplyError, read_answer
from nemocascade.rollout.engine import Sampling
from nemocascade.runtime.http import HttpClient, HttpError

CHAT: dict[str, Any] = {
    "id": "1",
    "object": "chat.completion",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": comparison_text(4, 2, 2)},
            "finish_reason": "stop",
        }
    ],
    "usage": {"total_tokens": 9},
}
CHATS: tuple[Any, ...] = (CHAT, {"error": {"message": "busy", "code": 503}}, [CHAT], {})
EXPERTS = base64.b64encode(
    b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (1, 1, 1), }".ljust(
        127
    )
    + b"\n\x01"
).decode()
"""A .npy file of one expert."""
COMPLETION: dict[str, Any] = {
    "choices": [
        {
            "text": "ab",
            "token_ids": [5, 6],
            "logprobs": {"tokens": ["token_id:5", "token_id:6"], "token_logprobs": [-0.5, -1.0]},
            "finish_reason": "stop",
            "prompt_token_ids": [1, 2, 3],
            "routed_experts": EXPERTS,
        }
    ]
}
NAMED: dict[str, Any] = {
    "choices": [
        {
            "logprobs": {"tokens": ["token_id:5", "token_id:6"], "token_logprobs": [-0.5, -1]},
            "finish_reason": "length",
        }
    ]
}
SERVED: tuple[Any, ...] = (COMPLETION, NAMED, None, [], {"choices": []})
VERDICTS = (
    comparison_text(4, 2, 2),
    grade_text(0.75),
    f"<think>\nfirst {grade_text(0.1)}\n</think>\n{grade_text(0.5)}",
    f"A is better.\n```json\n{comparison_text(1, 5, 6)}\n```",
)


def _reply(choices: Choices) -> bytes:
    data = json_bytes(mutated(choices, CHATS))
    if choices.chance(6):
        data = b"data: " + data + b"\n\ndata: [DONE]\n\n"
    return spoiled(choices, data)


def _read_reply(reply: bytes, folder: Path) -> None:
    text, cut = _text_of(reply)
    assert isinstance(text, str)
    assert isinstance(cut, bool)
    _verdict(text, folder)
    cache = AnswerCache(str(folder / "cache.jsonl"))
    cache.put("key", text)
    assert AnswerCache(str(folder / "cache.jsonl")).get("key") == text


def _verdict_text(choices: Choices) -> str:
    text = choices.of(VERDICTS)
    for _ in range(choices.below(4)):
        text = edited(choices, text)
    return text


def _verdict(text: str, folder: Path) -> None:
    found = parse_comparison(text)
    assert 1 <= found.first <= 5
    assert 1 <= found.second <= 5
    assert 1 <= found.ranking <= 6
    grade = parse_grade(text)
    assert grade is None or 0 <= grade <= 1


def _completion(choices: Choices) -> tuple[bool, bytes]:
    return choices.chance(4), spoiled(choices, json_bytes(mutated(choices, SERVED)))


def _complete(case: tuple[bool, bytes], folder: Path) -> None:
    free, body = case
    found = read_answer(body, (1, 2, 3), 64, Sampling(max_tokens=64), 100, trains=not free)
    assert len(found.ids) == len(found.logprobs)
    torch.tensor(found.ids)
    torch.tensor(found.logprobs, dtype=torch.float32)


RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"HTTP/1.1 429 Too Many\r\nRetry-After: 99999999999999999999\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 307 Moved\r\nLocation: http://localhost:1/\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 503 Busy\r\nContent-Length: 1\r\n\r\nx",
)
HEADERS = (
    *("\r\n", "\r\n\r\n", ": ", "Content-Length: -1\r\n", "Content-Length: " + "9" * 5000 + "\r\n"),
    *("Retry-After: ²\r\n", "Retry-After: " + "9" * 400 + "\r\n", "Retry-After: nan\r\n", "\0"),
    *("Location: \ud83d\r\n", "Content-Encoding: gzip\r\n", "HTTP/9.9 999 \r\n", "\x1b[2J", "ffff"),
    *("Transfer-Encoding: chunked\r\n", "Content-Length: 5\r\nContent-Length: 6\r\n", "a" * 9000),
)


def _http(choices: Choices) -> bytes:
    text = choices.of(RESPONSE).decode()
    for _ in range(choices.below(4)):
        text = edited(choices, text, HEADERS)
    return text.encode(errors="surrogatepass")


class _Loopback:
    """A server on loopback that answers every request with `body` and closes the connection."""

    def __init__(self) -> None:
        self.body = b""
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection:
                try:
                    # The request is small: it arrives whole.
                    connection.recv(1 << 16)
                    connection.sendall(self.body)
                except OSError:
                    continue


@functools.cache
def _loopback() -> tuple[_Loopback, HttpClient]:
    return _Loopback(), HttpClient(connections=1, max_bytes=1 << 16)


def _post(body: bytes, folder: Path) -> None:
    server, client = _loopback()
    server.body = body
    assert isinstance(client.post(server.url, b"{}", 3.0), bytes)


CACHE = tuple(
    json.dumps({"key": key, "text": text}) for key, text in (("a", "yes"), ("b", ""), ("a", "no"))
)


def _cache(choices: Choices) -> bytes:
    rows = [mutated(choices, [json.loads(row)]) for row in CACHE]
    return spoiled(choices, b"\n".join(map(json_bytes, rows)))


def _read_cache(data: bytes, folder: Path) -> None:
    path = folder / "cache.jsonl"
    path.write_bytes(data)
    cache = AnswerCache(str(path))
    assert isinstance(cache.get("a"), str | None)
    cache.put("c", "\ud83d new")
    assert AnswerCache(str(path)).get("c") == "\ud83d new"


def _target(
    name: str,
    make: Callable[[Choices], Any],
    run: Callable[[Any, Path], object],
    *rejections: type[BaseException],
    share: float = 1.0,
) -> Target:
    return Target(name, make, run, rejections, share)


TARGETS = (
    _target("judge reply", _reply, _read_reply, HttpError, share=6),
    _target("judge verdict", _verdict_text, _verdict, share=6),
    _target("server completion", _completion, _complete, BadReplyError, share=6),
    _target("http", _http, _post, HttpError, share=2),
    _target("judge cache", _cache, _read_cache, share=2),
)
