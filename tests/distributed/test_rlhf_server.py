"""RLHF with a judge server that is slow, always fails, or rejects its requests."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.rlhf import recipe
from helpers.start_policy import start_policy

TIMEOUT_S = 4.0
"""Timeout of collectives: no wait for verdicts may depend on it."""
SLOW_S = 0.5
HELDOUT = 6


def stages(folder: str, judges: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """On two ranks, one step of a stage under each judge: the lines of its metrics.jsonl, whether
    its weights are the start's, seconds; or the error that ended it."""
    from dataclasses import replace

    import torch
    from safetensors.torch import load_file

    from nemocascade.recipe import RecipeError, RlEvalConfig
    from nemocascade.rl.learning_signal import NothingLearntError
    from nemocascade.runtime.launcher import MainRankError
    from nemocascade.stages.grpo import run_grpo

    def weights(artifact: str) -> dict[str, torch.Tensor]:
        files = sorted(Path(artifact).rglob("*.safetensors"))
        return {name: tensor for f in files for name, tensor in load_file(f).items()}

    policy = start_policy(f"{folder}/policy", ("preference",))
    found: dict[str, Any] = {}
    for name, judge in judges.items():
        # Weights of one layout can be compared; the start's is that of the failing stage.
        layout = {"tp": 2} if name == "slow" else {}
        made = recipe(policy, f"{folder}/{name}", judge, layout, 1)
        made = replace(
            made,
            engine=replace(made.engine, timeout_s=TIMEOUT_S),
            # Held-out tasks are compared with the start's answers, in both orders.
            eval=RlEvalConfig(prompts=HELDOUT if name == "slow" else 0, every=1),
        )
        started = time.monotonic()
        try:
            artifact = str(run_grpo(made))
        except (RecipeError, MainRankError) as error:
            found[name] = {"error": str(error)}
            continue
        except NothingLearntError as error:
            lines = Path(f"{folder}/{name}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
            found[name] = {
                "error": str(error),
                "lines": [json.loads(line) for line in lines],
                "artifact": Path(f"{folder}/{name}/artifact").exists(),
            }
            continue
        text = Path(f"{folder}/{name}/metrics.jsonl").read_text(encoding="utf-8")
        ours, theirs = weights(artifact), weights(policy)
        found[name] = {
            "lines": [json.loads(line) for line in text.splitlines()],
            "same": all(torch.equal(ours[key], theirs[key]) for key in theirs),
            "seconds": time.monotonic() - started,
        }
    return found


def reply(handler: Any, status: int, content: str) -> None:
    data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def slow(handler: Any) -> None:
    time.sleep(SLOW_S)
    # Of the question, so that responses differ.
    scores = {"score_1": 1 + handler.length % 5, "score_2": 3, "ranking": 3}
    reply(handler, 200, json.dumps(scores))


BEHAVIOURS: dict[str, Callable[[Any], None]] = {
    "slow": slow,
    "failing": lambda handler: reply(handler, 500, "oops"),
    "rejecting": lambda handler: reply(handler, 404, "no such model"),
}


class Handler(BaseHTTPRequestHandler):
    """Behaves as its server says."""

    server: Any

    def do_POST(self) -> None:
        self.length = int(self.headers["Content-Length"])
        self.rfile.read(self.length)
        self.server.behave(self)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    servers: list[Any] = []
    judges = {}
    for name, behave in BEHAVIOURS.items():
        server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads, server.behave = True, behave
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        judges[name] = {
            "kind": "server",
            "url": f"http://127.0.0.1:{server.server_port}",
            "model": "m",
            "retries": 0,
            "backoff_s": 0.01,
            "concurrency": 1,
        }
    folder = str(tmp_path_factory.mktemp("rlhf_server"))
    found = run_ranks(stages, 2, {"folder": folder, "judges": judges}, timeout_s=300)
    yield {**found[0], "folder": folder, "of_rank_1": found[1]}
    for server in servers:
        server.shutdown()
        server.server_close()


def test_verdicts_may_take_longer_than_a_collective(runs: dict[str, Any]) -> None:
    """One rank asks, one question at a time, while the other waits for it; in the step and in the
    comparison with the start."""
    # Four prompts of three answers are twelve questions.
    assert min(12, 2 * HELDOUT) * SLOW_S > TIMEOUT_S
    found = runs["slow"]
    assert found["seconds"] > (12 + 2 * HELDOUT) * SLOW_S
    (line,) = found["lines"]
    assert (line["judge_unanswered"], line["verifier_errors"]) == (0, 0)
    assert line["grad_norm"] > 0


def test_a_step_without_any_verdict_trains_nothing(runs: dict[str, Any]) -> None:
    """The step is skipped, and the stage ends without an artifact."""
    (line,) = runs["failing"]["lines"]
    assert line["verifier_errors"] == 12
    assert line["judge_unanswered"] == 1
    assert line["reward"] is None
    assert "grad_norm" not in line
    assert "had no verdict" in runs["failing"]["error"]
    assert not runs["failing"]["artifact"]


def test_a_server_that_rejects_is_found_before_anything_is_written(runs: dict[str, Any]) -> None:
    for found in (runs, runs["of_rank_1"]):
        assert "judge rejects" in found["rejecting"]["error"]
        assert "no such model" in found["rejecting"]["error"]
    folder = Path(runs["folder"]) / "rejecting"
    assert not (folder / "metrics.jsonl").exists()
    assert not (folder / "recipe.json").exists()
