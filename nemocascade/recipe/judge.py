"""Settings of the judge: who compares and grades responses that no rule verifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class JudgeConfig:
    """Who judges, and how it is asked."""

    kind: Literal["rule", "server", "artifact"] = "rule"
    """`server`: an OpenAI-compatible server, such as one of a 235B generative reward model.
    `artifact`: a model of this project, whose weights take turns with the policy's on the training
    ranks. `rule`: a fixed rule, for tests and the tiny recipes; it knows nothing of language."""

    url: str = ""
    """Of the server, `http://host:port`."""

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
    """Further tries after a failure, each after twice the wait before."""

    backoff_s: float = 1.0
    """Wait before the first further try."""

    deadline_s: float = 3600.0
    """Of all tries of one question together; then it is an error."""

    cache: str = ""
    """File that keeps a server's answers by what was asked, for restarts; empty = memory only."""

    def problems(self) -> list[str]:
        """Every rule these settings break."""
        found = []
        if self.kind == "server" and not self.url.startswith(("http://", "https://")):
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
            for name in ("max_tokens", "concurrency", "timeout_s", "deadline_s")
            if not getattr(self, name) > 0
        ]
        found += [
            f"judge.{name}({getattr(self, name)}) must not be negative"
            for name in ("retries", "backoff_s")
            if getattr(self, name) < 0
        ]
        return found
