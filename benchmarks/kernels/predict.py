"""Print an estimated time on an H200 for every op, beside its goal. No GPU is needed.

    python benchmarks/kernels/predict.py                     # all cases
    python benchmarks/kernels/predict.py --only experts      # cases whose name contains this
    python benchmarks/kernels/predict.py --parts             # every launch, and what bounds it

Each case calls the op on fake tensors of a device that is played (`tests/gpu_dry`). Its Triton
launches are compiled for sm_90 with the grid and specialisation that they would have; registers,
shared memory and instruction counts are read from the result, and `estimate.py` makes times of
them. They are estimates: no figure of a page comes from here. `--record FILE` prints a measurement
of `benchmarks/run.py --suite gpu` beside them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

from gpu_dry import run as gpu_dry  # noqa: E402

from benchmarks.kernels import played_calls, predict_cases  # noqa: E402
from benchmarks.kernels.estimate import (  # noqa: E402
    Ceilings,
    Estimate,
    Launch,
    Loop,
    Operator,
    estimates,
)


class Goal(NamedTuple):
    """A goal: `value` of a case in `unit`, and the case of a peer for the last two.

    Upper limits: "us"; "x products", multiples of the case's bare products at the ceiling; "x
    bytes", multiples of its bytes at the ceiling; "GiB" of memory beyond inputs; "x kept", bytes
    kept for the backward beside the peer's. Lower limits: "TFLOP/s", "TB/s", "x faster" than the
    peer, whose products count at the ceiling: it is estimated faster than it is.
    """

    case: str
    value: float
    unit: str
    peer: str = ""

    @property
    def at_most(self) -> bool:
        return self.unit not in ("TFLOP/s", "TB/s", "x faster")


#: The goals on an H200, by case of predict_cases.CASES. That of linear_distill_loss is a CPU's.
GOALS = (
    Goal("linear_logprob forward 8192/4096/131072", 1.10, "x products"),
    Goal("linear_policy_loss 8192/4096/131072", 1.10, "x products"),
    Goal("linear_policy_loss 8192/4096/131072, a quarter trained", 0.30, "x products"),
    Goal("linear_policy_loss 262144/4096/131072", 1.5, "GiB"),
    Goal("linear_distill_loss reverse_kl 8192/4096/131072", 1.15, "x products"),
    Goal(
        "mopd_advantage metrics 262144",
        10.0,
        "x faster",
        "mopd_advantage metrics 262144, a chain of torch",
    ),
    Goal("moe_router forward 8192 x 512", 9.0, "us"),
    Goal("moe_router forward 65536 x 128", 2.5, "TB/s"),
    Goal("moe_router forward 65536 x 128", 2.0, "x bytes"),
    Goal("moe_experts qwen3 T 8192 forward", 500.0, "TFLOP/s"),
    Goal("moe_experts qwen3 T 8192 backward", 380.0, "TFLOP/s"),
    Goal("moe_experts nemotron T 32768 forward", 600.0, "TFLOP/s"),
    Goal("moe_experts nemotron T 32768 backward", 540.0, "TFLOP/s"),
    *(
        Goal(f"moe_experts {model}", value, unit, f"moe_experts {model}, torch's grouped_mm")
        for model in ("qwen3 T 8192", "nemotron T 32768")
        for value, unit in ((2.0, "x faster"), (0.5, "x kept"))
    ),
    Goal("decode_step attention tp2 64 x 32768", 1.1, "x bytes"),
)


class Prediction(NamedTuple):
    """The estimate of a case. parts: of each launch and operator, in order. peak, kept: bytes of
    memory beyond the inputs, at most and for the backward."""

    case: predict_cases.Case
    parts: tuple[Estimate, ...]
    peak: int = 0
    kept: int = 0

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def bound(self) -> str:
        """The bound of the largest share of the time, and the part that has most of it."""
        shares: Counter[str] = Counter()
        for part in self.parts:
            shares[part.bound] += part.seconds  # type: ignore[assignment]
        worst = max(self.parts, key=lambda part: part.seconds)
        bound, share = max(shares.items(), key=lambda item: item[1])
        return f"{bound} ({share / self.seconds:.0%}; most in {worst.name})"

    def measure(self, unit: str, on: Ceilings, peer: Prediction | None = None) -> float:
        """The prediction in the unit of a goal."""
        if unit == "GiB":
            return self.peak / 2**30
        if unit == "x kept":
            return self.kept / peer.kept if peer and peer.kept else float("inf")
        if unit == "x faster":
            return peer.seconds / self.seconds if peer else 0.0
        return measure_of(self.case, self.seconds, unit, on)


def measure_of(case: predict_cases.Case, seconds: float, unit: str, on: Ceilings) -> float:
    """A time in the unit of a goal about times."""
    if unit == "us":
        return seconds * 1e6
    if unit == "TFLOP/s":
        return case.flops / seconds / 1e12
    if unit == "TB/s":
        return case.bytes / seconds / 1e12
    if unit == "x bytes":
        return seconds / (case.bytes / (on.terabytes_s * 1e12))
    return seconds / (case.flops / (on.tflops * 1e12))


def reaches(goal: Goal, value: float) -> bool:
    """True if a value in the goal's unit reaches it."""
    return value <= goal.value if goal.at_most else value >= goal.value


def predict(names: Sequence[str], on: Ceilings) -> list[Prediction]:
    """Play the cases in a process of their own, and estimate their launches."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "events.json"
        subprocess.run(
            [sys.executable, __file__, "--worker", str(file), *names],
            env=gpu_dry.environment(),
            cwd=ROOT,
            check=True,
        )
        played = json.loads(file.read_text(encoding="utf-8"))
    found = []
    for name in names:
        case, entry = predict_cases.CASES[name], played[name]
        events = [event_of(event) for event in entry["events"]]
        parts = tuple(estimates(events, case.work, on, case.kernels))
        found.append(Prediction(case, parts, entry["peak"] - case.outputs, entry["kept"]))
    return found


def event_of(entry: dict[str, Any]) -> Launch | Operator:
    """An event as the worker wrote it."""
    if "programs" not in entry:
        return Operator(**entry)
    loops = {key: Loop(*entry[key]) for key in ("body", "once")}
    return Launch(**{**entry, **loops})


def measured(record: dict[str, Any], name: str) -> float | None:
    """Median seconds of our row of the case of this name in a record, if it has one."""
    op, _, case_name = name.partition(" ")
    for case in record.get("ops", {}).get(op, {}).get("cases", ()):
        if case["case"] == case_name:
            times = [r.get("median_s") for r in case["rows"] if r["kind"] == "ours"]
            return times[0] if times else None
    return None


def lines(predictions: Sequence[Prediction], record: dict[str, Any], on: Ceilings) -> list[str]:
    """The table: estimate, goal, and whether the estimate reaches it, or what bounds it. A case has
    a line for each of its goals."""
    shown = [f"{'case':58s} {'estimate':>16s} {'goal':>18s} {'measured':>16s}  verdict"]
    by_name = {p.case.name: p for p in predictions}
    for p in predictions:
        goals: list[Goal | None] = [g for g in GOALS if g.case == p.case.name]
        seconds = measured(record, p.case.name)
        for goal in goals or [None]:
            unit = goal.unit if goal else "us"
            limit, verdict = "-", f"no goal; bound by {p.bound}"
            value = p.measure(unit, on, by_name.get(goal.peer) if goal else None)
            if goal is not None:
                limit = f"{'<=' if goal.at_most else '>='} {goal.value:g} {unit}"
                verdict = verdict_of(goal, value, p)
            real = "-"
            if seconds is not None and unit not in ("GiB", "x kept", "x faster"):
                real = f"{measure_of(p.case, seconds, unit, on):.4g} {unit}"
            estimate = f"{value:.3g} {unit}"
            shown.append(f"{p.case.name:58s} {estimate:>16s} {limit:>18s} {real:>16s}  {verdict}")
    return shown


def verdict_of(goal: Goal, value: float, p: Prediction) -> str:
    """The verdict on a prediction: its goal is reached, or what bounds it."""
    if reaches(goal, value):
        return "estimate reaches the goal"
    bound = "what is kept" if goal.unit in ("GiB", "x kept") else p.bound
    return f"estimate misses the goal: bound by {bound}"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--parts", action="store_true", help="show every launch")
    parser.add_argument("--record", type=Path, help="a record of --suite gpu to show beside")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    names = [name for name in predict_cases.CASES if options.only in name]
    if not names:
        print(f"no case contains {options.only!r}: choose among {list(predict_cases.CASES)}")
        return 2
    peers = {g.peer for g in GOALS if g.peer and g.case in names}
    names += sorted(peers.difference(names))
    on = Ceilings()
    print(f"ESTIMATES for an H200, not measurements. Ceilings: {on}\n")
    record = json.loads(options.record.read_text()) if options.record else {}
    predictions = predict(names, on)
    print("\n".join(lines(predictions, record, on)))
    for p in predictions if options.parts else ():
        print(f"\n{p.case.name}: estimate {p.seconds * 1e6:,.1f} us")
        for part, times in Counter(p.parts).items():
            print(f"  {times:4d} x {part.name:44s} {part.seconds * 1e6:12,.2f} us  {part.bound}")
    return 0


def worker(file: Path, names: Sequence[str]) -> None:
    """Play cases and write their events."""
    played: dict[str, dict[str, Any]] = played_calls.play(names)
    file.write_text(json.dumps(played), encoding="utf-8")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]), sys.argv[3:])
    else:
        sys.exit(main())
