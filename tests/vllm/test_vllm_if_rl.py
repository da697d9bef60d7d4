"""IF-RL of the tiny model with a real vLLM as rollout engine learns as the live engine does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.vllm_server import ROOT, missing, vllm_server

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]

STEPS = 10
MISMATCH = 1e-4
DOMAIN = "heldout/instruction_following"


def run(*arguments: str) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def if_rl(start: Path, folder: Path, *more: str) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The scores before the first step, and metrics.jsonl."""
    run(
        "recipes/tiny/if_rl.py",
        *("--init-from", str(start), "--run-dir", str(folder), "--steps", str(STEPS)),
        *("--eval.prompts", "128", "--log.every", "1", *more),
    )
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    before = json.loads((folder / "heldout_start.json").read_text(encoding="utf-8"))
    return before, [json.loads(line) for line in text.splitlines()]


@pytest.mark.timeout(1800)
def test_if_rl_learns_on_a_server_as_on_the_live_engine(tmp_path: Path) -> None:
    start = Path(os.environ.get("NEMOCASCADE_START", tmp_path / "sft" / "artifact"))
    if not start.exists():
        run("recipes/tiny/domains_sft.py", "--run-dir", str(tmp_path / "sft"))
    run("-m", "nemocascade.cli", "convert", str(start), str(tmp_path / "hf"))
    with vllm_server(tmp_path / "hf", tmp_path / "servers"):
        before, served = if_rl(
            start,
            tmp_path / "served",
            *("--rollout.engine", "server", "--rollout.server.weights", "gloo"),
            *("--rollout.server.announce", str(tmp_path / "servers")),
        )
    start_live, live = if_rl(start, tmp_path / "live")
    shown = {name: [round(m["reward"], 3) for m in found] for name, found in
             {"server": served, "live": live}.items()}  # fmt: skip
    gains = [served[-1][DOMAIN] - before[DOMAIN], live[-1][DOMAIN] - start_live[DOMAIN]]
    print(f"rewards {shown}; held-out gains: server {gains[0]:.3f}, live {gains[1]:.3f}")
    print("mismatch_mean", [m["mismatch_mean"] for m in served])
    print("update", [(m["update_weights_s"], m["update_probe_s"]) for m in served])
    assert before == start_live, "greedy answers of the same weights"
    assert all(m["mismatch_mean"] <= MISMATCH for m in served)
    assert not any(m.get("server_dropped", 0) or m.get("server_nonsense", 0) for m in served)
    assert min(gains) > 0.05
    assert gains[0] > gains[1] - 0.15
