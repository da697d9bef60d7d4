"""The dry run of the GPU path: `python tests/gpu_dry/run.py`, or `make gpu-dry`.

Every case of `suite.py` is played in a process of its own, and its counts are compared with
`budgets.json`, exactly. A difference names the file and line that has caused it.

    python tests/gpu_dry/run.py --only 'sft*' --explain    # what a case costs, and where
    python tests/gpu_dry/run.py --update                   # write the budgets anew
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import importlib.metadata
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
BUILD = REPOSITORY / "build" / "gpu_dry"
BUDGETS = HERE / "budgets.json"
LAUNCHES = REPOSITORY / "kernels" / "nemocascade_kernels" / "launches.json"
PACKAGES = ("torch", "triton", "megatron-core", "fla-core")
BYTES = {"live_bytes": "live", "peak_bytes": "peak", "graph_bytes": "graphs"}
KINDS = ("sync", "copy", "collective", "launch", "operator")
LAYER_LAUNCHES = 8
"""Kernels and collectives of a layer in a decode step, at most."""

Budget = dict[str, Any]
"""live_bytes, peak_bytes, and for each part of the run its counts by kind and name."""


def versions() -> dict[str, str]:
    """Versions on which the counts depend."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def play(names: Sequence[str], jobs: int = 2, *, explain: bool = False) -> dict[str, Any]:
    """Run the cases `names`; their outcomes, or the traceback of a case that failed."""
    from gpu_dry import suite

    groups: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        groups.setdefault(suite.CASES[name].packages, []).append(name)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-dry-") as folder:
        for packages, members in groups.items():
            command = [sys.executable, __file__, "--worker", folder, str(jobs), *members]
            env = environment(packages) | {"GPU_DRY_EXPLAIN": "1" if explain else ""}
            subprocess.run(command, env=env, check=True, cwd=REPOSITORY)
        for name in names:
            found[name] = pickle.loads((Path(folder) / name).read_bytes())
    return found


def environment(packages: Sequence[str] = ()) -> dict[str, str]:
    """The environment of a worker: the preloaded driver, and stand-ins of optional packages."""
    BUILD.mkdir(parents=True, exist_ok=True)
    stub = BUILD / "libcuda.so.1"
    source = HERE / "driver_stub.c"
    if not stub.exists() or stub.stat().st_mtime < source.stat().st_mtime:
        partial = BUILD / f"libcuda.{os.getpid()}"
        command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run([*command, "-o", str(partial), str(source)], check=True)
        partial.replace(stub)
    paths = [REPOSITORY, REPOSITORY / "kernels", HERE.parent]
    paths += [HERE / "packages" / name for name in packages]
    before = os.environ.get("PYTHONPATH")
    return {
        **{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        "LD_PRELOAD": str(stub),
        "LD_LIBRARY_PATH": str(BUILD),
        "PYTHONPATH": os.pathsep.join([*map(str, paths), *([before] if before else [])]),
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
        "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(BUILD / "triton")),
        # The CUDA router is built only where nvcc is; its Triton twin is the same everywhere.
        "NEMOCASCADE_BACKEND": "moe_router=triton",
    }


def work(folder: Path, jobs: int, names: Sequence[str]) -> None:
    """Play cases in forks of this process, `jobs` at a time; write their outcomes to `folder`."""
    from gpu_dry import suite

    # They compile functions at import, for which torch.cuda must be what it is.
    importlib.import_module("fla.modules.causal_conv1d")
    importlib.import_module("fla.ops.simple_gla")
    running: dict[int, str] = {}
    waiting = list(names)
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            pid = os.fork()
            if pid == 0:
                _play_here(suite.CASES[name], folder / name)
            running[pid] = name
        pid, status = os.wait()
        name = running.pop(pid)
        if not (folder / name).exists():
            text = f"the process ended with status {os.waitstatus_to_exitcode(status)}"
            (folder / name).write_bytes(pickle.dumps(text))


def _play_here(case: Any, path: Path) -> None:
    from gpu_dry import cases

    try:
        outcome: Any = cases.run_case(case, explain=bool(os.environ.get("GPU_DRY_EXPLAIN")))
    except BaseException:
        outcome = traceback.format_exc()
    path.write_bytes(pickle.dumps(outcome))
    sys.stdout.flush()
    os._exit(0)


def budget_of(outcome: Any) -> Budget:
    """The counts of an outcome as they are in the file."""
    parts: dict[str, Any] = {}
    for part, counts in outcome.parts.items():
        named: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
        for (kind, name, where), count in counts.items():
            named[kind][label(kind, name, where)] += count
        parts[part] = {kind: dict(sorted(c.items())) for kind, c in named.items() if c}
    return {name: getattr(outcome, field) for name, field in BYTES.items()} | {"parts": parts}


def label(kind: str, name: str, where: Any) -> str:
    """The name under which a count is in the file: no line, which any edit would move."""
    if kind in ("launch", "collective"):
        return str(name)
    if kind == "operator":
        return str(where.function.partition("::")[0])
    return f"{name} in {where.function}"


def differences(case: str, outcome: Any, budget: Budget | None) -> Iterator[str]:
    """A line, with its place, for each count in which the outcome and the budget differ."""
    if budget is None:
        yield f"{case}: it has no budget"
        return
    for name, field in BYTES.items():
        value = getattr(outcome, field)
        if value != (known := budget.get(name, 0)):
            yield f"{case}: {name} {value:,}, the budget is {known:,}"
    now = budget_of(outcome)["parts"]
    for part in sorted({*now, *budget["parts"]}):
        for kind in KINDS:
            was = budget["parts"].get(part, {}).get(kind, {})
            yield from _changed(case, part, kind, now.get(part, {}).get(kind, {}), was, outcome)


def excesses(case: str, outcome: Any) -> Iterator[str]:
    """A line for each limit of decode steps that an outcome exceeds, whatever its budget."""
    for layer, launches in sorted(outcome.layers.items()):
        if (count := launches.total()) > LAYER_LAUNCHES:
            yield (
                f"{case}: {layer}: {count} launches in a decode step, the limit is "
                f"{LAYER_LAUNCHES}: {dict(launches)}"
            )
    step = outcome.parts.get("decode step")
    waits = {str(key[1:]): n for key, n in (step or {}).items() if key[0] == "sync"}
    if step is not None and sum(waits.values()) != 1:
        yield f"{case}: a decode step waits for the device {waits}, not once"


def _changed(
    case: str, part: str, kind: str, now: Mapping[str, int], was: Mapping[str, int], outcome: Any
) -> Iterator[str]:
    for name in sorted({*now, *was}):
        if now.get(name, 0) == was.get(name, 0):
            continue
        places = {
            str(where): count
            for (k, n, where), count in outcome.parts.get(part, {}).items()
            if k == kind and label(k, n, where) == name
        }
        at = ", ".join(f"{count} at {where}" for where, count in sorted(places.items())[:6])
        yield (
            f"{case}: {part}: {kind} {name}: {now.get(name, 0)}, the budget is "
            f"{was.get(name, 0)}" + (f" ({at})" if at else "")
        )


def read_budgets() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
    return found


def write_budgets(cases: Mapping[str, Budget]) -> None:
    """Write the file, a line for each kind of a part."""
    lines = []
    for name, budget in sorted(cases.items()):
        parts = []
        for part, kinds in budget["parts"].items():
            rows = [f"     {json.dumps(kind)}: {json.dumps(c)}" for kind, c in kinds.items()]
            parts.append(f"    {json.dumps(part)}: {{\n" + ",\n".join(rows) + "}")
        sizes = "".join(f'"{field}": {budget.get(field, 0)}, ' for field in BYTES)
        lines.append(f'  {json.dumps(name)}: {{{sizes}"parts": {{\n' + ",\n".join(parts) + "}}")
    text = ",\n".join(lines)
    BUDGETS.write_text(f'{{"versions": {json.dumps(versions())},\n "cases": {{\n{text}\n}}}}\n')


def launches(outcomes: Mapping[str, Any]) -> str:
    """The recorded launches of all architectures: an entry a line."""
    from gpu_dry import suite

    merged: dict[str, dict[str, Any]] = {}
    for name, outcome in outcomes.items():
        arch = suite.CASES[name].architecture
        for entry in outcome.kernels:
            key = json.dumps({k: v for k, v in entry.items() if k != "matrix"}, sort_keys=True)
            kept = merged.setdefault(key, {**entry, "architectures": []})
            kept["architectures"].append(arch)
            if arch == 90:
                kept["matrix"] = entry["matrix"]
    rows = sorted(merged.values(), key=lambda e: (e["op"], e["label"], json.dumps(e)))
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def table(outcomes: Mapping[str, Any]) -> str:
    """The totals of every part of every case."""
    rows = [("case", "part", "syncs", "copies", "collectives", "launches", "operators", "peak GiB")]
    for name, outcome in outcomes.items():
        for part, counts in outcome.parts.items():
            totals = Counter[str]()
            for (kind, _, _), count in counts.items():
                totals[kind] += count
            rows.append(
                (name, part, *(str(totals[k]) for k in KINDS), f"{outcome.peak / 2**30:.2f}")
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows)


def explain(name: str, outcome: Any) -> str:
    """Every count of a case with its place, and what holds the memory at the peak."""
    lines = [f"== {name}: live {outcome.live / 2**30:.2f}, peak {outcome.peak / 2**30:.2f} GiB"]
    for part, counts in outcome.parts.items():
        lines.append(f"-- {part}")
        rows = sorted(counts.items(), key=lambda row: (KINDS.index(row[0][0]), -row[1]))
        lines += [f"  {count:6d} {kind:10s} {text:28s} {at}" for (kind, text, at), count in rows]
    for layer, launches in sorted(outcome.layers.items()):
        lines.append(f"-- {layer}: {launches.total()} launches: {dict(launches)}")
    lines.append("-- at the peak")
    for (where, size), count in sorted(
        outcome.at_peak.items(), key=lambda row: -row[0][1] * row[1]
    )[:40]:
        lines.append(f"  {count * size / 2**20:10.1f} MiB  {count} x {size:,} B  {where}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    patterns = "cases to play: patterns, such as 'sft*' rollout"
    parser.add_argument("--only", nargs="+", default=["*"], help=patterns)
    parser.add_argument("--update", action="store_true", help="write the budgets anew")
    parser.add_argument("--explain", action="store_true", help="print every count with its place")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    from gpu_dry import suite

    started = time.monotonic()
    names = [n for n in suite.CASES if any(fnmatch.fnmatch(n, p) for p in options.only)]
    if not names:
        asked = " ".join(options.only)
        parser.error(f"no case is named {asked}: choose among {', '.join(suite.CASES)}")
    outcomes = play(names, options.jobs, explain=options.explain)
    failed = {name: text for name, text in outcomes.items() if isinstance(text, str)}
    good = {name: outcome for name, outcome in outcomes.items() if name not in failed}
    if options.explain:
        for name, outcome in good.items():
            print(explain(name, outcome))
    print(table(good))
    stored = read_budgets()
    problems = [f"{name} failed:\n{text}" for name, text in failed.items()]
    problems += [f"{name}: {fault}" for name, o in good.items() for fault in o.faults]
    problems += [line for name, o in good.items() for line in excesses(name, o)]
    kernels = {name: o for name, o in good.items() if o.kernels}
    recorded = launches(kernels) if len(kernels) == 3 else None
    if options.update:
        if recorded:
            LAUNCHES.write_text(recorded)
        kept = {n: b for n, b in stored.get("cases", {}).items() if n in suite.CASES}
        write_budgets(kept | {n: budget_of(o) for n, o in good.items() if o.parts})
    else:
        if stored.get("versions") != versions():
            print(f"the budgets are of {stored.get('versions')}, installed is {versions()}")
        known = stored.get("cases", {})
        problems += [d for n, o in good.items() if o.parts for d in differences(n, o, known.get(n))]
        if recorded and recorded != LAUNCHES.read_text():
            problems.append(f"{LAUNCHES.relative_to(REPOSITORY)} lists other launches")
    print("\n".join(problems))
    print(
        f"{len(names)} cases in {time.monotonic() - started:.0f} s, {len(problems)} problems"
        + ("" if options.update or not problems else ": if they are meant, make gpu-dry UPDATE=1")
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.path[:1] = [str(HERE.parent), str(REPOSITORY), str(REPOSITORY / "kernels")]
    if sys.argv[1:2] == ["--worker"]:
        work(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
    else:
        sys.exit(main())
