"""Held-out gain and duration of each tiny RL stage.

    python benchmarks/end_to_end/tiny_stages.py --seeds 3 --out benchmarks/results/<record>.json
    python benchmarks/end_to_end/tiny_stages.py --sft runs/tiny/cascade/stages/sft/artifact
    python benchmarks/end_to_end/tiny_stages.py --stages if_rl code_rl --seeds 1

For each seed: SFT on all domains (or one artifact for all seeds), then every stage of recipes/tiny
from that artifact, with the settings of its script. Each stage is a command on `--ranks` processes
of one thread. Held-out answers are greedy, on tasks that no stage trains on. Seconds are those of
the whole command: start, evaluations, training, artifact. RLHF is measured by its win rate against
the stage's start, which begins at 0.5.

Runs are stored in `--work`, and existing ones with the same settings are reused.

Exit code: 0 fine; 1 a command failed; 3 a goal is missed and `--strict` was given.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.run import new_record, recording_parser, write_record  # noqa: E402
from nemocascade.recipe import load_any_recipe  # noqa: E402

SECONDS = 240.0
GOALS = {
    "if_rl": 0.15,
    "multi_domain_rl": 0.15,
    "code_rl": 0.15,
    "rlhf": 0.10,
    "long_context_rl": 0.10,
    "swe_agentless_rl": 0.10,
    "swe_agentic_rl": 0.10,
}
"""Goals: gain in mean reward (1 = 100 points) within at most `SECONDS`."""
WIN_RATE = "preference_over_start"


def run(script: str, folder: Path, seed: int, ranks: int, *arguments: str) -> float:
    """Run a tiny recipe into `folder` unless it exists there; returns the seconds that it took."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), f"recipes/tiny/{script}.py"]
    command += ["--seed", str(seed), "--run-dir", str(folder), *arguments]
    record = folder / "command.json"
    asked = {"command": command[1:], "recipe": _settings(script)}
    if record.is_file():
        found = json.loads(record.read_text(encoding="utf-8"))
        seconds = float(found.pop("seconds"))
        if found != json.loads(json.dumps(asked)):
            raise SystemExit(f"{folder} was made with other settings: name another --work")
        return seconds
    # An interrupted run would resume, and its seconds would cover the rest only.
    shutil.rmtree(folder, ignore_errors=True)
    started = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        raise SystemExit(1)
    record.write_text(json.dumps(asked | {"seconds": seconds}, indent=1), encoding="utf-8")
    return seconds


def _settings(script: str) -> dict[str, Any]:
    return asdict(load_any_recipe(ROOT / "recipes" / "tiny" / f"{script}.py"))


def measured(folder: Path, seconds: float) -> dict[str, Any]:
    """Held-out scores by step (0: before any), and the reward of each step's rollouts."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    start = json.loads((folder / "heldout_start.json").read_text(encoding="utf-8"))
    curves: dict[str, list[list[float]]] = {}
    for name, score in start.items():
        curves[name.removeprefix("heldout/")] = [[0, score]]
    for row in rows:
        for name, curve in curves.items():
            if (score := row.get(f"heldout/{name}")) is not None:
                curve.append([row["step"], score])
    # The win rate replaces the comparison with a fixed answer.
    if WIN_RATE in curves:
        curves = {WIN_RATE: curves[WIN_RATE]}
    return {
        "seconds": seconds,
        "steps": len(rows),
        "gain": {name: curve[-1][1] - curve[0][1] for name, curve in curves.items()},
        "heldout": curves,
        "reward": [row["reward"] for row in rows],
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = recording_parser(__doc__)
    cards = torch.cuda.device_count()
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1, 2, ...")
    parser.add_argument("--sft", type=Path, help="artifact that all stages start from")
    parser.add_argument("--stages", nargs="+", default=list(GOALS), choices=list(GOALS))
    parser.add_argument("--ranks", type=int, default=min(2, cards or os.cpu_count() or 1))
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_stages"))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    work, ranks = options.work.resolve(), options.ranks
    found: dict[str, dict[str, Any]] = {name: {} for name in options.stages}
    sft: dict[str, float] = {}
    missed = []
    for seed in range(1, options.seeds + 1):
        base = work / f"seed_{seed}"
        start = options.sft and options.sft.resolve()
        if start is None:
            sft[str(seed)] = run("domains_sft", base / "domains_sft", seed, ranks)
            start = base / "domains_sft" / "artifact"
        print(f"seed {seed}, from {start}", flush=True)
        for name in options.stages:
            seconds = run(name, base / name, seed, ranks, "--init-from", str(start))
            result = measured(base / name, seconds)
            found[name][str(seed)] = result
            curves = "; ".join(
                f"{domain} {' '.join(f'{score:.3f}' for _, score in curve)}"
                for domain, curve in result["heldout"].items()
            )
            print(f"  {name}: {curves} ({seconds:.0f} s)", flush=True)
            if seconds > SECONDS or min(result["gain"].values()) < GOALS[name]:
                missed.append(f"{name}, seed {seed}")
    print(f"missed: {'; '.join(missed) or 'none'}")
    settings = {"ranks": ranks, "sft": str(options.sft), "goals": GOALS, "seconds": SECONDS}
    record = new_record(
        "end_to_end", settings=settings, sft_seconds=sft, stages=found, missed=missed
    )
    write_record(options.out, record)
    return 3 if missed and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
