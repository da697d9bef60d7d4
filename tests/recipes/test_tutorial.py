"""The commands of docs/tutorial.md; a slow test runs them one after the other at reduced size."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.page_commands import ROOT, command_lines, reduced
from helpers.ranks import run_ranks

COMMANDS = command_lines("docs/tutorial.md", labels=("",))
"""Downloads have the label `sh`, recorded output has the label `text`."""
SIZES = {"--log.tensorboard": "False", "--engine.precision": "fp32", "--steps": "1"}
ROLLOUTS = SIZES | {
    "--rollout.prompts-per-step": "2",
    "--rollout.rollouts-per-prompt": "2",
    "--rollout.max-draws": "1",
    "--rollout.max-response-tokens": "8",
    "--rollout.slots": "8",
    "--grpo.capacity": "1024",
    "--domains.0.tasks": "8",
    "--eval.prompts": "2",
}
SCORES = {"--limit": "2", "--scores.max-response-tokens": "4", "--scores.engine.precision": "fp32"}
REDUCED: dict[str, dict[str, str]] = {
    "recipes/small/sft.py": SIZES
    | {
        "--model.pattern": "M*E-",
        "--model.hidden-size": "64",
        "--model.vocab-size": "512",
        "--tokenizer.train-vocab-size": "400",
        "--data.capacity": "2048",
        "--data.sequences-per-step": "1",
        "--demonstrations.heldout": "4",
        "--demonstrations.domains.1.tasks": "8",
    },
    "recipes/small/math_rl.py": ROLLOUTS,
    "recipes/qwen3_0_6b/math_rl.py": ROLLOUTS,
    "score": SCORES,
    "serve": {"--engine.precision": "fp32", "--slots": "2", "--port": "0"},
    "generate": {"--max-tokens": "4"},
}
"""Settings that make a command of the page small, by its recipe or its name."""


def python_words(command: str) -> list[str]:
    """The words that Python gets for a command at reduced size."""
    program, *words = reduced(command, REDUCED)
    return [*(() if program == "python" else ("-m", "nemocascade.cli")), *words]


def test_the_page_has_both_ways() -> None:
    text = "\n".join(COMMANDS)
    for part in (
        "convert Qwen3",
        "score",
        "serve",
        "curl",
        "qwen3_0_6b/math_rl.py",
        "small/sft.py",
    ):
        assert part in text


def made_qwen3(folder: str) -> str:
    """An artifact of a tiny dense Qwen3, after two steps of SFT."""
    from helpers.start_policy import sft_recipe

    from nemocascade.recipe import qwen3_0_6b
    from nemocascade.stages.sft import run_sft

    recipe = sft_recipe(folder, ("multiple_choice",))
    shape = replace(
        qwen3_0_6b(), pattern="*-*-", hidden_size=64, vocab_size=512, num_heads=4, num_kv_heads=2
    )
    return str(run_sft(replace(recipe, model=replace(shape, head_dim=16, mlp_width=96))))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder like the reader's: recipes, rows in GSM8K's form, a published model, prompts."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "data").mkdir()
    for name, first in (("train", 0), ("test", 100)):
        rows = [
            {
                "question": f"Ann has {n} nuts and finds 4. How many has she?",
                "answer": f"She has {n} + 4 = <<{n}+4={n + 4}>>{n + 4} nuts.\n#### {n + 4}",
            }
            for n in range(first, first + 100)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / "data" / f"gsm8k_{name}.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "2 + 3?"}\n', encoding="utf-8")
    (artifact,) = run_ranks(made_qwen3, 1, {"folder": str(tmp_path / "made")})
    run(tmp_path, ["-m", "nemocascade.cli", "convert", str(artifact), "Qwen3-0.6B"])
    return tmp_path


def environment() -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def run(folder: Path, words: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert done.returncode == 0, f"{words}: {done.stdout[-1000:]}{done.stderr[-4000:]}"
    return done.stdout


def answers(folder: Path, words: list[str], curl: str) -> Iterator[dict[str, Any]]:
    """Start the server, send the page's request to it, and end it."""
    process = subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, cwd=folder, env=environment()
    )
    assert process.stderr is not None
    try:
        found = next(filter(None, (re.search(r"at (http://\S+)/v1", x) for x in process.stderr)))
        request = curl.replace("http://127.0.0.1:8000", found[1])
        done = subprocess.run(
            shlex.split(request), capture_output=True, text=True, check=True, timeout=300
        )
        yield json.loads(done.stdout)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=120)
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_commands_run_one_after_the_other(folder: Path) -> None:
    curl = next(c for c in COMMANDS if c.startswith("curl"))
    for command in COMMANDS:
        if command == curl:
            continue
        words = python_words(command)
        if words[2] == "serve":
            (reply,) = answers(folder, words, curl)
            assert reply["choices"][0]["message"]["role"] == "assistant"
            continue
        text = run(folder, words)
        if words[2] == "score":
            assert json.loads(text)["scores"]["gsm8k"]["tasks"] == 2
    assert (folder / "answers.jsonl").is_file()
    for name, architecture in (
        ("qwen3_0_6b_math", "Qwen3ForCausalLM"),
        ("small_math", "NemotronHForCausalLM"),
    ):
        config = json.loads((folder / name / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == [architecture]
