"""Branches of an interference measurement: which run, from what, and what they leave."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from helpers.cascade_jobs import branches, mopd, rl, sft, small_cascade
from helpers.ranks import run_ranks

from nemocascade.cascade.graph import StageGraph, cascade_problems
from nemocascade.cascade.interference import plan_branches
from nemocascade.recipe import AlarmConfig, CascadeRecipe, RecipeError, StageConfig
from nemocascade.recipe.commands import InterferenceSettings


def cascade() -> CascadeRecipe:
    return small_cascade(
        "run",
        stages=(
            StageConfig("sft", sft()),
            StageConfig("if_rl", rl("if_rl", steps=7, seed=5)),
            StageConfig("math_rl", rl("math_rl", "math")),
            StageConfig("aside", rl("aside", "math"), start="sft", side=True),
            StageConfig("mopd", mopd()),
            StageConfig("last", rl("last")),
        ),
        alarm=AlarmConfig(stop=True),
    )


def test_the_branches_start_from_one_artifact() -> None:
    plan = plan_branches(cascade(), InterferenceSettings("", steps=3, seeds=2, samples=4))
    assert (plan.start, plan.artifact) == ("sft", "run/stages/sft/artifact")
    assert plan.order == ("if_rl", "math_rl", "last")
    assert list(plan.sequences) == [*plan.order, *(f"{n}_seed_2" for n in plan.order)]
    assert cascade_problems(plan.cascade, 1) == []
    graph = StageGraph(plan.cascade)
    for name, (stages, number) in plan.sequences.items():
        resolved = graph.resolved(name)
        own = next(s.recipe for s in cascade().stages if s.name == stages[0])
        assert graph.start_of(name) == ""
        assert resolved.init_from == plan.artifact
        assert resolved.run_dir == f"run/interference/stages/{name}"
        assert (resolved.steps, resolved.seed) == (3, own.seed + number)
    assert all(s.side for s in plan.cascade.stages)
    assert plan.cascade.scores.samples == 4
    # A measurement expects losses.
    assert not plan.cascade.alarm.stop


def test_pairs_run_in_both_orders() -> None:
    settings = InterferenceSettings("", stages=("last", "if_rl"), pairs=True)
    plan = plan_branches(cascade(), settings)
    assert plan.order == ("if_rl", "last")
    graph = StageGraph(plan.cascade)
    starts = {name: graph.start_of(name) for name in plan.sequences}
    assert starts == {
        "if_rl": "",
        "last": "",
        "if_rl_then_last": "if_rl",
        "last_then_if_rl": "last",
    }
    assert graph.resolved("last_then_if_rl").steps == 7
    assert graph.resolved("last_then_if_rl").seed == 5
    assert cascade_problems(plan.cascade, 1) == []


def test_what_cannot_be_measured_is_rejected() -> None:
    def message(**settings: object) -> str:
        with pytest.raises(RecipeError) as caught:
            plan_branches(cascade(), InterferenceSettings("", **settings))  # type: ignore[arg-type]
        return str(caught.value)

    text = message(stages=("if_rl", "mopd", "nope", "if_rl"), start="other")
    assert "mopd is mopd: only RL stages" in text
    assert "'nope' is not a stage" in text
    assert "if_rl twice" in text
    assert "--start 'other'" in text
    assert "--pairs needs two stages" in message(stages=("if_rl",), pairs=True)
    only_sft = small_cascade("run", stages=(StageConfig("sft", sft()),))
    with pytest.raises(RecipeError, match="no RL stage"):
        plan_branches(only_sft, InterferenceSettings(""))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_matrix_of_a_real_cascade(tmp_path: Path, ranks: int) -> None:
    found, *others = run_ranks(branches, ranks, {"root": str(tmp_path)}, timeout_s=550)
    assert all(other == found for other in others)
    # The finished if_rl of the cascade is a branch already.
    assert sorted(found["artifacts"]) == ["if_rl_then_math_rl", "math_rl", "math_rl_then_if_rl"]
    matrix = found["matrix"]
    measured = matrix["measured"]
    assert (measured["start"], measured["digest"]) == ("sft", found["main"]["sft"])
    assert measured["order"] == ["if_rl", "math_rl"]
    runs = {tuple(b["stages"]): b["tasks"] for b in measured["branches"]}
    assert list(runs) == [("if_rl",), ("math_rl",), ("if_rl", "math_rl"), ("math_rl", "if_rl")]
    for name, tasks in (("sft", measured["base"]), ("if_rl", runs["if_rl",])):
        for domain, score in found["scores"][name]["scores"].items():
            assert tasks[domain] == score["task_means"]
            assert statistics.mean(tasks[domain]) == pytest.approx(score["score"])
    for name in ("if_rl", "math_rl"):
        for domain, cell in matrix["alone"][name].items():
            change = statistics.mean(runs[(name,)][domain]) - statistics.mean(
                measured["base"][domain]
            )
            assert cell["change"] == pytest.approx(change)
            assert cell["standard_error"] > 0
    assert [(s["first"], s["second"]) for s in matrix["second"]] == list(runs)[2:]
    sides = {s["name"]: s["side"] for s in found["cascade"]["stages"]}
    assert set(sides.values()) == {True}
    assert found["untouched"]
    assert {len(means) for means in found["tasks"].values()} == {2}
    assert found["own_kept"] == {"stages/sft/scores.json": True, "cascade.json": True}
    assert "math RL" in found["page"]
    assert 'href="interference.html"' in found["index"]
