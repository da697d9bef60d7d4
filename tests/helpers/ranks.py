"""Runs a function in N ranks, each in its own process, as torchrun would start them.

The launching process hosts the rendezvous store on a port chosen by the kernel, so that concurrent
tests never collide. A function takes JSON keyword arguments and returns JSON.

    results = run_ranks(loss_of_ten_steps, 2, {"tp": 2})     # one result per rank

Importing torch and Megatron-Core takes seconds, so ranks are forked from servers that have already
imported them and done nothing else. Two servers have different hash seeds, and the ranks alternate
between them. An order that depends on the hash of a string therefore differs between ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import importlib
import inspect
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TAIL_CHARACTERS = 6000
KILL_S = 60.0
"""Seconds that a rank may take to end by SIGKILL."""
HASH_SEEDS = ("1", "2")
PRELOADED = (
    "pytest",
    "torch.distributed",
    "nemocascade.cascade.run",
    "nemocascade.megatron.fake",
    "nemocascade.rollout.live",
    "nemocascade.stages.grpo",
    "nemocascade.stages.mopd",
)
"""Modules that a server imports before it forks."""
_PR_SET_PDEATHSIG = 1


class RankError(RuntimeError):
    """A rank failed or did not finish; the message holds its stderr."""


def run_ranks(
    target: str | Callable[..., Any],
    world_size: int,
    kwargs: dict[str, Any] | None = None,
    *,
    timeout_s: float = 180.0,
) -> list[Any]:
    """Call `target(**kwargs)` in `world_size` ranks and return what each returned, by rank.

    target: a function at the top of a file, or "module:function" or "path/file.py:function".

    A rank that fails ends all the others. Raises RankError with the stderr of the rank that failed
    first, or of all ranks when `timeout_s` passed.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        job = Path(folder)
        name = _name(target)
        (job / "request.json").write_text(json.dumps({"target": name, "kwargs": kwargs or {}}))
        ranks: list[Rank] = []
        deadline = time.monotonic() + timeout_s
        try:
            for rank in range(world_size):
                ranks.append(Rank(rank, world_size, job, store.port))
            failed = _wait(ranks, deadline)
        finally:
            for process in ranks:
                process.kill()
        if failed is not None:
            raise RankError(_report(name, failed, ranks, job, timeout_s))
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
        raise ValueError(f"{target.__qualname__} must be at the top of its file")
    return f"{inspect.getfile(target)}:{target.__name__}"


class _Server:
    """A process that forks ranks; it ends, and they with it, when this one is gone."""

    def __init__(self, hash_seed: str) -> None:
        folders = ("", "kernels", "tests")
        paths = [*(str(REPOSITORY / f) for f in folders), os.environ.get("PYTHONPATH", "")]
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                "PYTHONHASHSEED": hash_seed,
                "OMP_NUM_THREADS": "1",
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            start_new_session=True,  # Ctrl-C is for pytest, which ends the ranks
        )
        atexit.register(self.process.kill)

    def fork(self, request: dict[str, Any]) -> int:
        """The process id of a new rank."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


_servers: dict[str, _Server] = {}


def _server(hash_seed: str) -> _Server:
    if hash_seed not in _servers or _servers[hash_seed].process.poll() is not None:
        _servers[hash_seed] = _Server(hash_seed)
    return _servers[hash_seed]


class Rank:
    """A rank of a job. Its server leaves its exit status in the job's folder."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        job: Path,
        port: int,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        """Fork the process; with a `world_size` of 0, one that no launcher has started.

        variables: environment variables besides those of this process.
        """
        self.status = job / f"exit.{rank}"
        env = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
        if world_size:
            env |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
            }
        self.server = _server(HASH_SEEDS[rank % len(HASH_SEEDS)])
        self.pid = self.server.fork({"job": str(job), "rank": rank, "env": env, "path": sys.path})

    def poll(self) -> int | None:
        """The exit status, negative for a signal; None while the rank runs."""
        # Asked first: a server that ends after this line may have left the status before.
        is_orphan = self.server.process.poll() is not None
        with contextlib.suppress(FileNotFoundError):
            return int(self.status.read_text())
        return -signal.SIGKILL if is_orphan else None

    def kill(self) -> None:
        """End the rank, if it has not ended, and wait for that.

        Raises RankError with the states of its threads if it has not ended after `KILL_S`.
        """
        deadline = time.monotonic() + KILL_S
        while self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            if time.monotonic() > deadline:
                states = "\n".join(_thread_states(p) for p in (self.pid, self.server.process.pid))
                raise RankError(f"process {self.pid} does not end by SIGKILL:\n{states}")
            time.sleep(0.01)


def _thread_states(pid: int) -> str:
    """Name, state and kernel function of every thread of a process, a line each."""
    lines = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("*")):
        with contextlib.suppress(OSError):
            name, state = (task / "stat").read_text().rpartition(")")[::2]
            where = (task / "wchan").read_text() or "-"
            lines.append(f"{name}) {state.split()[0]} {where}")
    return "\n".join(lines) or f"{pid} is gone"


def _wait(ranks: list[Rank], deadline: float) -> int | None:
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


def _report(target: str, failed: int, ranks: list[Rank], job: Path, timeout_s: float) -> str:
    late = failed < 0
    what = f"did not finish in {timeout_s:.0f} s"
    if not late:
        code = ranks[failed].poll()
        assert code, "a rank that failed has a status"
        how = f"exit status {code}" if code > 0 else signal.Signals(-code).name
        what = f"failed on rank {failed} with {how}"
    lines = [f"{target} in {len(ranks)} ranks {what}"]
    for rank in range(len(ranks)) if late else [failed]:
        path = job / f"stderr.{rank}"
        text = path.read_text(errors="replace") if path.exists() else ""
        # torch puts the prefix once more before every line for each group that was joined.
        text = re.sub(r"^(\[rank\d+\]: )+", "", text, flags=re.MULTILINE)
        lines.append(f"--- stderr of rank {rank} ---\n{text[-TAIL_CHARACTERS:]}")
    return "\n".join(lines)


def _load(target: str) -> Callable[..., Any]:
    module_name, _, function = target.rpartition(":")
    if module_name.endswith(".py"):
        path = Path(module_name)
        sys.path.insert(0, str(path.parent))
        module_name = path.stem
    found: Callable[..., Any] = getattr(importlib.import_module(module_name), function)
    return found


def _serve() -> None:
    """Fork a rank for each line of stdin, and note the exit statuses, until stdin ends."""
    for module in PRELOADED:
        importlib.import_module(module)
    # Every world ends with a collection, which need not look at half a million objects of modules,
    # nor copy their pages into each fork.
    gc.collect()
    gc.freeze()
    ranks: dict[int, tuple[int, Path]] = {}  # pid and status file, by a descriptor of the process
    while True:
        readable, _, _ = select.select([sys.stdin, *ranks], [], [])
        for descriptor in ranks.keys() & readable:
            pid, path = ranks.pop(descriptor)
            os.close(descriptor)
            _, status = os.waitpid(pid, 0)
            # The other server writes into the same folder.
            partial = path.with_name(f"{path.name}.partial")
            with contextlib.suppress(FileNotFoundError):
                partial.write_text(str(os.waitstatus_to_exitcode(status)))
                partial.rename(path)
        if sys.stdin in readable:
            line = sys.stdin.readline()
            if not line:
                return
            request = json.loads(line)
            pid = os.fork()
            if pid == 0:
                _run_rank(Path(request["job"]), request)
            ranks[os.pidfd_open(pid)] = pid, Path(request["job"]) / f"exit.{request['rank']}"
            print(pid, flush=True)


def _run_rank(job: Path, request: dict[str, Any]) -> NoReturn:
    """Run a rank in this process, which the server has just forked."""
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        rank = request["rank"]
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(job / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT, 0o600), number)
        faulthandler.enable(2)
        kept = {name: os.environ[name] for name in ("PYTHONPATH", "PYTHONHASHSEED")}
        os.environ.clear()
        os.environ.update(request["env"] | kept)
        sys.path[:] = request["path"]
        asked = json.loads((job / "request.json").read_text())
        result = _load(asked["target"])(**asked["kwargs"])
        (job / f"result.{rank}").write_text(json.dumps(result))
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
