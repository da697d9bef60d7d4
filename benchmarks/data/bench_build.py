"""Time and memory of `nemocascade data build` on chat rows, and of opening a large folder.

python benchmarks/data/bench_build.py --tokenizer tokenizer.json --gigabytes 0.3 --workers 1
python benchmarks/data/bench_build.py --tokenizer tokenizer.json --gigabytes 1 --kill-at 0.5
python benchmarks/data/bench_build.py --tokenizer tokenizer.json --open-tib 1

Rows are random words of a text file's vocabulary, with log-normal lengths of reasoning. With
`--kill-at`, the rows are built a second time: all processes are killed when that share of the
shards is finished, the same command resumes, and every file is compared with that of the first
build. The folder that is opened has sparse files of tokens, and an index of documents of 15,000
tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from nemocascade.data.building import is_finished, read_plan, work_folder
from nemocascade.data.built import open_built, verify_built
from nemocascade.data.cache import token_settings
from nemocascade.data.cache_files import COLUMNS, write_json, write_times
from nemocascade.data.synthetic import synthetic_rows
from nemocascade.data.tokenizer import load_tokenizer
from nemocascade.recipe.data import DataConfig

SFT_TOKENS = 369e9
"""Tokens of the released SFT rows of Nemotron-Cascade 2."""
CORES = 96
LARGE_GB = 10
"""Gigabytes of rows for which the time is estimated."""
SHARD_BYTES, DOCUMENT = 256 << 20, 15_000


def write_rows(path: Path, size: int) -> None:
    """Write about `size` bytes of chat rows with reasoning."""
    rng = random.Random(1)
    texts = [m["content"] for r in synthetic_rows("synthetic:arithmetic", seed=3, rows=300)
             for m in r["messages"]]  # fmt: skip
    letters, weights = "etaoinshrdlucmfwypvbgkjqxz", range(26, 0, -1)
    words = list(dict.fromkeys(w for text in texts for w in text.split()))
    words += ["".join(rng.choices(letters, weights, k=rng.randint(2, 9))) for _ in range(20_000)]
    shares = [1 / (i + 5) for i in range(len(words))]
    lines = [" ".join(rng.choices(words, shares, k=40)) + rng.choice(".,\n") for _ in range(9_000)]
    written = 0
    with path.open("w") as stream:
        while written < size:
            count = max(2, int(rng.lognormvariate(3.8, 1.0)))
            answer = {
                "role": "assistant",
                "reasoning_content": " ".join(rng.choices(lines, k=count)),
                "content": " ".join(rng.choices(lines, k=1 + count // 4)),
            }
            question = {"role": "user", "content": " ".join(rng.choices(lines, k=2))}
            written += stream.write(json.dumps({"messages": [question, answer]}) + "\n")


@dataclass
class Used:
    """Resources of a command and its children. seconds: of the clock. cpu: processor seconds of
    each process. peaks: its largest resident memory in bytes."""

    seconds: float = 0.0
    cpu: dict[int, float] = field(default_factory=dict)
    peaks: dict[int, int] = field(default_factory=dict)

    def look(self, command: int) -> None:
        """Read the present state of the processes."""
        try:
            own = psutil.Process(command)
            processes = [own, *own.children(recursive=True)]
        except psutil.Error:
            return
        for process in processes:
            try:
                peak = max(self.peaks.get(process.pid, 0), process.memory_info().rss)
                times = process.cpu_times()
            except psutil.Error:
                continue
            self.peaks[process.pid] = peak
            self.cpu[process.pid] = times.user + times.system


def run_command(command: Sequence[str], *, stop: Callable[[], bool] = lambda: False) -> Used:
    """Run a command, or kill all of its processes once `stop` says so."""
    used, started = Used(), time.monotonic()
    running = subprocess.Popen(command, start_new_session=True)
    while running.poll() is None:
        used.look(running.pid)
        if stop():
            os.killpg(running.pid, signal.SIGKILL)
            running.wait()
            break
        time.sleep(0.2)
    else:
        if running.returncode:
            raise SystemExit(f"{command} ended with {running.returncode}")
    used.seconds = time.monotonic() - started
    return used


def finished_shards(output: Path) -> tuple[int, int]:
    """Number of finished shards of a build under way, and of all; 0 and 1 before it is planned."""
    work = work_folder(output)
    try:
        count = len(read_plan(work).shards)
    except (OSError, ValueError):
        return 0, 1
    return sum(is_finished(work, n) for n in range(count)), count


def measure_build(folder: Path, asked: argparse.Namespace) -> None:
    """Build a folder of rows in a command of its own, and print what it took."""
    rows = folder / "rows.jsonl"
    write_rows(rows, int(asked.gigabytes * 1e9))
    size = rows.stat().st_size
    command = [sys.executable, "-m", "nemocascade.cli", "data", "build"]
    command += ["--workers", str(asked.workers), "--shard-mib", str(asked.shard_mib)]
    command += ["--data.path", str(rows), "--data.thinking", "True"]
    command += ["--tokenizer.path", asked.tokenizer, "--output"]
    used = run_command([*command, str(folder / "out")])
    tokens = json.loads((folder / "out" / "manifest.json").read_text())["tokens"]
    cpu = sum(used.cpu.values())
    rate = tokens / cpu
    print(
        f"{size:,} bytes, {tokens:,} tokens in {used.seconds:.0f} s; of processor time "
        f"{size / cpu:,.0f} bytes and {rate:,.0f} tokens a second; largest process "
        f"{max(used.peaks.values()) / 2**20:.0f} MiB\n"
        f"estimates: {SFT_TOKENS / rate / CORES / 3600:.1f} h for {SFT_TOKENS:.0f} tokens on "
        f"{CORES} cores; {LARGE_GB * 1e9 / size * cpu / 3600:.1f} h of one core for {LARGE_GB} GB "
        "of such rows",
        flush=True,
    )
    if asked.kill_at:
        measure_kill([*command, str(folder / "killed")], folder, asked.kill_at)


def measure_kill(command: Sequence[str], folder: Path, share: float) -> None:
    """Build `killed` with the command, which is killed and run again; compare it with `out`."""
    output = folder / "killed"

    def is_due() -> bool:
        finished, count = finished_shards(output)
        return bool(finished >= share * count)

    first = run_command(command, stop=is_due)
    finished, count = finished_shards(output)
    assert finished < count, "the build ended before it could be killed: use more shards"
    print(f"killed after {first.seconds:.0f} s with {finished} of {count} shards", flush=True)
    second = run_command(command)
    peak = max(*first.peaks.values(), *second.peaks.values())
    print(
        f"resumed and finished in {second.seconds:.0f} s; largest process {peak / 2**20:.0f} MiB",
        flush=True,
    )
    verify_built(output)
    files = [
        json.loads((built / "manifest.json").read_text())["files"]
        for built in (folder / "out", output)
    ]
    assert files[0] == files[1], "the resumed build has other bytes"
    print(f"{len(files[0])} files have the bytes of the undisturbed build")


def measure_opening(folder: Path, tokenizer: str, size: int) -> None:
    """Open a folder of sparse shards with `size` bytes of tokens, and print the time."""
    used, config = load_tokenizer(tokenizer), DataConfig(path=(str(folder),))
    (folder / "tokens").mkdir()
    documents = SHARD_BYTES // 4 // DOCUMENT
    tokens = documents * DOCUMENT
    shards = [
        {"file": f"tokens/{i:05d}.bin", "documents": documents, "tokens": tokens}
        for i in range(size // SHARD_BYTES)
    ]
    total = documents * len(shards)
    sizes = {str(s["file"]): 4 * tokens for s in shards}
    sizes |= {name: 8 * (total + (name == "offsets.bin")) for name in COLUMNS}
    for name, count in sizes.items():
        with (folder / name).open("wb") as stream:
            stream.truncate(count)
    (np.arange(total + 1) * DOCUMENT).astype("<i8").tofile(folder / "offsets.bin")
    counts = {"documents": total, "tokens": tokens * len(shards), "trained_tokens": 0}
    bad = {"documents_with_reasoning": 0, "bad_rows": 0, "bad_examples": []}
    key = {"settings": token_settings(config, used), "sources": [], "without_thinking": []}
    key["non_thinking_path"] = []
    files = {name: {"bytes": count, "sha256": []} for name, count in sizes.items()}
    manifest = {"key": key, "sources": ["rows"], "shards": shards, "files": files}
    write_json(folder / "manifest.json", {**manifest, **counts, **bad})
    write_times(folder, files)
    started = time.monotonic()
    cache = open_built(folder, config, used, seed=1, check=True)
    seconds = time.monotonic() - started
    print(f"{len(cache):,} documents, {len(shards):,} shards: checked and open in {seconds:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--gigabytes", type=float, default=0.3)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--shard-mib", type=int, default=256)
    parser.add_argument("--kill-at", type=float, default=0.0, help="share of the shards")
    parser.add_argument("--open-tib", type=float, default=0.0)
    parser.add_argument("--folder", default=None, help="where the files go; the system's default")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        if asked.open_tib:
            measure_opening(Path(name), asked.tokenizer, int(asked.open_tib * 2**40))
        else:
            measure_build(Path(name), asked)


if __name__ == "__main__":
    main()
