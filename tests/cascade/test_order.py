"""Effects and advice from synthetic matrices whose answers are known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.cascade_run import make_run

from nemocascade.cascade.effects import (
    FILE,
    FOLDER,
    Branch,
    Effects,
    Interference,
    read_interference,
)
from nemocascade.cascade.errors import ReportError
from nemocascade.cascade.interference import as_json
from nemocascade.cascade.order import advise, advise_order, swaps
from nemocascade.cascade.order_text import order_text
from nemocascade.cascade.report import write_report
from nemocascade.cascade.report.effects import sentences, table
from nemocascade.recipe import RecipeError
from nemocascade.recipe.commands import OrderSettings

STAGES = ("a", "b", "c", "d")
DOMAINS = ("x", "y")
Pairs = Mapping[tuple[str, str], float]


def measured(
    alone: Mapping[tuple[str, str], float],
    recovery: Pairs,
    *,
    stages: Sequence[str] = STAGES,
    tasks: int = 400,
    noise: float = 0.02,
    seeds: int = 1,
    seed_noise: float = 0.0,
    dice: int = 0,
    pairs: bool = True,
) -> Interference:
    """Task means around the model's scores. alone: by stage and domain; recovery: by pair, the same
    in all domains. noise: standard deviation of a task's mean; seed_noise: of a branch's score."""
    rng = np.random.default_rng(dice)
    level = {d: rng.uniform(0.4, 0.6, tasks) for d in DOMAINS}

    def answers(names: Sequence[str]) -> dict[str, list[float | None]]:
        found: dict[str, list[float | None]] = {}
        for domain in DOMAINS:
            score = sum(alone.get((n, domain), 0.0) for n in names)
            score += sum(recovery.get(p, 0.0) for p in itertools.combinations(names, 2))
            score += rng.normal(0, seed_noise) if names and seed_noise else 0.0
            found[domain] = (level[domain] + score + rng.normal(0, noise, tasks)).tolist()
        return found

    sequences: list[tuple[str, ...]] = [(s,) for s in stages]
    sequences += list(itertools.permutations(stages, 2)) if pairs else []
    return Interference(
        start="sft",
        digest="0" * 64,
        order=list(stages),
        steps=dict.fromkeys(stages, 5),
        trains={s: ["x"] for s in stages},
        base=answers(()),
        branches=[Branch(list(s), n, answers(s)) for n in range(seeds) for s in sequences],
    )


def favouring(order: Sequence[str], size: float = 0.02) -> dict[tuple[str, str], float]:
    """Recoveries of which `order` is the only best one."""
    found: dict[tuple[str, str], float] = {}
    for a, b in itertools.combinations(order, 2):
        found |= {(a, b): size, (b, a): -size}
    return found


@pytest.mark.parametrize("target", list(itertools.permutations(STAGES))[::5])
def test_the_best_order_is_found(target: tuple[str, ...]) -> None:
    alone = {("a", "x"): 0.05, ("b", "y"): -0.04, ("c", "x"): -0.03}
    found = advise_order(Effects(measured(alone, favouring(target))))
    assert found.is_decided
    assert found.orders[0].stages == target
    assert found.tied == 1
    assert found.orders[0].share > 0.95
    assert found.proposed == target
    assert found.total == 24
    assert found.own is not None
    assert found.own.stages == STAGES
    # Each pair in the wrong order costs its recovery twice.
    wrong = swaps(STAGES, target)
    assert found.own.behind.change == pytest.approx(0.04 * wrong, abs=0.01)
    assert found.distance == (wrong, wrong)
    assert found.own.differs == (wrong > 0)
    assert {(p.first, p.second) for p in found.precedences} == set(
        itertools.combinations(target, 2)
    )


def test_one_pair_that_matters_leaves_the_other_orders_tied() -> None:
    found = advise_order(Effects(measured({}, {("b", "a"): 0.1})))
    assert found.is_decided
    assert found.orders[0].stages.index("b") < found.orders[0].stages.index("a")
    # Half of the orders have b before a, and the recipe's own is not among them.
    assert found.tied == 12
    assert [(p.first, p.second) for p in found.precedences] == [("b", "a")]
    assert found.own is not None
    assert found.own.differs
    # Equal orders: the one nearest to the recipe's is proposed.
    assert found.proposed in {o.stages for o in found.orders}
    assert found.distance[1] == 1


def test_noise_that_hides_the_order_is_said() -> None:
    """At most the stated 5 % or so of the matrices without recoveries give an order."""
    alone = {("a", "x"): 0.1, ("b", "y"): -0.1}
    decided, marked = 0, 0
    for dice in range(40):
        effects = Effects(measured(alone, {}, noise=0.3, tasks=100, dice=dice))
        found = advise_order(effects, draws=300)
        decided += found.is_decided
        marked += bool(found.precedences)
        if not found.is_decided:
            assert found.tied == found.total == 24
            assert found.proposed == ()
            assert "24 orders do not differ" in order_text(found)
    assert decided <= 5
    assert marked <= 5


def test_the_training_seed_is_part_of_the_noise() -> None:
    """Recoveries that are the luck of the seed vanish with the error over seeds."""
    one = measured({}, {}, tasks=1000, noise=0.01, seed_noise=0.05, dice=3)
    four = measured({}, {}, tasks=1000, noise=0.01, seed_noise=0.05, dice=3, seeds=4)
    assert Effects(one).seed_error.max() == 0
    assert advise_order(Effects(one)).is_decided
    effects = Effects(four)
    assert effects.seed_error * 2 == pytest.approx(0.05, rel=0.35)
    assert not advise_order(effects).is_decided
    assert "training seed" in " ".join(sentences(Effects(one)))
    assert "training seed" not in " ".join(sentences(effects))


@pytest.mark.parametrize("listed", [("d", "b", "a", "c"), ("b", "a", "d", "c")])
def test_names_and_their_listing_change_nothing(listed: tuple[str, ...]) -> None:
    recovery = {("b", "a"): 0.03, ("c", "d"): -0.02, ("d", "a"): 0.01}
    first = measured({("a", "x"): 0.1}, recovery, noise=0.15)
    rename = dict(zip(STAGES, ("stage_9", "k", "z", "m"), strict=True))
    by_place = sorted(first.branches, key=lambda b: [listed.index(s) for s in b.stages])
    second = replace(
        first,
        order=[rename[s] for s in listed],
        steps={rename[s]: n for s, n in first.steps.items()},
        trains={rename[s]: d for s, d in first.trains.items()},
        base={d: first.base[d] for d in reversed(DOMAINS)},
        branches=[Branch([rename[s] for s in b.stages], b.seed, b.tasks) for b in by_place],
    )
    a, b = advise_order(Effects(first)), advise_order(Effects(second))
    assert (a.tied, a.total) == (b.tied, b.total)
    values = {tuple(rename[s] for s in o.stages): o for o in a.orders}
    assert values.keys() == {o.stages for o in b.orders}
    for order in b.orders:
        same = values[order.stages]
        assert order.value == pytest.approx(same.value)
        assert order.share == pytest.approx(same.share, abs=0.01)
        assert order.differs == same.differs
    assert {(rename[p.first], rename[p.second]) for p in a.precedences} == {
        (p.first, p.second) for p in b.precedences
    }


def test_without_pairs_nothing_is_said_about_the_order() -> None:
    found = advise_order(Effects(measured({("a", "y"): -0.2}, {}, pairs=False)))
    assert (found.orders, found.own, found.fit, found.proposed) == ((), None, None, ())
    assert not found.is_decided
    assert "--pairs" in order_text(found)


def test_the_fit_tells_recoveries_from_noise() -> None:
    alone = {("a", "x"): 0.1, ("b", "y"): -0.1}
    found = [
        advise_order(Effects(measured(alone, {}, noise=0.2, dice=dice)), draws=100).fit
        for dice in range(10)
    ]
    with_them = advise_order(Effects(measured(alone, favouring(STAGES, 0.05), noise=0.2))).fit
    assert with_them is not None
    fits = [fit for fit in found if fit is not None]
    assert len(fits) == 10
    assert np.mean([fit.misfit for fit in fits]) == pytest.approx(0.9, abs=0.3)
    assert min(fit.explained for fit in fits) > 0.9
    assert with_them.misfit > 4


def test_mopd_is_worth_its_place_where_a_teacher_lies_above_the_student() -> None:
    alone = {("b", "x"): -0.2, ("c", "x"): 0.05, ("a", "y"): 0.1}
    found = advise_order(Effects(measured(alone, {}))).mopd
    best = found.places[0]
    # b loses x; c, alone from the start, is its best teacher.
    assert best.after == ("a", "b")
    assert best.taught[0].domain == "x"
    assert "c" in best.taught[0].teacher
    assert best.taught[0].gap.change == pytest.approx(0.25, abs=0.02)
    assert best.gain.change == pytest.approx(0.125, abs=0.02)


def test_mopd_has_nothing_to_win_where_nothing_was_lost() -> None:
    lost = 0
    for dice in range(20):
        effects = Effects(measured({}, {}, noise=0.3, tasks=100, dice=dice))
        lost += bool(advise_order(effects, draws=300).mopd.places)
    assert lost <= 2


def test_costs_and_what_restores_them_in_words() -> None:
    found = Effects(measured({("a", "x"): -0.12, ("b", "x"): 0.14}, {}))
    assert found.alone["a"][0].change == pytest.approx(-0.12, abs=0.01)
    assert found.alone["a"][0].significant
    text = sentences(found)
    assert any(
        line.startswith("a costs x 12 ± 0 points; b after it restores 14 ± 0") for line in text
    )
    assert any(line.startswith("b raises x by 14 ± 0 points") for line in text)
    rows = table(found).splitlines()
    assert rows[0].split() == ["x", "y"]
    assert rows[1].split()[0] == "a"
    assert rows[1].split()[1].endswith("*")


def test_a_standard_error_covers_the_truth() -> None:
    """95 % intervals of a change miss it in about one of 20 matrices."""
    missed = 0
    for dice in range(100):
        effect = Effects(measured({("a", "x"): 0.1}, {}, noise=0.3, tasks=50, dice=dice)).alone["a"]
        missed += abs(effect[0].change - 0.1) > 1.96 * effect[0].standard_error
    assert missed <= 11


def test_domains_without_a_solved_task_have_noise_of_their_own() -> None:
    found = measured({}, {}, tasks=10)
    for tasks in (found.base, *(branch.tasks for branch in found.branches)):
        for rewards in tasks.values():
            rewards[:] = [0.0] * 10
    draws = Effects(found).draws(2000)[:, 1]
    assert draws.std(0) == pytest.approx([0.1, 0.1], rel=0.1)
    [[_, correlation], _] = np.asarray(np.corrcoef(draws.T))
    assert abs(correlation) < 0.1


def test_holm_marks_few_cells_of_noise() -> None:
    marked = 0
    for dice in range(60):
        effects = Effects(measured({}, {}, noise=0.3, tasks=60, dice=dice))
        cells = [*effects.alone.values(), *effects.second.values()]
        marked += any(e.significant for found in cells for e in found)
    assert marked <= 9


def test_tasks_without_a_verdict_are_excluded_everywhere() -> None:
    found = measured({("a", "x"): 0.1}, {}, noise=0.0, tasks=10)
    found.base["x"][0] = None
    found.branches[0].tasks["x"][1] = None
    effects = Effects(found)
    assert [tasks.shape[1] for tasks in effects.tasks] == [8, 10]
    assert effects.alone["a"][0].change == pytest.approx(0.1)
    found.base["x"][:] = [None] * 10
    with pytest.raises(ReportError, match="x has no task"):
        Effects(found)


def test_a_matrix_is_written_and_read(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="nemocascade interference"):
        read_interference(tmp_path)
    found = measured({("a", "x"): -0.12}, favouring(("d", "c", "b", "a")))
    path = tmp_path / FOLDER / FILE
    path.parent.mkdir()
    path.write_text(json.dumps(as_json(Effects(found))), encoding="utf-8")
    assert read_interference(tmp_path) == read_interference(path.parent) == found
    advice = advise(OrderSettings(str(tmp_path), draws=200))
    assert advice.proposed == ("d", "c", "b", "a")
    assert json.loads(json.dumps(advice.as_json()))["is_decided"] is True
    text = order_text(advice)
    assert "order: d > c > b > a" in text
    assert "behind the best" in text
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ReportError, match="damaged"):
        read_interference(tmp_path)


def test_the_report_has_a_page_of_the_matrix(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", stages=0)
    page = run / "report" / "interference.html"
    found = measured({("a", "x"): -0.12, ("b", "x"): 0.14}, {})
    path = run / FOLDER / FILE
    path.parent.mkdir()
    path.write_text(json.dumps(as_json(Effects(found))), encoding="utf-8")
    assert 'href="interference.html"' in write_report(run).read_text(encoding="utf-8")
    text = page.read_text(encoding="utf-8")
    assert "a costs x 12" in text
    assert text.count('class="change') == 2 * (4 + 12)
    assert 'class="change loss significant own"' in text
    assert (page.parent / "interference.png").is_file()
    path.write_text("{}", encoding="utf-8")
    index = write_report(run).read_text(encoding="utf-8")
    assert "interference/interference.json" in index
    assert not page.exists()


def test_one_stage_has_no_order() -> None:
    effects = Effects(measured({("a", "x"): -0.1}, {}, stages=("a",)))
    found = advise_order(effects)
    assert (found.orders, found.proposed, found.total) == ((), (), 1)


def test_weights_choose_what_counts() -> None:
    effects = Effects(measured({}, favouring(STAGES)))
    assert advise_order(effects, {"y": 2.0}).domains == {"x": 0.0, "y": 1.0}
    with pytest.raises(RecipeError, match="z, which is not scored"):
        advise_order(effects, {"z": 1.0})
    with pytest.raises(RecipeError, match="positive weight"):
        advise_order(effects, {"y": 0.0})
    with pytest.raises(RecipeError, match="finite and at least 0"):
        advise_order(effects, {"y": -1.0, "x": 2.0})
    with pytest.raises(RecipeError, match="finite"):
        advise_order(effects, {"y": float("inf")})


def test_too_many_stages_are_rejected() -> None:
    stages = [f"s{n}" for n in range(9)]
    effects = Effects(measured({}, {}, stages=stages, tasks=4, pairs=False))
    with pytest.raises(RecipeError, match="at most 8"):
        advise_order(effects)
