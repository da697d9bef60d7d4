"""Time and memory of `nemocascade data build` on chat rows, and of opening a large folder.

python benchmarks/data/bench_build.py --tokenizer tokenizer.json --gigabytes 0.3 --workers 1
python benchmarks/data/bench_build.py --tokenizer tokenizer.json --open-tib 1

Rows are random words of a text file's vocabulary, with log-normal lengths of reasoning. The folder
that is opened has sparse files of tokens, and an index of documents of 15,000 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from nemocascade.data.built import open_built
from nemocascade.data.cache import token_settings
from nemocascade.data.cache_files import COLUMNS, write_json, write_times
from nemocascade.data.synthetic import synthetic_rows
from nemocascade.data.tokenizer import load_tokenizer
from nemocascade.recipe.data import DataConfig

SFT_TOKENS = 369e9
"""Tokens of the released SFT rows of Nemotron-Cascade 2."""
CORES = 96
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


def measure_build(folder: Path, tokenizer: str, size: int, workers: int) -> None:
    """Build a folder of rows in a command of its own, and print what it took."""
    write_rows(folder / "rows.jsonl", size)
    command = [sys.executable, "-m", "nemocascade.cli", "data", "build", "--workers", str(workers)]
    command += ["--data.path", str(folder / "rows.jsonl"), "--data.thinking", "True"]
    command += ["--tokenizer.path", tokenizer, "--output", str(folder / "out")]
    started, peaks, cpu = time.monotonic(), dict[int, int](), dict[int, float]()
    running = subprocess.Popen(command)
    while running.poll() is None:
        own = psutil.Process(running.pid)
        for process in [own, *own.children(recursive=True)]:
            try:
                peaks[process.pid] = max(peaks.get(process.pid, 0), process.memory_info().rss)
                times = process.cpu_times()
                cpu[process.pid] = times.user + times.system
            except psutil.Error:
                continue
        time.sleep(0.2)
    seconds = time.monotonic() - started
    tokens = json.loads((folder / "out" / "manifest.json").read_text())["tokens"]
    rate = tokens / sum(cpu.values())
    print(
        f"{tokens:,} tokens in {seconds:.0f} s, {rate:,.0f} a second of processor time; "
        f"{SFT_TOKENS / rate / CORES / 3600:.1f} h for {SFT_TOKENS:.0f} tokens on {CORES} cores; "
        f"largest process {max(peaks.values()) / 2**20:.0f} MiB"
    )


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
    parser.add_argument("--open-tib", type=float, default=0.0)
    parser.add_argument("--folder", default=None, help="where the files go; the system's default")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        if asked.open_tib:
            measure_opening(Path(name), asked.tokenizer, int(asked.open_tib * 2**40))
        else:
            measure_build(Path(name), asked.tokenizer, int(asked.gigabytes * 1e9), asked.workers)


if __name__ == "__main__":
    main()
