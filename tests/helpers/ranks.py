"""Runs a function in N ranks, each a fresh interpreter, the way torchrun would start them.

The launching process hosts the rendezvous store on a port that the kernel picks, so that tests
that run side by side never meet. A function takes keyword arguments made of JSON and returns JSON.

    results = run_ranks(loss_of_ten_steps, 2, {"tp": 2})     # one result a rank
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TAIL_CHARACTERS = 6000


class RankError(RuntimeError):
    """A rank failed or did not finish; the message holds its stderr."""


def run_ranks(
    target: str | Callable[..., Any],
    world_size: int,
    kwargs: dict[str, Any] | None = None,
    *,
    timeout_s: float = 180.0,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Call `target(**kwargs)` in `world_size` ranks and return what each returned, by rank.

    target: a function at the top of a file, or "module:function" or "path/file.py:function".
    env: variables on top of this process's and the launcher's.

    A rank that fails ends all the others. Raises RankError with the stderr of the rank that failed
    first, or of all ranks when `timeout_s` passed.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        job = Path(folder)
        request = {"target": _name(target), "kwargs": kwargs or {}}
        (job / "request.json").write_text(json.dumps(request))
        ranks = [
            _start(rank, world_size, job, {"MASTER_PORT": str(store.port), **(env or {})})
            for rank in range(world_size)
        ]
        try:
            failed = _wait(ranks, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.wait()
                assert process.stdin is not None
                process.stdin.close()
        if failed is not None:
            raise RankError(_report(request["target"], failed, job, world_size, timeout_s))
        return [json.loads((job / f"result.{rank}").read_text()) for rank in range(world_size)]


def join_group(name: str) -> None:
    """Join a gloo group of all ranks that `start_world` then uses.

    Only needed where a job has several worlds, one after the other, each with a `name` of its own:
    torch would look for the ranks of the second one under the names of the first.
    """
    import torch.distributed as dist

    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(name, store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )


def _name(target: str | Callable[..., Any]) -> str:
    if isinstance(target, str):
        return target
    if target.__qualname__ != target.__name__:
        raise ValueError(f"{target.__qualname__} must stand at the top of its file")
    return f"{inspect.getfile(target)}:{target.__name__}"


def _start(rank: int, world_size: int, job: Path, extra: dict[str, str]) -> subprocess.Popen[bytes]:
    folders = ("", "kernels", "tests")
    paths = [*(str(REPOSITORY / f) for f in folders), os.environ.get("PYTHONPATH", "")]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        **extra,
    }
    with (job / f"stdout.{rank}").open("wb") as out, (job / f"stderr.{rank}").open("wb") as err:
        return subprocess.Popen(
            [sys.executable, str(HERE / "ranks.py"), str(job), str(rank)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            cwd=REPOSITORY,
        )


def _wait(ranks: list[subprocess.Popen[bytes]], deadline: float) -> int | None:
    """Wait for all; the first rank that failed, -1 when time ran out, None when all is well."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        if time.monotonic() > deadline:
            return -1
        time.sleep(0.02)


def _report(target: str, failed: int, job: Path, world_size: int, timeout_s: float) -> str:
    late = failed < 0
    what = f"did not finish in {timeout_s:.0f} s" if late else f"failed on rank {failed}"
    lines = [f"{target} in {world_size} ranks {what}"]
    for rank in range(world_size) if late else [failed]:
        text = (job / f"stderr.{rank}").read_text(errors="replace")
        # torch puts the prefix once more before every line for each group that was joined.
        text = re.sub(r"^(\[rank\d+\]: )+", "", text, flags=re.MULTILINE)
        lines.append(f"--- stderr of rank {rank} ---\n{text[-TAIL_CHARACTERS:]}")
    return "\n".join(lines)


def _load(target: str) -> Callable[..., Any]:
    module_name, _, function = target.rpartition(":")
    if not module_name.endswith(".py"):
        return getattr(importlib.import_module(module_name), function)
    path = Path(module_name)
    sys.path.insert(0, str(path.parent))
    return getattr(importlib.import_module(path.stem), function)


def _end_with_parent() -> None:
    """The launcher holds this process's stdin open; when it is gone nobody waits for us."""
    os.read(0, 1)
    os._exit(1)


def _run_rank(job: Path, rank: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    request = json.loads((job / "request.json").read_text())
    result = _load(request["target"])(**request["kwargs"])
    (job / f"result.{rank}").write_text(json.dumps(result))


if __name__ == "__main__":
    _run_rank(Path(sys.argv[1]), sys.argv[2])
