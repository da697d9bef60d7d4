"""Run the kernel benchmarks: prints a table, writes a JSON record, sets an exit code.

    python benchmarks/run.py --suite cpu
    python benchmarks/run.py --suite gpu --op linear_logprob --out benchmarks/results/x.json
    python benchmarks/run.py --suite cpu --compare benchmarks/results/<record>.json
    python benchmarks/run.py --suite gpu --dry-run    # tiny sizes, on the CPU if needed; no record

Exit code: 0 fine; 1 slower than the record compared with, or a wrong result; 2 an op's tests fail,
and nothing is measured; 3 a goal is missed and `--strict` was given.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import torch  # noqa: E402
from nemocascade_kernels.common import fastest, products  # noqa: E402

from benchmarks import measure  # noqa: E402
from benchmarks.measure import Case, Goal, Outcome  # noqa: E402

FORMAT = 1
#: Variables that limit the instructions of a CPU: ours, torch's and those of the libraries below.
CPU_LIMITS = ("NEMOCASCADE_CPU_LEVEL", "ATEN_CPU_CAPABILITY", *fastest.LIMITS)


def ops() -> list[str]:
    """Names of the ops that have a benchmark."""
    return sorted(
        path.stem.removeprefix("bench_")
        for path in (ROOT / "benchmarks/kernels").glob("bench_*.py")
    )


def run_tests(op: str) -> str:
    """Run the op's quick tests and return pytest's last line; exit with 2 if they fail."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not slow",
        f"tests/kernels/test_{op}.py",
    ]
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    summary = (result.stdout.strip().splitlines() or ["no output"])[-1]
    if result.returncode:
        print(result.stdout[-4000:], result.stderr[-2000:], sep="\n", file=sys.stderr)
        print(f"{op} is not measured: its tests fail ({summary})", file=sys.stderr)
        raise SystemExit(2)
    return summary


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware, versions and commit, for the record."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "changed_files": len(
            _output(["git", "-C", str(ROOT), "status", "--porcelain"]).splitlines()
        ),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_limits": {name: os.environ[name] for name in CPU_LIMITS if name in os.environ},
    }
    if device.type == "cpu":
        for kind in products.WAYS:
            chosen = products.choice(kind)
            found[f"bf16_{kind}"] = {"way": chosen.way, "seconds": dict(chosen.seconds)}
    try:
        found["triton"] = importlib.import_module("triton").__version__
    except ImportError:
        found["triton"] = None
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["driver"] = _output(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        )
        found["cuda"] = torch.version.cuda
    return found


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return f"unknown ({type(error).__name__})"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def check_goal(goal: Goal, outcomes: list[Outcome]) -> dict[str, Any]:
    """Value and result of a goal; `met` is None if a row that it needs is missing."""
    by_name = {outcome.row.name: outcome for outcome in outcomes}

    def cost(name: str) -> float | None:
        outcome = by_name[name]
        if outcome.missing is not None:
            return None
        return outcome.median_s if goal.measure == "time" else float(outcome.extra_bytes or 0)

    value = cost(goal.row)
    if goal.baseline is not None and value is not None:
        baseline = cost(goal.baseline)
        value = None if not baseline else value / baseline
    met = None if value is None else value <= goal.at_most
    return {"goal": goal.text, "value": value, "at_most": goal.at_most, "met": met}


def case_record(case: Case, outcomes: list[Outcome], ceilings: dict[str, float]) -> dict[str, Any]:
    rows = []
    for outcome in outcomes:
        row: dict[str, Any] = {"name": outcome.row.name, "kind": outcome.row.kind}
        if outcome.missing is not None:
            row["missing"] = outcome.missing
        else:
            row |= {
                "median_s": outcome.median_s,
                "p20_s": outcome.quantile_s(0.2),
                "p80_s": outcome.quantile_s(0.8),
                "repeats": len(outcome.times_s),
                "extra_bytes": outcome.extra_bytes,
            }
            if outcome.row.flops:
                row["tflops"] = outcome.row.flops / outcome.median_s / 1e12
                ceiling = ceilings.get(f"matmul_{case.settings.get('dtype')}_tflops")
                row["of_matmul_ceiling"] = row["tflops"] / ceiling if ceiling else None
            if outcome.row.bytes:
                row["gb_per_s"] = outcome.row.bytes / outcome.median_s / 1e9
                row["of_copy_ceiling"] = row["gb_per_s"] / ceilings["copy_gb_per_s"]
            if outcome.row.tokens:
                row["tokens_per_s"] = outcome.row.tokens / outcome.median_s
        if outcome.wrong is not None:
            row["wrong"] = outcome.wrong
        rows.append(row)
    goals = [check_goal(goal, outcomes) for goal in case.goals]
    return {"case": case.name, "settings": dict(case.settings), "rows": rows, "goals": goals}


def restricted(case: Case, names: list[str]) -> Case:
    """The case with the rows of these names alone, and the goals that compare them."""
    rows = [row for row in case.rows if row.name in names]
    goals = [g for g in case.goals if g.row in names and g.baseline in (None, *names)]
    return dataclasses.replace(case, rows=rows, goals=goals)


def print_case(record: dict[str, Any]) -> None:
    plain = {k: v for k, v in record["settings"].items() if not isinstance(v, dict)}
    settings = " ".join(f"{key}={value}" for key, value in plain.items())
    print(f"\n{record['case']}  ({settings})")
    for row in record["rows"]:
        if "missing" in row:
            print(f"  {row['name']:44s} {row['kind']:6s} missing: {row['missing']}")
            continue
        rate = f"{row['tflops']:9.3f} TFLOP/s" if "tflops" in row else ""
        rate = rate or (f"{row['gb_per_s']:9.1f} GB/s" if "gb_per_s" in row else "")
        rate += f"{row['tokens_per_s']:11,.0f} tokens/s" if "tokens_per_s" in row else ""
        way = record.get("ways", {}).get(row["name"], {})
        notes = [*(f"{key}={value}" for key, value in way.items()), row.get("wrong", "")]
        print(
            f"  {row['name']:44s} {row['kind']:6s} {row['median_s'] * 1e3:12.4f} ms "
            f"[{row['p20_s'] * 1e3:.4f}, {row['p80_s'] * 1e3:.4f}] {rate:18s} "
            f"{row['extra_bytes'] / 2**20:10.1f} MiB extra {' '.join(notes)}"
        )
    for goal in record["goals"]:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
        value = "-" if goal["value"] is None else f"{goal['value']:.4g}"
        print(f"  goal: {goal['goal']}: {value} (at most {goal['at_most']:g}) {verdict}")


def regressions(new: dict[str, Any], old: dict[str, Any], tolerance: float) -> list[str]:
    """One line for each of our rows that is slower than in the old record.

    Times are compared relative to the case's floor row of the same run, which cancels the speed of
    the machine. Without a floor row, times are compared directly, on the same hardware only.
    """
    same_hardware = all(
        new["environment"].get(key) == old["environment"].get(key) for key in ("cpu", "gpu")
    )
    lines = []
    for op, entry in new["ops"].items():
        old_cases = {case["case"]: case for case in old["ops"].get(op, {}).get("cases", ())}
        for case in entry["cases"]:
            before = old_cases.get(case["case"])
            if before is None or before["settings"] != case["settings"]:
                print(f"compare: {op}/{case['case']} has no counterpart in the record")
                continue
            now, then = _costs(case), _costs(before)
            for name in sorted(set(now) & set(then)):
                (cost, relative), (old_cost, old_relative) = now[name], then[name]
                if relative != old_relative or not (relative or same_hardware):
                    print(
                        f"compare: {op}/{case['case']}/{name} was skipped: "
                        "other hardware, no floor row"
                    )
                elif cost > old_cost * (1 + tolerance):
                    lines.append(f"{op}/{case['case']}/{name}: {old_cost:.4g} -> {cost:.4g}")
    return lines


def _costs(case: dict[str, Any]) -> dict[str, tuple[float, bool]]:
    floors = [
        row["median_s"] for row in case["rows"] if row["kind"] == "floor" and "median_s" in row
    ]
    scale = floors[0] if floors else 1.0
    return {
        row["name"]: (row["median_s"] / scale, bool(floors))
        for row in case["rows"]
        if row["kind"] == "ours" and "median_s" in row
    }


def recording_parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark that writes a record."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the record to this file")
    parser.add_argument("--strict", action="store_true", help="exit with 3 where a goal is missed")
    return parser


def measuring_parser(description: str | None, seconds: float) -> argparse.ArgumentParser:
    """Options of every benchmark timed by `measure`. seconds: default time budget of a case."""
    parser = recording_parser(description)
    parser.add_argument("--compare", type=Path, help="fail where we are slower than in this record")
    parser.add_argument(
        "--tolerance", type=float, default=0.10, help="allowed slowdown, as a fraction"
    )
    parser.add_argument("--seconds", type=float, default=seconds, help="time budget of a case")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, no tests, no record")
    return parser


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = measuring_parser(__doc__, seconds=20.0)
    parser.add_argument("--suite", required=True, choices=("cpu", "gpu"))
    parser.add_argument(
        "--op", action="append", choices=ops(), help="only this op (may be repeated)"
    )
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--row", action="append", help="only this row (may be repeated)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device("cuda" if options.suite == "gpu" and torch.cuda.is_available() else "cpu")
    if options.suite == "gpu" and device.type == "cpu" and not options.dry_run:
        print(
            "--suite gpu needs a CUDA device; --dry-run tries its code on CPU",
            file=sys.stderr,
        )
        return 2
    ceilings = measure.ceilings(device, tiny=options.dry_run)
    record = new_record(options.suite, device, ceilings=ceilings, ops={})
    print(json.dumps({**record["environment"], **ceilings}, indent=1))
    for op in options.op or ops():
        summary = "not run (dry run)" if options.dry_run else run_tests(op)
        print(f"\n== {op}: tests {summary}")
        module = importlib.import_module(f"benchmarks.kernels.bench_{op}")
        entry: dict[str, Any] = {"tests": summary, "cases": []}
        record["ops"][op] = entry
        for case in module.cases(options.suite, device, options.dry_run):
            if options.case and options.case not in case.name:
                continue
            if options.row:
                case = restricted(case, options.row)
            if options.dry_run:
                case = dataclasses.replace(case, goals=())
            outcomes = measure.measure(case, device, 0.0 if options.dry_run else options.seconds)
            entry["cases"].append(case_record(case, outcomes, ceilings))
            print_case(entry["cases"][-1])
            # Write after each case, so that an interrupted run keeps its results.
            if not options.dry_run:
                write_record(options.out, record)
    return finish(record, options)


def new_record(suite: str, device: torch.device | None = None, **content: Any) -> dict[str, Any]:
    """A record with its environment. device: None means the default device of the stages."""
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {"format": FORMAT, "suite": suite, "environment": environment(device), **content}


def write_record(path: Path | None, record: dict[str, Any]) -> None:
    """Write the record, complete or partial, if a path is given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def finish(record: dict[str, Any], options: argparse.Namespace) -> int:
    """Write the record, compare it, and return the exit code."""
    cases = [case for entry in record["ops"].values() for case in entry["cases"]]
    wrong = [
        f"{c['case']}/{r['name']}: {r['wrong']}" for c in cases for r in c["rows"] if "wrong" in r
    ]
    missed = [goal["goal"] for case in cases for goal in case["goals"] if goal["met"] is False]
    if options.out is not None and not options.dry_run:
        write_record(options.out, record)
        print(f"\nrecord: {options.out}")
    slower = []
    if options.compare is not None:
        slower = regressions(record, json.loads(options.compare.read_text()), options.tolerance)
    for title, lines in (("WRONG", wrong), ("SLOWER", slower), ("goal missed", missed)):
        for line in lines:
            print(f"{title}: {line}")
    if slower or any(r["kind"] == "ours" and "wrong" in r for c in cases for r in c["rows"]):
        return 1
    return 3 if missed and options.strict and not options.dry_run else 0


if __name__ == "__main__":
    sys.exit(main())
