"""RLHF stages end to end under each judge: rules, an artifact on the ranks, a server that fails."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks
from helpers.rlhf import recipe
from helpers.start_policy import sft_recipe, start_policy

DOMAINS = ("preference",)
LAYOUTS = {"TP2": {"tp": 2}, "DP2": {}}
EXACT = ("reward", "response_tokens", "groups", "trained_tokens", "judge_unparsed")
OVER_START = "heldout/preference_over_start"
TIMING = {"rollout_time_s", "step_time_s", "tokens_per_s", "tflops_per_rank", "mfu"} | {
    *("peak_memory_gib", "generation_time_s", "verify_wait_s", "verify_time_s", "train_time_s"),
    *("decode_time_s", "prefill_time_s", "idle_time_s", "decode_steps", "decode_rows"),
    *("preemptions", "offloads", "prefill_tokens", "verdicts", "checkpoint_blocked_s"),
}

Lines = list[dict[str, Any]]


def train(
    artifact: str,
    folder: str,
    judge: dict[str, Any],
    parallel: dict[str, Any] | None = None,
    steps: int = 2,
) -> Lines:
    """metrics.jsonl of a stage."""
    from nemocascade.stages.grpo import run_grpo

    run_grpo(recipe(artifact, folder, judge, parallel or {}, steps))
    text = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def artifact_judge(artifact: str) -> dict[str, Any]:
    return {"kind": "artifact", "artifact": artifact, "max_tokens": 6, "thinking": False}


def asked(policy: str, judge: str, folder: str) -> dict[str, Any]:
    """Answers of an artifact's judge, and whether the policy's weights stay as they are."""
    import torch

    from nemocascade.judges.prompts import compare_question
    from nemocascade.stages.policy import policy_run
    from nemocascade.train.weight_swap import live_tensors
    from nemocascade.types import Message

    questions = [compare_question((Message("user", "hi"),), f"a{i}", "b") for i in range(5)]
    with policy_run(recipe(policy, folder, artifact_judge(judge), {}, 1)) as run:
        environment: Any = run.environments["preference"]
        before = [t.detach().clone() for t in live_tensors(run.trainer.chunks)]
        answers = [a.text for a in environment.judge.ask(questions)]
        after = live_tensors(run.trainer.chunks)
        return {
            "same": all(torch.equal(a, b) for a, b in zip(before, after, strict=True)),
            "answers": answers,
            "fewer": [a.text for a in environment.judge.ask([questions[3], questions[3]])],
        }


def alone(folder: str, url: str) -> dict[str, Any]:
    """One process: a run under each judge, and one that was stopped after its first step."""
    from dataclasses import replace

    from nemocascade.stages.sft import run_sft

    policy = start_policy(f"{folder}/sft", DOMAINS)
    other = replace(sft_recipe(f"{folder}/judge", DOMAINS), steps=4, init_from=policy)
    judge = str(run_sft(other))
    rule = {"kind": "rule"}
    server = {"kind": "server", "url": url, "model": "m", "retries": 1, "backoff_s": 0.01}
    server |= {"timeout_s": 1.0, "deadline_s": 5.0}
    train(policy, f"{folder}/parts", rule, steps=1)
    return {
        "policy": policy,
        "judge": judge,
        "rule": train(policy, f"{folder}/whole", rule),
        "start": json.loads(Path(f"{folder}/whole/heldout_start.json").read_text()),
        "parts": train(policy, f"{folder}/parts", rule),
        "artifact": train(policy, f"{folder}/artifact", artifact_judge(judge)),
        "server": train(policy, f"{folder}/server", server),
        "judged": asked(policy, judge, f"{folder}/asked"),
        "judged_by_itself": asked(policy, policy, f"{folder}/itself"),
    }


def together(policy: str, judge: str, folder: str) -> dict[str, Lines]:
    """Two ranks: the artifact judges on every layout, rules beside data parallelism."""
    found = {
        name: train(policy, f"{folder}/{name}", artifact_judge(judge), parallel)
        for name, parallel in LAYOUTS.items()
    }
    return {**found, "rule": train(policy, f"{folder}/rule2", {"kind": "rule"})}


class Moody(BaseHTTPRequestHandler):
    """A judge that favours the longer response, where it answers at all."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"]
        mood = sum(text.encode()) % 3
        first, second = (
            text.split(f"<response_{k}>\n")[1].split(f"\n</response_{k}>")[0] for k in (1, 2)
        )
        scores = {"score_1": 4, "score_2": 2} if len(first) > len(second) else {}
        said = {"score_1": 2, "score_2": 4, "ranking": 3.5, **scores}
        content = "no idea" if mood == 1 else json.dumps(said)
        data = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
        self.send_response(500 if mood == 0 else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    found = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{found.server_port}"
    found.shutdown()
    found.server_close()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, server: str) -> dict[str, Any]:
    folder = str(tmp_path_factory.mktemp("rlhf"))
    (found,) = run_ranks(alone, 1, {"folder": folder, "url": server}, timeout_s=900)
    return {**found, "folder": folder}


@pytest.fixture(scope="module")
def two(runs: dict[str, Any]) -> dict[str, Lines]:
    """Metrics of two ranks, by layout and judge."""
    arguments = {name: runs[name] for name in ("policy", "judge", "folder")}
    found: dict[str, Lines] = run_ranks(together, 2, arguments, timeout_s=900)[0]
    return found


@pytest.mark.parametrize("judge", ["rule", "artifact", "server"])
def test_it_trains_on_comparisons(runs: dict[str, Any], judge: str) -> None:
    lines = runs[judge]
    assert len(lines) == 2
    for line in lines:
        assert line["groups"] == 4
        assert line["grad_norm"] > 0
        assert 0 <= line[OVER_START] <= 1
        assert 0 <= line["heldout/preference"] <= 1
    assert lines[0]["kl"] == pytest.approx(0, abs=1e-6), "the start is its own reference"
    assert lines[1]["kl"] > 1e-6


def test_the_start_ties_with_itself(runs: dict[str, Any]) -> None:
    log = (Path(runs["folder"]) / "whole" / "log.txt").read_text()
    assert "before: heldout/preference 0." in log
    assert runs["start"][OVER_START] == 0.5
    assert 0 <= runs["start"]["heldout/preference"] <= 1
    assert f"{OVER_START} 0.500" in log.split("before: ")[1].splitlines()[0]


def test_a_stopped_run_goes_on_as_it_would_have(runs: dict[str, Any]) -> None:
    for ours, theirs in zip(runs["parts"], runs["rule"], strict=True):
        # The time of verdicts is also given by domain.
        assert {k: v for k, v in ours.items() if k.partition("/")[0] not in TIMING} == {
            k: v for k, v in theirs.items() if k.partition("/")[0] not in TIMING
        }


def test_a_server_that_fails_stops_nothing_and_scores_nothing(runs: dict[str, Any]) -> None:
    for name in ("judge_unanswered", "judge_unparsed"):
        assert 0 < sum(line[name] for line in runs["server"]) < 2, name
    text = (Path(runs["folder"]) / "server/rollouts/step_00000001.jsonl").read_text()
    for sample in map(json.loads, text.splitlines()):
        pairs = sample["details"].get("pairs", 0)
        assert pairs + sample["details"]["unanswered"] == 2
        assert (sample["reward"] is None) == (pairs == 0)
    assert (Path(runs["folder"]) / "server/artifact/manifest.json").exists()


def test_the_judges_weights_leave_no_trace(runs: dict[str, Any]) -> None:
    assert runs["judged"]["same"]
    answers = runs["judged"]["answers"]
    assert answers != runs["judged_by_itself"]["answers"], "it is the judge that answers"
    assert len(set(answers)) > 1
    assert runs["judged"]["fewer"] == [answers[3]] * 2, "an answer is of its question alone"


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_an_artifact_judges_alike_on_every_layout(
    name: str, runs: dict[str, Any], two: dict[str, Lines]
) -> None:
    for ours, theirs in zip(two[name], runs["artifact"], strict=True):
        for key in EXACT:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9), (key, ours["step"])


@pytest.mark.slow
def test_groups_are_dealt_to_the_ranks(runs: dict[str, Any], two: dict[str, Lines]) -> None:
    for ours, theirs in zip(two["rule"], runs["rule"], strict=True):
        for key in (*EXACT, OVER_START, "heldout/preference"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-9), (key, ours["step"])
