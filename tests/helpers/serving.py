"""An artifact of a start policy, a server of it, and its client."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.commands import Command
from helpers.ranks import run_ranks


def made_artifact(folder: str) -> str:
    from helpers.start_policy import start_policy

    return start_policy(folder)


def model_of(client: Any) -> str:
    (found,) = client.models.list().data
    return str(found.id)


def start_artifact(folder: Path) -> str:
    """The artifact of a start policy, made in a process of its own."""
    (found,) = run_ranks(made_artifact, 1, {"folder": str(folder)})
    return str(found)


def served(artifact: str, folder: Path) -> Iterator[str]:
    """For a fixture: the address of a server of the artifact."""
    command = ["-m", "nemocascade.cli", "serve", artifact, "--port", "0"]
    command += ["--work-dir", str(folder), "--engine.precision", "fp32", "--slots", "4"]
    with Command([*command, "--max-tokens", "24"]) as process:
        while not (found := re.search(r"at (http://\S+)/v1", process.said())):
            assert process.poll() is None, process.said()
            time.sleep(0.05)
        yield found.group(1)
        process.send_signal(signal.SIGINT)
        done = process.wait(60)
    assert done.returncode == 0, done.stderr
    assert "ended by Ctrl-C" in done.stderr


def client_of(server: str) -> Any:
    """An openai client of a server."""
    import openai

    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
