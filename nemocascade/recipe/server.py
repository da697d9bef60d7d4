"""Settings of the inference servers that generate rollouts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from nemocascade.recipe.paths import OutputPath, Urls, is_url
from nemocascade.recipe.rules import Count, Natural, Range, Seconds

HOW = (
    *("urls", "announce", "servers", "model", "api_key_env", "concurrency", "timeout_s"),
    *("retries", "wait_s", "weights", "weights_folder", "update_timeout_s"),
)
"""Fields that affect how servers are reached, but not what they generate."""

ALARMS = {"fp32": 1e-3, "bf16": 2e-2}
"""`probe_alarm` by precision, where it is left to the precision."""


@dataclass(frozen=True)
class RolloutServerConfig:
    """Inference servers for `rollout.engine server`: vLLM, or others by weights from a folder."""

    urls: Urls = ()
    """URLs of the servers, `http://host:port`. Proxies from the environment are not used."""

    announce: OutputPath = ""
    """Folder in which servers announce themselves, one JSON file each (`nemocascade-vllm` writes
    it). It may be empty at the start; it is read again before every weight update."""

    servers: Natural = 0
    """Number of servers to wait for, announced or named; 0 = all in `urls`, or one."""

    wait_s: Seconds = 1800.0
    """Longest wait for the first `servers` to answer, in seconds."""

    api: Literal["vllm", "sglang"] = "vllm"
    """How a server is paused and told to load weights."""

    model: str = "policy"
    """Name of the model on the servers."""

    api_key_env: str = ""
    """Environment variable that holds the key of the servers in `urls`; empty = send none."""

    concurrency: Count = 256
    """Concurrent requests from each data-parallel rank to all servers."""

    timeout_s: Seconds = 3600.0
    """Timeout of one request, that is of one turn, in seconds."""

    retries: Natural = 3
    """Number of times that a failed or aborted turn is asked for again, on another server where
    there is one. After that the rollout is dropped and counted."""

    weights: Literal["nccl", "gloo", "disk"] = "nccl"
    """How weights reach the servers after an optimizer step. `nccl`, and `gloo` for servers on
    CPUs: broadcast from the training ranks, for vLLM with the plugin `nemocascade_vllm`. `disk`:
    safetensors in `weights_folder`."""

    weights_folder: OutputPath = ""
    """Folder for weights `disk`, which the servers see by the same path; it needs space for two
    copies of the model. Empty: RUN/server_weights."""

    update_timeout_s: Seconds = 1800.0
    """Timeout of one weight update, in seconds."""

    pause: Literal["abort", "keep"] = "abort"
    """Requests in flight at a weight update, which are those of other clients, are aborted, or
    continued on the new weights."""

    probe_alarm: Annotated[float | None, Range(0, open_low=True)] = None
    """After every update, the log-probabilities of 64 tokens that each server generates are
    compared with the trainer's. A larger difference repeats the update once, then stops the stage.
    None: 1e-3 in fp32, 2e-2 in bf16."""

    logprobs: Literal["raw", "processed"] = "raw"
    """Log-probabilities that the servers return: of the logits, or of the logits at the sampling
    temperature (vLLM's `--logprobs-mode processed_logprobs`). Another temperature than 1 needs
    `processed`."""

    def problems(self) -> list[str]:
        """Every rule that these settings break, but for their numbers'."""
        found = [
            f"rollout.server.urls names {url!r}: it must be http://host:port of a server"
            for url in self.urls
            if not is_url(url)
        ]
        if not self.urls and not self.announce:
            found.append(
                "rollout.engine is server, but no server is named: set rollout.server.urls, or "
                "rollout.server.announce to the folder in which servers announce themselves"
            )
        if self.api != "vllm" and self.weights != "disk":
            found.append(
                f"rollout.server.weights({self.weights}) needs vLLM and its plugin: set "
                f"rollout.server.weights disk for {self.api}"
            )
        return found

    def alarm(self, precision: str) -> float:
        """The largest difference of log-probabilities that a probe may show."""
        return ALARMS[precision] if self.probe_alarm is None else self.probe_alarm


def sampling_problems(
    server: RolloutServerConfig, temperature: float, *, truncates: bool, truncated_logprobs: bool
) -> list[str]:
    """Sampling whose log-probabilities a server cannot give, under its `logprobs`.

    truncates: by top_p or top_k. truncated_logprobs: the setting of that name.
    """
    processed = server.logprobs == "processed"
    if truncates and truncated_logprobs != processed:
        return [
            f"rollout.server.logprobs({server.logprobs}) are those of "
            f"{'what top_p and top_k leave' if processed else 'all tokens'}: set "
            f"rollout.truncated_logprobs {processed}, or top_p 1 and top_k 0"
        ]
    if not processed and not math.isclose(temperature, 1.0):
        return [
            f"rollout.temperature({temperature}) needs log-probabilities at that temperature: "
            "start the servers with --logprobs-mode processed_logprobs and set "
            "rollout.server.logprobs processed"
        ]
    return []
