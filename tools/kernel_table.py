"""Write the best measured times of the kernel ops, from benchmarks/results, into kernels/README.md.

python tools/kernel_table.py           # write the table
python tools/kernel_table.py --check   # exit code 1 if the page is not up to date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "kernels" / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- table: tools/kernel_table.py -->\n", "<!-- end of the measured times -->\n"

#: Cases of an op that the table shows, by a part of their name.
SHOWN = {
    "linear_logprob": ("forward 8192", "forward and backward 8192"),
    "linear_policy_loss": ("gradients bfloat16", "gradients float32 8192"),
    "linear_distill_loss": ("",),
    "mopd_advantage": ("",),
    "moe_router": ("forward and backward, 4096 x 128", "forward and backward, 8192 x 512"),
    "moe_experts": ("forward and backward, medium relu2, T 8192, ", "nemotron", "qwen3"),
    "mamba2": ("",),
    "rms_norm": ("",),
    "decode_step": ("",),
    "decode": ("tiny/64", "small/64"),
}
SIZES = ("T", "H", "V", "E", "K", "I", "dtype", "batch", "parameters")


def table(results: Path = RESULTS) -> str:
    """The table as Markdown: a row for each shown case and machine, and for each op without one."""
    lines = [
        "| op | case | machine | ours | as multiples of ours |",
        "|---|---|---|---|---|",
    ]
    for op in SHOWN:
        found = [row(op, record, case) for record, case in newest(op, results)]
        lines += found or [f"| `{op}` | | not measured | | |"]
    return "\n".join(lines) + "\n"


def newest(op: str, results: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The newest measurement of each shown case on each machine, as its record and case."""
    found: dict[tuple[str, str], tuple[dict[str, Any], dict[str, Any]]] = {}
    records = [json.loads(path.read_text(encoding="utf-8")) for path in results.glob("*.json")]
    for record in sorted(records, key=lambda r: str(r["environment"].get("date"))):
        for case in record.get("ops", {}).get(op, {}).get("cases", ()):
            has_times = any(is_ours(r) and "median_s" in r for r in case["rows"])
            if has_times and any(part in case["case"] for part in SHOWN[op]):
                found[case["case"], machine(record)] = record, case
    for key in sorted(found):
        yield found[key]


def is_ours(row: dict[str, Any]) -> bool:
    return bool(row["kind"] == "ours")


def machine(record: dict[str, Any]) -> str:
    """The processor or GPU of a record, with what was kept from it."""
    where = record["environment"]
    if where.get("gpu"):
        return str(where["gpu"])
    limits = ", ".join(f"`{name}={value}`" for name, value in where.get("cpu_limits", {}).items())
    threads = where["cpu_threads"]
    name = where["cpu"].replace("(R)", "").replace(" Processor", "")
    text = f"{name}, {threads} thread{'s' if threads > 1 else ''}"
    return f"{text}, {limits}" if limits else text


def row(op: str, record: dict[str, Any], case: dict[str, Any]) -> str:
    """The row of one case."""
    timed = [r for r in case["rows"] if "median_s" in r]
    ours = next(r for r in timed if is_ours(r))
    others = [
        f"{r['name']} {r['median_s'] / ours['median_s']:.2f}" for r in timed if not is_ours(r)
    ]
    sizes = ", ".join(
        f"{key} {value:,}" if isinstance(value, int) else f"{key} {value}"
        for key, value in case["settings"].items()
        if key in SIZES
    )
    time_ms = 1e3 * ours["median_s"]
    time = f"{time_ms:,.0f} ms" if time_ms >= 1000 else f"{time_ms:.4g} ms"
    date = str(record["environment"]["date"])[:7]
    cells = (f"`{op}`", f"{case['case']} ({sizes})", f"{machine(record)}; {date}", time)
    return f"| {' | '.join(cells)} | {'; '.join(others) or '-'} |"


if __name__ == "__main__":
    sys.exit(pages.update(PAGE, (BEGIN, END), table, sys.argv[1:]))
