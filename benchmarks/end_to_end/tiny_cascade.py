"""Gains of the whole tiny cascade, over seeds and levels of the processor.

    python benchmarks/end_to_end/tiny_cascade.py --out benchmarks/results/<record>.json
    python benchmarks/end_to_end/tiny_cascade.py --seeds 1 --levels v3
    python benchmarks/end_to_end/tiny_cascade.py --show benchmarks/results/<record>.json

Each run is recipes/tiny/cascade.py on `--ranks` processes of one thread, with the seed in all of
its stages. A level sets the instructions of our kernels, of torch, oneDNN and MKL. Sums differ in
their last bits from level to level, which a training run amplifies: levels of one machine stand for
other machines. Held-out tasks are the same in all runs.

Reported, as medians and ranges over the runs: scores of each RL stage's own domains before and
after it, and of MOPD's domains beside their teachers, in points of 100. CPU seconds are those of
all processes of a run; one that was resumed has none.

Runs are stored in `--work`, and resume. Several processes may make some runs each; a last one over
all of them writes the record.

Exit code: 0 fine; 1 a run failed; 2 this processor lacks a level; 3 a gain is below `GOAL` and
`--strict` was given.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.run import new_record, recording_parser, write_record  # noqa: E402
from nemocascade.cascade.lineage import listed_in  # noqa: E402
from nemocascade.cascade.records import SCORES  # noqa: E402
from nemocascade.recipe import CascadeRecipe, load_recipe  # noqa: E402
from nemocascade.stages.scoring import Scores, read_scores  # noqa: E402

SCRIPT = "recipes/tiny/cascade.py"
GOAL = 15.0
"""Least gain of an RL stage in each of its own domains, in points."""
TO_WIN = 10.0
"""Points by which a teacher must exceed the student, for MOPD to have something to win back."""
LEVELS = {
    "base": ("base", "default", "SSE41", "SSE4_2"),
    "v3": ("v3", "avx2", "AVX2", "AVX2"),
    "v4": ("v4", "avx512", "AVX512_CORE", "AVX512"),
}
VARIABLES = (
    *("NEMOCASCADE_CPU_LEVEL", "ATEN_CPU_CAPABILITY"),
    *("ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS"),
)


def has_level(level: str) -> bool:
    """True if this processor has the level's instructions."""
    if level == "base":
        return True
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    return {"v3": "avx2", "v4": "avx512vl"}[level] in flags


def run(cascade: CascadeRecipe, folder: Path, level: str, seed: int, ranks: int) -> float | None:
    """Run or resume the cascade; returns the CPU seconds of a run that needed no second start."""
    is_new, spent = not folder.exists(), folder / "cpu_seconds.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "nemocascade.cli", "run", SCRIPT]
    command += ["--run-dir", str(folder)]
    for stage in cascade.stages:
        command += [f"--stages.{stage.name.replace('_', '-')}.seed", str(seed)]
    limits = dict(zip(VARIABLES, LEVELS[level], strict=True))
    started = _cpu_seconds_of_children()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **limits},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        print(done.stderr[-4000:], file=sys.stderr)
        raise SystemExit(1)
    if is_new:
        spent.write_text(json.dumps(_cpu_seconds_of_children() - started))
    return float(json.loads(spent.read_text())) if spent.is_file() else None


def _cpu_seconds_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(cascade: CascadeRecipe, folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of a finished run in points, by stage and domain: `before` and `after` for each of the
    stage's own domains, in MOPD also `teacher`."""
    listed = listed_in(folder)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for stage, entry in zip(cascade.stages, listed.stages, strict=True):
        if stage.kind == "sft":
            continue
        before, after = (_scores(folder, name) for name in (entry.start, entry.name))
        rows = found[stage.name] = {}
        for domain in (d.domain for d in stage.recipe.domains):  # type: ignore[union-attr]
            row = rows[domain] = {
                "before": _points(before, domain),
                "after": _points(after, domain),
            }
            if stage.kind == "mopd":
                score = listed.teachers[domain].score
                row["teacher"] = row["before"] if score is None else 100 * score
    return found


def _scores(folder: Path, stage: str) -> Scores:
    found = read_scores(folder / "stages" / stage / SCORES)
    if found is None:
        raise SystemExit(f"{folder}: stage {stage} has no scores; run it again to finish it")
    return found


def _points(scores: Scores, domain: str) -> float:
    score = scores.of(domain)
    if score is None:
        raise SystemExit(f"no verdict of {domain}: see the errors of {scores.digest[:12]}")
    return 100 * score


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median and range over the runs of every score and gain. A run: `scores` as `measured`."""
    found: dict[str, Any] = {}
    for stage, rows in runs[0]["scores"].items():
        found[stage] = {}
        for domain in rows:
            mine = [r["scores"][stage][domain] for r in runs]
            entry = {what: _spread([row[what] for row in mine]) for what in mine[0]}
            entry["gain"] = _spread([row["after"] - row["before"] for row in mine])
            if "teacher" in entry:
                entry["to_win"] = _spread([row["teacher"] - row["before"] for row in mine])
            found[stage][domain] = entry
    return found


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def missed(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Runs in which an RL stage gains less than `GOAL` in a domain of its own, or MOPD has less
    than three domains to win back."""
    found = []
    for each in runs:
        for stage, rows in each["scores"].items():
            if any("teacher" in row for row in rows.values()):
                open_ = [d for d, row in rows.items() if row["teacher"] - row["before"] >= TO_WIN]
                if len(open_) < 3:
                    found.append(f"{each['level']}, seed {each['seed']}: {stage} has {open_}")
                continue
            found += [
                f"{each['level']}, seed {each['seed']}: {stage}, {domain} {gain:+.1f}"
                for domain, row in rows.items()
                if (gain := row["after"] - row["before"]) < GOAL
            ]
    return found


def table(record: dict[str, Any]) -> str:
    """The record's tables in Markdown: RL stages, then MOPD."""
    lines = ["| stage | domain | before | after | gain |", "|---|---|---|---|---|"]
    taught = ["| domain | teacher | before | after |", "|---|---|---|---|"]
    for stage, rows in record["summary"].items():
        for domain, row in rows.items():
            if "teacher" in row:
                cells = (domain, *(_cell(row[w]) for w in ("teacher", "before", "after")))
                taught.append(f"| {' | '.join(cells)} |")
            else:
                cells = (stage, domain, *(_cell(row[w]) for w in ("before", "after", "gain")))
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *taught])


def _cell(spread: dict[str, float]) -> str:
    return f"{spread['median']:.1f} ({spread['low']:.1f} to {spread['high']:.1f})"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = recording_parser(__doc__)
    here = [level for level in LEVELS if has_level(level)]
    parser.add_argument("--seeds", type=int, default=3, help="this many seeds")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--levels", nargs="+", default=here[-2:], choices=list(LEVELS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--work", type=Path, default=Path("runs/tiny_cascade"))
    parser.add_argument("--show", type=Path, help="print the tables of this record, run nothing")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.show is not None:
        print(table(json.loads(options.show.read_text(encoding="utf-8"))))
        return 0
    if lacking := [level for level in options.levels if not has_level(level)]:
        print(f"this processor has no level {', '.join(lacking)}: name others with --levels")
        return 2
    cascade = load_recipe(ROOT / SCRIPT, CascadeRecipe)
    runs: list[dict[str, Any]] = []
    for seed in range(options.first, options.first + options.seeds):
        for level in options.levels:
            folder = options.work.resolve() / f"seed_{seed}_{level}"
            seconds = run(cascade, folder, level, seed, options.ranks)
            scores = measured(cascade, folder)
            runs.append({"seed": seed, "level": level, "cpu_seconds": seconds, "scores": scores})
            took = "resumed" if seconds is None else f"{seconds:.0f} CPU seconds"
            print(f"seed {seed}, {level}: {took}", flush=True)
    times = [r["cpu_seconds"] for r in runs if r["cpu_seconds"] is not None]
    record = new_record(
        "end_to_end",
        settings={"ranks": options.ranks, "goal": GOAL, "to_win": TO_WIN},
        cpu_seconds=_spread(times) if times else None,
        summary=summary(runs),
        missed=missed(runs),
        runs=runs,
    )
    print(table(record))
    print(f"missed: {'; '.join(record['missed']) or 'none'}")
    write_record(options.out, record)
    return 3 if record["missed"] and options.strict else 0


if __name__ == "__main__":
    sys.exit(main())
