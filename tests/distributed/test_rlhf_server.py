"""RLHF beside a judge's server that is slow, fails every time, or refuses what it is asked."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from launch import RankError, run_ranks
from start_policy import start_policy
from test_rlhf import recipe

TIMEOUT_S = 5.0
"""Of collectives: no wait for verdicts may depend on it."""
SLOW_S = 0.7


def train(
    artifact: str,
    folder: str,
    judge: dict[str, Any],
    parallel: dict[str, int],
    heldout: int = 0,
) -> Any:
    """The lines of metrics.jsonl of one step, and whether the weights are the start's."""
    from dataclasses import replace

    import torch
    from safetensors.torch import load_file

    from nemocascade.recipe import RlEvalConfig
    from nemocascade.stages.grpo import run_grpo

    made = recipe(artifact, folder, judge, parallel, 1)
    made = replace(
        made,
        engine=replace(made.engine, timeout_s=TIMEOUT_S),
        eval=RlEvalConfig(prompts=heldout, every=1),
    )
    found = run_grpo(made)
    weights = [
        {k: v for f in sorted(Path(a).rglob("*.safetensors")) for k, v in load_file(f).items()}
        for a in (artifact, found)
    ]
    same = all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return {"lines": [json.loads(line) for line in text.splitlines()], "same": same}


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("policy"))
    (found,) = run_ranks(start_policy, 1, {"folder": folder, "domains": ["preference"]})
    return str(found)


@pytest.fixture
def server() -> Iterator[Callable[[Callable[[Any], None]], dict[str, Any]]]:
    """Starts a server that behaves as it is told; the settings of a judge that asks it."""
    started = []

    def start(behave: Callable[[Any], None]) -> dict[str, Any]:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                self.rfile.read(int(self.headers["Content-Length"]))
                behave(self)

            def log_message(self, *_: Any) -> None:
                """Quiet."""

        found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        found.daemon_threads = True
        threading.Thread(target=found.serve_forever, daemon=True).start()
        started.append(found)
        url = f"http://127.0.0.1:{found.server_port}"
        return {"kind": "server", "url": url, "model": "m", "retries": 0, "backoff_s": 0.01}

    yield start
    for each in started:
        each.shutdown()
        each.server_close()


def reply(handler: Any, status: int, content: str) -> None:
    data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(data)))
    handler.end_headers()
    handler.wfile.write(data)


def test_verdicts_may_take_longer_than_a_collective(
    policy: str, server: Any, tmp_path: Path
) -> None:
    """One rank asks, one question at a time, while the other waits for it; in the steps and in the
    comparison with the start."""
    texts = iter(range(10**6))

    def behave(handler: Any) -> None:
        time.sleep(SLOW_S)
        scores = {"score_1": 1 + next(texts) % 5, "score_2": 3, "ranking": 3}
        reply(handler, 200, json.dumps(scores))

    judge = {**server(behave), "concurrency": 1}
    arguments = {"artifact": policy, "folder": str(tmp_path), "judge": judge}
    started = time.monotonic()
    arguments |= {"parallel": {"tp": 2}, "heldout": 6}
    found = run_ranks(train, 2, arguments, timeout_s=170)
    # Four prompts of three answers are twelve questions; a task held out, two in both orders.
    assert time.monotonic() - started > 24 * SLOW_S
    assert min(12, 2 * 6) * SLOW_S > TIMEOUT_S
    (line,) = found[0]["lines"]
    assert (line["judge_unanswered"], line["verifier_errors"]) == (0, 0)
    assert line["grad_norm"] > 0
    assert not found[0]["same"]


def test_a_step_without_any_verdict_trains_nothing(
    policy: str, server: Any, tmp_path: Path
) -> None:
    """Not even the optimizer's momentum moves a weight; and the run goes on."""
    judge = server(lambda handler: reply(handler, 500, "oops"))
    arguments = {"artifact": policy, "folder": str(tmp_path), "judge": judge}
    found = run_ranks(train, 2, {**arguments, "parallel": {}}, timeout_s=170)
    (line,) = found[0]["lines"]
    assert line["verifier_errors"] == 12
    assert line["judge_unanswered"] == 1
    assert line["reward"] is None
    assert "grad_norm" not in line
    assert found[0]["same"]


def test_a_server_that_refuses_is_found_before_anything_is_written(
    policy: str, server: Any, tmp_path: Path
) -> None:
    judge = server(lambda handler: reply(handler, 404, "no such model"))
    arguments = {"artifact": policy, "folder": str(tmp_path), "judge": judge}
    with pytest.raises(RankError, match=r"judge refuses(.|\n)*no such model"):
        run_ranks(train, 2, {**arguments, "parallel": {}}, timeout_s=170)
    assert not (tmp_path / "metrics.jsonl").exists()
    assert not (tmp_path / "recipe.json").exists()
