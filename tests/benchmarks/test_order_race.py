"""The race of orders: every way can run and trains as much, and its summary is paired by seed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.ranks import run_ranks
from helpers.start_policy import start_policy

from benchmarks.end_to_end.order_race import (
    MIXED,
    PAPER,
    ROOT,
    UPDATES,
    WITH_MOPD,
    OrderRace,
    Run,
    Setting,
    Way,
    plot,
    seeds_agree,
    summary,
    ways_of,
)
from nemocascade.cascade.effects import Branch, Effects, Interference
from nemocascade.cascade.graph import StageGraph, cascade_problems
from nemocascade.cascade.interference import plan_branches
from nemocascade.recipe import GrpoRecipe
from nemocascade.recipe.commands import InterferenceSettings

SCRIPT = ROOT / "benchmarks" / "end_to_end" / "order_race.py"


@pytest.fixture(scope="module")
def race() -> OrderRace:
    return OrderRace(Setting(), Path("work"), Path("sft/artifact"), mopd=True)


@pytest.mark.parametrize("advised", [(), PAPER, ("code_rl", "if_rl", "rlhf", "multi_domain_rl")])
def test_the_ways_differ(advised: tuple[str, ...]) -> None:
    ways = ways_of(advised)
    assert ways["paper"] == PAPER
    assert ways["reverse"] == PAPER[::-1]
    assert ("advised" in ways) == (advised not in ((), PAPER))
    assert len(set(ways.values())) == len(ways)
    assert all(sorted(w) == sorted(PAPER) for name, w in ways.items() if name != MIXED)


def test_every_way_can_run_and_trains_as_much(race: OrderRace) -> None:
    spent = set()
    for order in ways_of(()).values():
        cascade = race.cascade(order, 1, race.distillation(1, ["math"]))
        assert cascade_problems(cascade, 1) == []
        graph = StageGraph(cascade)
        main = [s.name for s in cascade.stages if not s.side]
        side = [s.name for s in cascade.stages if s.side]
        assert side[0] == "mopd"
        # MOPD chooses from the stages before it, and the rest of the way comes once more.
        assert [s.name for s in graph.before("mopd")] == main[:2]
        assert [graph.start_of(name) for name in side] == [main[1], *side[:-1]]
        assert [graph.start_of(name) for name in main] == ["", *main[:-1]]
        assert [graph.stage(n).recipe for n in side[1:]] == [
            graph.stage(n).recipe for n in main[2:]
        ]
        stages = [graph.stage(name).recipe for name in main]
        recipes = [r for r in stages if isinstance(r, GrpoRecipe)]
        assert len(recipes) == len(main)
        rollouts = [r.rollout.prompts_per_step * r.rollout.rollouts_per_prompt for r in recipes]
        spent.add(sum(r.steps * n for r, n in zip(recipes, rollouts, strict=True)))
        open_, taught = graph.open_teachers("mopd"), race.distillation(1).domains
        assert open_ == [d.domain for d in taught if d.domain != "math"]
        alone = race.cascade(order, 1)
        assert alone.stages == tuple(s for s in cascade.stages if not s.side)
    assert len(spent) == 1
    plan = plan_branches(race._advising(), InterferenceSettings("", pairs=True))
    assert len(plan.sequences) == 4 + 12
    assert plan.artifact == "sft/artifact"
    assert cascade_problems(plan.cascade, 1) == []


def test_other_batches_train_as_many_prompts_and_change_the_updates(race: OrderRace) -> None:
    """Updates for a domain: the mixture's in every step, a stage's own in its steps alone."""
    ways = {"paper": Way(PAPER), "mixed": Way((MIXED,) * len(PAPER)), **UPDATES}
    prompts, steps = set(), {}
    for name, way in ways.items():
        cascade = race.scaled(way).cascade(way.order, 1)
        assert cascade_problems(cascade, 1) == []
        stages = [s.recipe for s in cascade.stages if isinstance(s.recipe, GrpoRecipe)]
        prompts.add(sum(r.steps * r.rollout.prompts_per_step for r in stages))
        steps[name] = sum(r.steps for r in stages)
    assert len(prompts) == 1
    assert steps["paper, small batches"] == len(PAPER) * steps["mixed"]
    assert steps["mixed, large batches"] * len(PAPER) == steps["paper"]
    folders = {race.scaled(way).cascade(way.order, 1).run_dir for way in UPDATES.values()}
    assert len(folders | {race.cascade(PAPER, 1).run_dir}) == 3


def test_a_mixed_stage_has_all_domains_in_equal_parts(race: OrderRace) -> None:
    mixed = race.stage(MIXED, 1)
    members = [race.stage(name, 1) for name in PAPER]
    assert [d.domain for d in mixed.domains] == [d.domain for m in members for d in m.domains]
    shares = {d.domain: d.share for d in mixed.domains}
    for member in members:
        assert sum(shares[d.domain] for d in member.domains) == pytest.approx(1)


def run(*means: float) -> Run:
    scores = [{"x": m + 0.1, "y": m - 0.1} for m in means]
    steps = [6 * n for n in range(len(means))]
    return Run(steps, [100 * s for s in steps], scores)


def test_the_summary_is_paired_by_seed(tmp_path: Path) -> None:
    runs = {
        "paper": [run(0.2, 0.3, 0.4), run(0.2, 0.4, 0.5), run(0.2, 0.3, 0.45)],
        "reverse": [run(0.2, 0.3, 0.38), run(0.2, 0.3, 0.48), run(0.2, 0.2, 0.43)],
    }
    found = summary(runs, 0.8)
    assert found["level"] == pytest.approx(0.2 + 0.8 * 0.25)
    entry = found["ways"]["reverse"]
    assert entry["mean_minus_paper"]["value"] == pytest.approx(-0.02)
    assert entry["mean_minus_paper"]["ci95"] == pytest.approx([-0.02, -0.02])
    assert entry["worst_domain"]["value"] == pytest.approx(np.mean([0.28, 0.38, 0.33]))
    assert found["ways"]["paper"]["steps_to_level"]["value"] == 12
    # One of three seeds does not reach the level.
    assert entry["steps_to_level"]["ci95"][1] is None
    distilled = [run(0.2, 0.3, 0.5), run(0.2, 0.4, 0.7), run(0.2, 0.3, 0.6)]
    runs |= {name + WITH_MOPD: distilled for name in ("paper", "reverse")}
    found = summary(runs, 0.8)
    assert found["ways"]["reverse, MOPD"]["mean_minus_paper"]["value"] == 0
    assert found["ways"]["paper, MOPD"]["mean_minus_without"]["value"] == pytest.approx(0.15)
    assert found["ways"]["paper"]["tokens_to_level"]["value"] == 1200
    json.dumps(found)
    plot(tmp_path / "x.png", runs)
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(("luck", "agrees"), [(0.0, True), (0.3, False)])
def test_the_matrix_of_two_seeds_agrees_if_training_has_no_luck(luck: float, agrees: bool) -> None:
    dice = np.random.default_rng(0)

    def tasks(mean: float) -> dict[str, list[float | None]]:
        return {d: (dice.random(200) < mean).astype(float).tolist() for d in "abcdefghij"}

    branches = [
        Branch(list(names), seed, tasks(0.3 + 0.15 * len(names) + luck * seed))
        for seed in (0, 1)
        for names in (("a",), ("b",), ("a", "b"), ("b", "a"))
    ]
    measured = Interference("start", "", ["a", "b"], {}, {}, tasks(0.3), branches)
    found = seeds_agree(Effects(measured))
    assert len(found["cells"]) == 40
    assert (found["within"] > 0.85) == agrees


def test_ways_run_in_processes_of_their_own(race: OrderRace) -> None:
    copy = pickle.loads(pickle.dumps(race))
    assert copy.cascade(PAPER, 3) == race.cascade(PAPER, 3)


@pytest.mark.slow
def test_the_quick_race_leaves_a_record_and_resumes(tmp_path: Path) -> None:
    record = tmp_path / "race.json"
    [artifact] = run_ranks(start_policy, 1, {"folder": str(tmp_path / "start")})
    command = [sys.executable, str(SCRIPT), "--quick", "--mopd", "--updates", "--seeds", "1"]
    command += ["--work", str(tmp_path / "work"), "--sft", artifact, "--out", str(record)]
    first = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert first.returncode == 0, first.stderr[-4000:]
    found = json.loads(record.read_text())
    ways = ways_of(found["advised"])
    expected = {*ways, *(f"{name}{WITH_MOPD}" for name in ways), *UPDATES}
    assert set(found["runs"]) == set(found["summary"]["ways"]) == expected
    assert record.with_suffix(".png").stat().st_size > 1000
    # All of it is kept, so the second race is the first one's.
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.stdout == first.stdout, again.stderr[-4000:]
