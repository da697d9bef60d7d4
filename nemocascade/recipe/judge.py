"""Settings of the judge, which compares and grades responses that no rule can verify."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from nemocascade.recipe.paths import ArtifactPath, OutputPath, Url, Urls, is_url
from nemocascade.recipe.rules import (
    Count,
    Natural,
    NonNegative,
    Probability,
    Range,
    Seconds,
    Tokens,
    number_problems,
)

HOW = (
    *("url", "urls", "announce", "servers", "api_key_env", "concurrency", "timeout_s", "retries"),
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

    url: Url = ""
    """URL of the server, `http://host:port`. Proxies from the environment are not used."""

    urls: Urls = ()
    """URLs of further servers of the same model. A question goes to the least loaded one."""

    announce: OutputPath = ""
    """Folder in which servers of the judge announce themselves (`nemocascade-vllm` writes it)."""

    servers: Natural = 0
    """Number of announced servers that the first question waits for; 0 = one."""

    model: str = ""
    """Name of the model on the server."""

    form: Literal["chat", "response_roles"] = "chat"
    """`chat`: a system and a user turn ask the question, for any model. `response_roles`: the two
    responses are turns with the roles response_1 and response_2, and the model's template adds the
    instructions, as for NVIDIA's GenRM models; these compare but do not grade."""

    api_key_env: str = ""
    """Environment variable that holds the server's key; empty = send none."""

    artifact: ArtifactPath = ""
    """Artifact folder of the judge; its tokenizer and shape must be the policy's."""

    thinking: bool = True
    """For an `artifact`: the question opens a reasoning block. A server uses its own template."""

    temperature: NonNegative = 0.6
    top_p: Probability = 0.95
    max_tokens: Tokens = 16_384
    """Largest number of tokens in an answer, including its reasoning."""

    concurrency: Count = 64
    """Concurrent requests to a server from each data-parallel rank."""

    timeout_s: Seconds = 600.0
    """Timeout of one request in seconds."""

    retries: Natural = 4
    """Number of retries after a failure, with doubling back-off. Retries while nobody listens, or
    after the statuses 429, 502, 503 and 504, do not count."""

    backoff_s: Annotated[float, Range(0, 86_400)] = 1.0
    """Back-off before the first retry, in seconds."""

    deadline_s: Seconds = 7200.0
    """Deadline of a question in seconds, including its time in the queue; then it is an error."""

    silence_s: Seconds = 1800.0
    """A server that has answered nothing for this many seconds counts as down: questions fail at
    once until it answers one."""

    cache: OutputPath = ""
    """File that caches a server's answers by question, for restarts; empty = memory only."""

    def problems(self) -> list[str]:
        """Every rule that these settings break."""
        found = number_problems(self, "envs.judge")
        if self.kind == "server":
            named = self.urls if self.url == "" and (self.urls or self.announce) else (self.url,)
            found += [
                f"envs.judge.url({url!r}) must be http://host:port of a server: start one for "
                f"{self.model or 'the judge'} and name it"
                for url in dict.fromkeys((*named, *self.urls))
                if not is_url(url)
            ]
        if self.kind == "server" and not self.model:
            found.append("envs.judge.model is empty: name the model as the server does")
        if self.kind == "artifact" and not self.artifact:
            found.append("envs.judge.artifact is empty: name the artifact folder of the judge")
        return found
