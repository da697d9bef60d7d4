"""Settings of the judge: who compares and grades responses that no rule verifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

HOW = (
    *("url", "api_key_env", "concurrency", "timeout_s", "retries"),
    *("backoff_s", "deadline_s", "silence_s", "cache"),
)
"""Settings of how a judge is reached: what it is asked, and answers, does not depend on them."""


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges, and how it is asked."""

    kind: Literal["rule", "server", "artifact"] = "rule"
    """`server`: an OpenAI-compatible server, such as one of a 235B generative reward model.
    `artifact`: a model of this project, whose weights take turns with the policy's on the training
    ranks. `rule`: a fixed rule, for tests and the tiny recipes; it knows nothing of language."""

    url: str = ""
    """Of the server, `http://host:port`. Proxies of the environment are not used."""

    model: str = ""
    """Name of the model on the server."""

    form: Literal["chat", "response_roles"] = "chat"
    """`chat`: the question stands in a system and a user turn, for any model. `response_roles`: the
    two responses are turns of the roles response_1 and response_2 and the model's template brings
    the instructions, as NVIDIA's GenRM models have it; those compare and don't grade."""

    api_key_env: str = ""
    """Environment variable that holds the server's key; empty = none is sent."""

    artifact: str = ""
    """Artifact folder of the judge; its tokenizer must be the policy's, and so must its shape."""

    thinking: bool = True
    """Of an `artifact`: the question opens a reasoning block. A server has its own template."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 16_384
    """Of an answer, its reasoning included."""

    concurrency: int = 64
    """Requests under way at a server at a time, from each data-parallel rank."""

    timeout_s: float = 600.0
    """Of one request."""

    retries: int = 4
    """Further tries after failures, each after twice the wait before. While nobody listens, and
    after the statuses 429, 502, 503 and 504, tries go on without counting."""

    backoff_s: float = 1.0
    """Wait before the first further try."""

    deadline_s: float = 7200.0
    """From when a question is asked, its turn in the queue included; then it is an error."""

    silence_s: float = 1800.0
    """A server that answers nothing for so long, though asked, is taken to be down: questions fail
    at once until it answers one."""

    cache: str = ""
    """File that keeps a server's answers by what was asked, for restarts; empty = memory only."""

    def problems(self) -> list[str]:
        """Every rule these settings break."""
        found = []
        if self.kind == "server" and not _is_url(self.url):
            found.append(f"judge.url({self.url!r}) must be http://host:port of the server")
        if self.kind == "server" and not self.model:
            found.append("judge.model is empty: name the model as the server does")
        if self.kind == "artifact" and not self.artifact:
            found.append("judge.artifact is empty: name the artifact folder of the judge")
        if not self.temperature >= 0:
            found.append(f"judge.temperature({self.temperature}) must be at least 0")
        if not 0 < self.top_p <= 1:
            found.append(f"judge.top_p({self.top_p}) must lie in (0, 1]")
        found += [
            f"judge.{name}({getattr(self, name)}) must be above 0"
            for name in ("max_tokens", "concurrency", "timeout_s", "deadline_s", "silence_s")
            if not getattr(self, name) > 0
        ]
        found += [
            f"judge.{name}({getattr(self, name)}) must not be negative"
            for name in ("retries", "backoff_s")
            if getattr(self, name) < 0
        ]
        return found


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        # The port is read, and may raise, here only.
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return named and parts.scheme in ("http", "https") and text.isascii() and text.isprintable()
