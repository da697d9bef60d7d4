"""The GPU path on a played device: the quick cases. `make gpu-dry` runs all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gpu_dry import run as dry
from gpu_dry import suite
from gpu_dry.cases import Outcome
from gpu_dry.device import Place

from nemocascade.plan.generation import GRAPH_KERNELS

HERE = Path(__file__).resolve().parent
QUICK = [name for name, case in suite.CASES.items() if case.quick]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Any]:
    found: dict[str, Any] = dry.play(QUICK)
    return found


@pytest.mark.parametrize("name", QUICK)
def test_a_step_costs_what_its_budget_says(name: str, outcomes: dict[str, Any]) -> None:
    outcome = outcomes[name]
    assert not isinstance(outcome, str), outcome
    assert outcome.faults == []
    stored = dry.read_budgets()
    if stored["versions"] != dry.versions():
        pytest.skip(f"the budgets are of {stored['versions']}, installed is {dry.versions()}")
    changed = list(dry.differences(name, outcome, stored["cases"][name]))
    assert not changed, "\n".join([*changed, "if this is meant: make gpu-dry UPDATE=1"])


def test_a_decode_step_has_few_launches_and_one_wait(outcomes: dict[str, Any]) -> None:
    """In each layer, of every kind; a step that was not captured would count nothing."""
    outcome = outcomes["rollout"]
    assert list(dry.excesses("rollout", outcome)) == []
    assert len(outcome.layers) == len(suite.TINY.pattern)
    assert min(launches.total() for launches in outcome.layers.values()) > 0
    many = replace(outcome, layers={"layer 1": Counter(mm=dry.LAYER_LAUNCHES + 1)})
    assert len(list(dry.excesses("rollout", many))) == 1
    deaf = replace(outcome, parts={**outcome.parts, "decode step": Counter()})
    assert len(list(dry.excesses("rollout", deaf))) == 1


def test_the_planner_counts_the_kernels_of_a_layer_as_captured(outcomes: dict[str, Any]) -> None:
    captured = [launches.total() for _, launches in sorted(outcomes["rollout"].layers.items())]
    assert captured == [GRAPH_KERNELS[symbol] for symbol in suite.TINY.pattern]


def test_every_case_has_a_budget() -> None:
    budgets = dry.read_budgets()["cases"]
    assert set(budgets) == {n for n, case in suite.CASES.items() if case.stage != "kernels"}


@pytest.fixture(scope="module")
def device() -> dict[str, Any]:
    script = HERE / "check_device.py"
    done = subprocess.run(
        [sys.executable, str(script)], env=dry.environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("item", {"sync item": 1}),
        ("float of each", {"sync item": 4}),
        ("tolist", {"sync tolist": 1}),
        ("cpu", {"sync copy to host": 1}),
        ("copy into host memory", {"sync copy to host": 1}),
        ("list of scalars", {"sync item": 2}),
        ("nonzero", {"sync nonzero": 1}),
        ("rows by mask", {"sync index": 1}),
        ("fill by mask", {}),
        ("repeats of unknown size", {"sync repeat_interleave": 1}),
        ("repeats of known size", {}),
        ("pageable", {"copy pageable": 1}),
        ("pinned", {"copy pinned": 1}),
        ("from a list", {"copy pageable": 1}),
        ("synchronize", {"sync cuda.synchronize": 1}),
    ],
)
def test_what_waits_for_the_device_is_counted(
    call: str, expected: dict[str, int], device: dict[str, Any]
) -> None:
    assert device[call] == expected


def test_values_that_the_host_sent_are_known(device: dict[str, Any]) -> None:
    assert device["known values"] == [4, 5, 7]
    assert device["unknown values"] == [1.0] * 4


def test_memory_is_counted_by_storage_and_by_pool(device: dict[str, Any]) -> None:
    assert device["peak"] == [1024 + 512, 0]
    assert device["graph pools"] == {
        "own": 2 << 20, "own, freed": 0, "common": 1 << 20, "common, freed": 0
    }  # fmt: skip


def test_a_wait_inside_a_graph_is_a_fault(device: dict[str, Any]) -> None:
    assert device["faults"] == ["item waits for the device while a graph is captured"]


def test_a_newcomer_is_named_with_its_line() -> None:
    """The comparison itself, on counts made by hand."""
    here, there = Place("nemocascade/x.py::f", 12), Place("nemocascade/y.py::g", 7)
    before = Outcome({"step": Counter({("sync", "item", here): 1})}, 10, 20, [], Counter())
    budget = dry.budget_of(before)
    assert list(dry.differences("case", before, budget)) == []
    counts = Counter({("sync", "item", Place("nemocascade/x.py::f", 13)): 1})
    moved = Outcome({"step": counts}, 10, 20, [], Counter())
    assert list(dry.differences("case", moved, budget)) == [], "a line that moves costs nothing"
    more = Outcome({"step": counts + Counter({("sync", "item", there): 2})}, 10, 21, [], Counter())
    assert list(dry.differences("case", more, budget)) == [
        "case: peak_bytes 21, the budget is 20",
        "case: step: sync item in nemocascade/y.py::g: 2, the budget is 0 "
        "(2 at nemocascade/y.py:7 in g)",
    ]
    gone = Outcome({"step": Counter()}, 10, 20, [], Counter())
    assert len(list(dry.differences("case", gone, budget))) == 1
