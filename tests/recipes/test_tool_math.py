"""The tiny recipe of tool-integrated reasoning learns to use its tool."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.sandbox import sandbox_or_skip

from nemocascade.recipe import SandboxConfig

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 1800
"""Limit of each of the two trainings."""


def run(script: str, *options: str) -> None:
    done = subprocess.run(
        [sys.executable, f"recipes/tiny/{script}.py", "--log.tensorboard", "False", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def values(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_products_that_no_tiny_model_computes_are_right_with_the_tool(tmp_path: Path) -> None:
    sandbox_or_skip(SandboxConfig()).close()
    start = tmp_path / "sft" / "artifact"
    run("tool_math_sft", "--run-dir", str(tmp_path / "sft"))
    run(
        "tool_math_rl",
        *("--run-dir", str(tmp_path / "rl"), "--init-from", str(start), "--eval.prompts", "64"),
    )
    before = json.loads((tmp_path / "rl" / "heldout_start.json").read_text())["heldout/math"]
    *_, last = values(tmp_path / "rl")
    assert before < 0.2
    assert last["heldout/math"] > before + 0.4
    assert last["turns"] > 1.8
    assert last["verifier_errors"] == 0
