"""Pages of the benchmarks: their files exist, and their tables are those of the records. The
page that compares frameworks: every cell has a source."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")


def test_every_file_that_the_page_names_exists() -> None:
    names = [name for name in re.findall(r"`([\w/]+\.py)`", README) if "<" not in name]
    assert names
    folders = (ROOT / "benchmarks", ROOT)
    gone = [name for name in names if not any((f / name).is_file() for f in folders)]
    assert not gone


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module tools/kernel_table.py."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    return importlib.import_module("kernel_table")


def test_the_table_of_kernel_times_is_that_of_the_records() -> None:
    done = subprocess.run(
        [sys.executable, "tools/kernel_table.py", "--check"], cwd=ROOT, check=False
    )
    assert done.returncode == 0, "python tools/kernel_table.py writes it anew"


def test_every_op_has_a_row_in_the_table(table: Any) -> None:
    ops = {path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/kernels/bench_*.py")}
    assert table.SHOWN.keys() >= ops


def record(date: str, time_s: float, **environment: Any) -> str:
    case = {
        "case": "forward and backward, 4096 x 128, top 6",
        "settings": {"T": 4096, "score": "sigmoid"},
        "rows": [
            {"name": "ours", "kind": "ours", "median_s": time_s},
            {"name": "chain", "kind": "peer", "median_s": 0.01},
            {"name": "gone", "kind": "peer", "missing": "not installed"},
        ],
    }
    where = {"date": date, "cpu": "Fast(R) Processor", "cpu_threads": 2, **environment}
    return json.dumps({"environment": where, "ops": {"moe_router": {"cases": [case]}}})


def test_a_row_is_the_newest_record_of_a_machine(table: Any, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(record("2026-10-01", 0.004))
    (tmp_path / "b.json").write_text(record("2026-11-02", 0.0025))
    limits = {"NEMOCASCADE_CPU_LEVEL": "v3"}
    (tmp_path / "c.json").write_text(record("2026-09-01", 0.005, cpu_limits=limits))
    lines = [line for line in table.table(tmp_path).splitlines() if "moe_router" in line]
    case = "| `moe_router` | forward and backward, 4096 x 128, top 6 (T 4,096) |"
    assert lines == [
        f"{case} Fast, 2 threads; 2026-11 | 2.5 ms | chain 4.00 |",
        f"{case} Fast, 2 threads, `NEMOCASCADE_CPU_LEVEL=v3`; 2026-09 | 5 ms | chain 2.00 |",
    ]
    assert "| `linear_logprob` | | not measured | | |" in table.table(tmp_path)


COMPARED = (ROOT / "docs" / "compared.md").read_text(encoding="utf-8")
PEERS = ("torchtitan", "NeMo RL", "prime-rl", "verl", "slime")
NOT_FOUND = "not found in its documentation"


def compared_rows() -> dict[str, list[str]]:
    """The cells of each row that compares all six, by the row's name."""
    cells = [line.strip("| ").split(" | ") for line in COMPARED.splitlines() if line[:1] == "|"]
    return {name: rest for name, *rest in cells if len(rest) == len(PEERS) + 1}


def headings(page: Path) -> set[str]:
    """Anchors of a page, as GitHub makes them."""
    lines = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line.lower()).replace(" ", "-") for line in lines}


def test_every_cell_about_another_framework_has_a_source() -> None:
    sources = dict(re.findall(r"^\[([\w-]+)\]: (https://\S+)$", COMPARED, re.MULTILINE))
    [commits] = re.findall(r"^\| commit \| (.+) \|$", COMPARED, re.MULTILINE)
    read = [commit.strip("`") for commit in commits.split(" | ")]
    named = set()
    assert len(compared_rows()) > 25
    for row, cells in compared_rows().items():
        for peer, commit, cell in zip(PEERS, read, cells, strict=False):
            found = re.findall(r"\]\[([\w-]+)\]", cell)
            assert (cell == NOT_FOUND) != bool(found), (row, peer, cell)
            assert all(re.search(rf"/(blob|tree)/{commit}", sources[name]) for name in found), row
            named |= set(found)
    assert named == sources.keys()


def test_every_cell_about_this_project_links_a_page_of_it() -> None:
    for row, (*_, own) in compared_rows().items():
        links = re.findall(r"\]\(([^)]+)\)", own)
        assert links, row
        for link in links:
            name, _, anchor = link.partition("#")
            page = ROOT / "docs" / name
            assert page.is_file(), (row, link)
            assert not anchor or anchor in headings(page), (row, link)


def test_no_figure_of_a_gpu_is_claimed_before_there_is_one() -> None:
    results = " ".join((ROOT / "docs" / "results.md").read_text(encoding="utf-8").split())
    is_unproven = "There is no GPU figure yet" in results
    assert compared_rows()["run on GPUs"][-1].startswith("[never") == is_unproven


def test_the_readme_names_the_comparison() -> None:
    assert "(docs/compared.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
