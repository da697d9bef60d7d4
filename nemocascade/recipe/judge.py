"""Settings of the judge, which compares and grades responses that no rule can verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

HOW = (
    *("url", "api_key_env", "concurrency", "timeout_s", "retries"),
    *("backoff_s", "deadline_s", "silence_s", "cache"),
)
"""Fields that affect how a judge is reached, but not its questions and answers."""


@dataclass(frozen=True)
class JudgeConfig:
    """The judge, its model and its limits."""

    kind: Literal["rule", "server", "artifact"] = "rule"
    """`server`: an OpenAI-compatible server, for example with a 235B generative reward model.
    `artifact`: a model of this project that runs on the training ranks by weight swap. `rule`: a
    fixed rule for tests and the tiny recipes; it has no knowledge of language."""

    url: str = ""
    """URL of the server, `http://host:port`. Proxies from the environment are not used."""

    model: str = ""
    """Name of the model on the server."""

    form: Literal["chat", "response_roles"] = "chat"
    """`chat`: a system and a user turn ask the question, for any model. `response_roles`: the two
    responses are turns with the roles response_1 and response_2, and the model's template adds the
    instructions, as for NVIDIA's GenRM models; these compare but do not grade."""

    api_key_env: str = ""
    """Environment variable that holds the server's key; empty = send none."""

    artifact: str = ""
    """Artifact folder of the judge; its tokenizer and shape must be the policy's."""

    thinking: bool = True
    """For an `artifact`: the question opens a reasoning block. A server uses its own template."""

    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 16_384
    """Largest number of tokens in an answer, including its reasoning."""

    concurrency: int = 64
    """Concurrent requests to a server from each data-parallel rank."""

    timeout_s: float = 600.0
    """Timeout of one request in seconds."""

    retries: int = 4
    """Number of retries after a failure, with doubling back-off. Retries while nobody listens, or
    after the statuses 429, 502, 503 and 504, do not count."""

    backoff_s: float = 1.0
    """Back-off before the first retry, in seconds."""

    deadline_s: float = 7200.0
    """Deadline of a question in seconds, including its time in the queue; then it is an error."""

    silence_s: float = 1800.0
    """A server that has answered nothing for this many seconds counts as down: questions fail at
    once until it answers one."""

    cache: str = ""
    """File that caches a server's answers by question, for restarts; empty = memory only."""

    def problems(self) -> list[str]:
        """Every rule that these settings break."""
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
        # The port is parsed here, and may raise ValueError.
        named = bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
    return named and parts.scheme in ("http", "https") and text.isascii() and text.isprintable()
