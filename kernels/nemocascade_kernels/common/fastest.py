"""The choice among several ways of one computation on a CPU, by one measurement on this machine.

Ways sum in different orders, so a choice decides bits. It is therefore kept in a file of the user's
cache folder, for this processor, these versions and this number of threads, and does not change
within a process. A folder that cannot be written costs a measurement in each process.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from nemocascade_kernels.version import __version__

#: Variables that limit the instructions of the libraries below torch.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
_ROUNDS = 5
#: A later way is chosen only if it is faster than an earlier one by this factor, so that noise
#: seldom decides.
MARGIN = 1.2


@dataclass(frozen=True)
class MeasuredChoice:
    """The chosen way, the seconds of each way (None: it failed), and where the choice is from: a
    path, or "measured now"."""

    way: str
    seconds: Mapping[str, float | None]
    source: str


def choose(name: str, ways: Mapping[str, Callable[[], object]]) -> MeasuredChoice:
    """The fastest way, from the cache or by measuring. ways: calls to time, in order of preference;
    one that raises is out. Raises RuntimeError if all do."""
    key = {"computation": name, "ways": list(ways), **machine()}
    path = cache_folder() / f"{name}_{_digest(key)}.json"
    kept = _read(path, key, ways)
    if kept is not None:
        return kept
    seconds = measure(ways)
    found = {way: time_s for way, time_s in seconds.items() if time_s is not None}
    if not found:
        raise RuntimeError(f"no way of {name} works on this machine: tried {', '.join(ways)}")
    best = min(found.values())
    way = next(way for way, time_s in found.items() if time_s <= MARGIN * best)
    choice = MeasuredChoice(way, seconds, "measured now")
    return _keep(path, key, choice, ways)


def measure(ways: Mapping[str, Callable[[], object]]) -> dict[str, float | None]:
    """Least seconds of each way over a few alternating rounds; None for one that raises."""
    best: dict[str, float | None] = {}
    for way, call in ways.items():
        try:
            call()
        except Exception:  # a library may reject a processor in any way
            best[way] = None
        else:
            best[way] = float("inf")
    for _ in range(_ROUNDS):
        for way, call in ways.items():
            before = best[way]
            if before is not None:
                start_s = time.perf_counter()
                call()
                best[way] = min(before, time.perf_counter() - start_s)
    return best


def machine() -> dict[str, object]:
    """The properties of the machine that a measurement depends on."""
    return {
        "cpu": _cpu_name(),
        "features": sorted(k for k, v in torch.cpu.get_capabilities().items() if v is True),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "nemocascade_kernels": __version__,
        **{name: os.environ[name] for name in LIMITS if name in os.environ},
    }


def cache_folder() -> Path:
    """Folder of the kept choices: nemocascade_kernels in XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(root) / "nemocascade_kernels"


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _digest(key: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def _read(
    path: Path, key: Mapping[str, object], ways: Mapping[str, object]
) -> MeasuredChoice | None:
    """The kept choice; None if there is none that can be read."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == key and kept["seconds"][kept["way"]] is not None and kept["way"] in ways:
            return MeasuredChoice(kept["way"], dict(kept["seconds"]), str(path))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _keep(
    path: Path, key: Mapping[str, object], choice: MeasuredChoice, ways: Mapping[str, object]
) -> MeasuredChoice:
    """Keep a choice, and return it; or that of another process that was first."""
    text = json.dumps({"key": key, "way": choice.way, "seconds": choice.seconds}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            draft = Path(folder) / path.name
            draft.write_text(text, encoding="utf-8")
            try:
                os.link(draft, path)
            except FileExistsError:
                other = _read(path, key, ways)
                if other is not None:
                    return other
                os.replace(draft, path)
    except OSError:
        pass
    return choice
