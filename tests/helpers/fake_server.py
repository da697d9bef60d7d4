"""A loopback server with vLLM's API, whose model is a formula, and which fails on demand.

Each token is the sum of the last two and one, modulo 50. Its log-probability is -0.01 times the
token, times `scale`: the mean of the first tensor of the last weight update, or 1.
"""

from __future__ import annotations

import base64
import io
import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade_vllm.link import Link

VOCABULARY = 50
SLOW_S = 30.0


def continued(prompt: list[int], count: int) -> list[int]:
    """The prompt and the next tokens."""
    ids = list(prompt)
    for _ in range(count):
        ids.append((sum(ids[-2:]) + 1) % VOCABULARY)
    return ids


def logprobs(tokens: Tensor, prompt: int, scale: float = 1.0) -> Tensor:
    """Log-probabilities of the tokens after the prompt."""
    return -0.01 * scale * tokens[prompt:].float()


class FakeServer(ThreadingHTTPServer):
    """seen: path, body and key of each request. faults: of the next completions, one after another;
    "" is none. fault: of all others. stale: weight updates change nothing."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.seen: list[tuple[str, dict[str, Any], str | None]] = []
        self.faults: list[str] = []
        self.fault = ""
        self.model, self.scale, self.stale = "policy", 1.0, False
        self.busy, self.most_busy = 0, 0
        self.fail_update, self.layers, self.top_k = "", 0, 2
        self.received: dict[str, Tensor] = {}
        self.links: list[Link] = []
        self.lock = threading.Lock()

    def handle_error(self, *_: Any) -> None:
        """Quiet: clients close connections."""

    @property
    def paths(self) -> list[str]:
        return [path for path, _, _ in self.seen]


class Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply(200, {"data": [{"id": self.server.model}]})
        else:
            self.reply(200, {"world_size": 1})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "{}")
        with self.server.lock:
            self.server.seen.append((self.path, body, self.headers.get("Authorization")))
        if self.path == "/v1/completions":
            with self.server.lock:
                self.server.busy += 1
                self.server.most_busy = max(self.server.most_busy, self.server.busy)
                fault = self.server.faults.pop(0) if self.server.faults else self.server.fault
            try:
                self.complete(body, fault)
            finally:
                with self.server.lock:
                    self.server.busy -= 1
        elif self.path == "/init_weight_transfer_engine":
            join(self.server, body["init_info"])
            self.reply(200, {})
        elif self.path == "/update_weights":
            if self.server.fail_update:
                self.server.fail_update = ""
                for link in self.server.links:
                    link.close()
                self.server.links = []
                self.reply(500, {"error": "the worker died"})
            else:
                receive(self.server, body["update_info"])
                self.reply(200, {})
        else:
            self.reply(200, {"success": True})

    def complete(self, body: dict[str, Any], fault: str) -> None:
        if fault.isdigit():
            self.reply(int(fault), {"error": "overloaded"})
        elif fault == "slow":
            time.sleep(SLOW_S)
        elif fault == "drop":
            linger = struct.pack("ii", 1, 0)  # a reset, in place of an orderly end
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
        elif fault == "nonsense":
            self.reply(200, {"choices": "?"})
        else:
            self.reply(200, {"choices": [self.choice(body, fault)]})

    def choice(self, body: dict[str, Any], fault: str) -> dict[str, Any]:
        prompt = list(body["prompt"])
        ids, finish = list(prompt), "length"
        count = body["max_tokens"]
        if fault == "abort":
            count, finish = count // 2, "abort"
        while len(ids) - len(prompt) < count:
            ids = continued(ids, 1)
            if ids[-1] in body.get("stop_token_ids", ()):
                finish = "stop"
                break
        written = ids[len(prompt) :]
        values = logprobs(torch.tensor(written), 0, self.server.scale).tolist()
        if fault == "wrong_ids":
            written = [*written[:-1], VOCABULARY]
        elif fault == "short":
            values = values[:-1]
        elif fault == "nan":
            values = [*values[:-1], float("nan")]
        found: dict[str, Any] = {
            "text": "",
            "finish_reason": "error" if fault == "finish" else finish,
            "logprobs": {
                "tokens": [f"token_id:{i}" for i in written],
                "token_logprobs": values,
            },
        }
        if fault == "no_logprobs":
            del found["logprobs"]
        if fault != "names":
            found["token_ids"] = written
        if fault == "text":
            del found["token_ids"]
            found["logprobs"]["tokens"] = ["a"] * len(written)
        if self.server.layers:
            shape = (len(ids) - 1, self.server.layers, self.server.top_k)
            data = io.BytesIO()
            np.save(data, np.arange(np.prod(shape), dtype=np.int16).reshape(shape) % 4)
            found["routed_experts"] = base64.b64encode(data.getvalue()).decode()
        return found

    def reply(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


def join(server: FakeServer, info: dict[str, Any]) -> None:
    """Join the groups of a weight transfer, as the plugin does."""
    store = dist.TCPStore(
        info["host"], info["port"], is_master=False, timeout=timedelta(seconds=30)
    )
    server.links = [
        Link(
            info["transport"],
            store,
            f"{info['name']}/{number}",
            info["rank_offset"],
            info["size"],
            timeout_s=30.0,
            peer=info["host"],
        )
        for number in range(info["links"])
    ]


def receive(server: FakeServer, info: dict[str, Any]) -> None:
    """Receive the tensors of an update."""
    found = {}
    for name, dtype, shape, link in zip(
        info["names"], info["dtypes"], info["shapes"], info["links"], strict=True
    ):
        tensor = torch.empty(shape, dtype=getattr(torch, dtype))
        server.links[link].broadcast(tensor)
        found[name] = tensor
    server.received = found
    if not server.stale:
        server.scale = float(next(iter(found.values())).float().mean())


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A running server."""
    server = FakeServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
