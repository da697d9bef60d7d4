"""Orders of the tiny RL stages compared, at equal steps, prompts and rollouts.

    python benchmarks/end_to_end/order_race.py --jobs 2 --mopd --updates --out <record>.json
    python benchmarks/end_to_end/order_race.py --sft runs/tiny/cascade/stages/sft/artifact ...
    python benchmarks/end_to_end/order_race.py --quick             # checks that the code runs

All ways start from one SFT artifact and train the same stages, each for `--steps` steps of as many
prompts and rollouts: the paper's order, its reverse, two random ones, the one that `nemocascade
order` proposes, and all domains mixed in each of as many stages. With `--mopd` each of them is also
run with MOPD after its second stage, from teachers that the scores choose, the start among them;
those runs have that many steps more. Tokens differ, for answers differ in length.

A mixed stage updates the weights for every domain in each of its steps, a stage of one domain in
its own alone. With `--updates` the paper's order also runs with as many updates for each domain,
in smaller batches, and the mixture with as few, in larger ones: prompts and rollouts stay equal.

Every artifact is scored on every domain, on the same tasks for all ways, which the advisor reads
too. Reported, with 95 % bootstrap intervals over seeds: mean over the domains and worst domain at
the end, the steps and tokens to `--level` of the paper's order's own gain, paired differences from
the paper's order, and how far the advisor's matrix depends on its training seed.

Each way is a cascade in `--work`, which resumes; its stages with MOPD are side branches of it.
With `--jobs` several ways run at a time. A plot is written beside the record.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import multiprocessing
import random
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from benchmarks.end_to_end.races import interval  # noqa: E402
from benchmarks.run import new_record, write_record  # noqa: E402
from nemocascade.cascade.effects import Effects  # noqa: E402
from nemocascade.cascade.graph import StageGraph  # noqa: E402
from nemocascade.cascade.interference import (  # noqa: E402
    measure_interference,
)
from nemocascade.cascade.order import advise_order  # noqa: E402
from nemocascade.cascade.records import SCORES  # noqa: E402
from nemocascade.cascade.report import figures  # noqa: E402
from nemocascade.cascade.run import run_cascade  # noqa: E402
from nemocascade.recipe import (  # noqa: E402
    CascadeRecipe,
    GrpoRecipe,
    MopdRecipe,
    SftRecipe,
    StageConfig,
    StageRecipe,
    TeacherConfig,
    load_recipe,
)
from nemocascade.recipe.commands import InterferenceSettings  # noqa: E402
from nemocascade.stages.launch import run_stage  # noqa: E402
from nemocascade.stages.scoring import read_scores  # noqa: E402

PAPER = ("if_rl", "multi_domain_rl", "rlhf", "code_rl")
"""Stages of the race in the paper's order."""
MIXED = "mixed"
WITH_MOPD = ", MOPD"
"""End of the name of a way with MOPD."""
SLOW = ("long_context", "swe_agentless", "swe_agentic")
"""Domains of no stage in the race."""


@dataclass(frozen=True)
class Setting:
    """Settings of all ways. steps: of each stage. tasks: held out, of each domain. advice_seeds:
    of the branches that the advisor measures."""

    steps: int = 6
    mopd_steps: int = 6
    prompts: int = 16
    rollouts: int = 8
    tasks: int = 48
    level: float = 0.8
    advice_seeds: int = 2
    advice_draws: int = 1000


@dataclass(frozen=True)
class Way:
    """Stages in their order, with factors for the steps and the prompts of each."""

    order: tuple[str, ...]
    steps: int = 1
    prompts: float = 1.0


UPDATES = {
    "paper, small batches": Way(PAPER, len(PAPER), 1 / len(PAPER)),
    "mixed, large batches": Way((MIXED,), 1, len(PAPER)),
}
"""Ways with the updates for each domain of the mixture, and of the paper's order."""


@dataclass(frozen=True)
class Run:
    """One way with one seed: scores by domain after each stage, the first before any. steps and
    tokens are cumulative."""

    steps: Sequence[int]
    tokens: Sequence[int]
    scores: Sequence[Mapping[str, float]]

    @property
    def means(self) -> list[float]:
        return [sum(s.values()) / len(s) for s in self.scores]

    @property
    def end(self) -> float:
        return self.means[-1]

    @property
    def worst(self) -> float:
        return min(self.scores[-1].values())

    def first_at(self, level: float, spent: Sequence[int]) -> float:
        """Steps or tokens, as `spent` counts them, up to the first artifact whose mean is at least
        `level`; infinite without one."""
        return next(
            (float(n) for n, m in zip(spent, self.means, strict=True) if m >= level), np.inf
        )


class OrderRace:
    """Cascades of the ways, all from one artifact."""

    def __init__(
        self, setting: Setting, work: Path, sft: Path | None, *, mopd: bool = False
    ) -> None:
        self.setting, self.work, self.mopd = setting, work, mopd
        self.folder = ""
        base = load_recipe(ROOT / "recipes" / "tiny" / "cascade.py", CascadeRecipe)
        self.stages = {s.name: s.recipe for s in base.stages}
        domains = tuple(d for d in base.scores.domains if d.domain not in SLOW)
        self.scores = replace(base.scores, domains=domains, tasks=setting.tasks)
        if sft is None:
            recipe = self.stages["sft"]
            assert isinstance(recipe, SftRecipe)
            sft = run_stage(replace(recipe, run_dir=str(work / "sft")))
        self.sft = sft

    def stage(self, name: str, seed: int) -> GrpoRecipe:
        """A stage of the race, or the mixture of all."""
        setting, recipe = self.setting, self.stages[PAPER[0] if name == MIXED else name]
        assert isinstance(recipe, GrpoRecipe)
        rollout = replace(
            recipe.rollout, prompts_per_step=setting.prompts, rollouts_per_prompt=setting.rollouts
        )
        recipe = replace(recipe, steps=setting.steps, seed=seed)
        if name != MIXED:
            return replace(recipe, rollout=rollout)
        members = [self.stage(stage, seed) for stage in PAPER]
        rollout = replace(
            rollout,
            max_prompt_tokens=max(m.rollout.max_prompt_tokens for m in members),
            max_response_tokens=max(m.rollout.max_response_tokens for m in members),
            filter_by="domain",
        )
        # Each stage has an equal part of the prompts, which its domains divide by their shares.
        domains = tuple(
            replace(
                d,
                share=d.share / sum(o.share for o in m.domains),
                max_response_tokens=m.rollout.max_response_tokens,
            )
            for m in members
            for d in m.domains
        )
        return replace(recipe, stage=MIXED, domains=domains, rollout=rollout, envs=self.scores.envs)

    def cascade(
        self, order: Sequence[str], seed: int, mopd: MopdRecipe | None = None
    ) -> CascadeRecipe:
        """The cascade of one way. order: stage names; may hold MIXED several times.

        mopd: starts from the second stage as a side branch, and the later stages run after it once
        more.
        """
        names = [f"s{number + 1}_{name}" for number, name in enumerate(order)]
        recipes = [self.stage(name, seed + 100 * number) for number, name in enumerate(order)]
        recipes[0] = replace(recipes[0], init_from=str(self.sft))
        stages: list[StageConfig[StageRecipe]] = [
            StageConfig(name, recipe) for name, recipe in zip(names, recipes, strict=True)
        ]
        if mopd is not None:
            branch: list[StageConfig[StageRecipe]] = [
                StageConfig("mopd", mopd, start=names[1], side=True)
            ]
            for name, recipe in zip(names[2:], recipes[2:], strict=True):
                branch.append(StageConfig(f"{name}_mopd", recipe, branch[-1].name, side=True))
            # MOPD's teachers are stages before it.
            stages[2:2] = branch
        return CascadeRecipe(
            run_dir=str(self.work / self.folder / f"seed_{seed}" / "-".join(order)),
            stages=tuple(stages),
            scores=self.scores,
        )

    def distillation(self, seed: int, start_is_best: Collection[str] = ()) -> MopdRecipe:
        """MOPD from the stages before it; the common start teaches domains where it is best."""
        recipe, steps = self.stages["mopd"], self.setting.mopd_steps
        assert isinstance(recipe, MopdRecipe)
        optimizer = replace(
            recipe.optimizer,
            decay_steps=steps,
            warmup_steps=min(recipe.optimizer.warmup_steps, steps // 2),
        )
        scored = {d.domain for d in self.scores.domains}
        domains = tuple(d for d in recipe.domains if d.domain in scored)
        teachers = tuple(
            TeacherConfig(d.domain, str(self.sft)) for d in domains if d.domain in start_is_best
        )
        return replace(
            recipe, steps=steps, seed=seed, optimizer=optimizer, domains=domains, teachers=teachers
        )

    def run(self, order: Sequence[str], seed: int) -> list[Run]:
        """Run one way, without MOPD and, if it takes part, with MOPD. Finished stages are kept."""
        cascade = self.cascade(order, seed)
        run_cascade(cascade)
        main = StageGraph(cascade).names
        found = [self._result(cascade, main)]
        if self.mopd:
            start, *earlier = found[0].scores[:3]
            best = [d for d, score in start.items() if score > max(e[d] for e in earlier)]
            cascade = self.cascade(order, seed, self.distillation(seed, best))
            run_cascade(cascade)
            side = [s.name for s in cascade.stages if s.side]
            found.append(self._result(cascade, [*main[:2], *side]))
        return found

    def scaled(self, way: Way) -> OrderRace:
        """The race with the batches of a way; if they are others, without MOPD, and beside it."""
        if way.prompts == 1:
            return self
        setting = replace(
            self.setting,
            steps=self.setting.steps * way.steps,
            prompts=max(1, round(self.setting.prompts * way.prompts)),
        )
        found = copy.copy(self)
        found.setting, found.mopd = setting, False
        found.folder = f"steps_{setting.steps}_prompts_{setting.prompts}"
        return found

    def _result(self, cascade: CascadeRecipe, names: Sequence[str]) -> Run:
        """The scores after the named stages."""
        graph = StageGraph(cascade)
        listed = json.loads(Path(cascade.run_dir, "cascade.json").read_text(encoding="utf-8"))
        tokens = {entry["name"]: entry["tokens"] for entry in listed["stages"]}
        return Run(
            steps=_cumulative([graph.stage(name).recipe.steps for name in names]),
            tokens=_cumulative([tokens[name] for name in names]),
            scores=[
                self.start_scores(),
                *(_scores(Path(graph.stage_dir(name)) / SCORES) for name in names),
            ],
        )

    def _advising(self) -> CascadeRecipe:
        """The cascade whose stages the advisor measures, with a seed outside of the race."""
        recipes = [(name, self.stage(name, 1000)) for name in PAPER]
        recipes[0] = PAPER[0], replace(recipes[0][1], init_from=str(self.sft))
        return CascadeRecipe(
            run_dir=str(self.work / "advice"),
            stages=tuple(StageConfig(name, recipe) for name, recipe in recipes),
            scores=self.scores,
        )

    def effects(self) -> Effects:
        """The matrix that the advisor reads."""
        settings = InterferenceSettings("", pairs=True, seeds=self.setting.advice_seeds)
        return measure_interference(self._advising(), settings)

    def start_scores(self) -> dict[str, float]:
        """Scores of the start artifact, which the advisor's measurement has."""
        return _scores(self.work / "advice" / "interference" / "reused" / "start" / SCORES)


def _cumulative(values: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(values, initial=0))


def _scores(path: Path) -> dict[str, float]:
    found = read_scores(path)
    assert found is not None, path
    return {domain: s.score for domain, s in found.scores.items() if s.score is not None}


def ways_of(advised: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Orders by name. Random ones are drawn once for all seeds, and differ from the others."""
    ways: dict[str, tuple[str, ...]] = {"paper": PAPER, "reverse": PAPER[::-1]}
    dice = random.Random(0)
    while len(ways) < 4:
        order = tuple(dice.sample(PAPER, len(PAPER)))
        if order not in ways.values() and order != tuple(advised):
            ways[f"random {len(ways) - 1}"] = order
    ways["mixed"] = (MIXED,) * len(PAPER)
    if advised and tuple(advised) not in ways.values():
        ways["advised"] = tuple(advised)
    return ways


def summary(runs: Mapping[str, Sequence[Run]], level: float) -> dict[str, Any]:
    """Means over seeds with 95 % intervals, and differences paired by seed: from "paper", which has
    MOPD where the way has it, and of a way with MOPD from the same without.

    level: fraction of the mean gain of "paper" without MOPD whose first reaching is timed. JSON
    values; null means "not reached".
    """
    paper = runs["paper"]
    start = float(np.mean([r.means[0] for r in paper]))
    target = start + level * (float(np.mean([r.end for r in paper])) - start)
    found: dict[str, Any] = {}
    for name, mine in runs.items():
        without = name.removesuffix(WITH_MOPD)
        base = paper if without == name else runs[f"paper{WITH_MOPD}"]
        found[name] = {
            "mean": _entry([r.end for r in mine]),
            "worst_domain": _entry([r.worst for r in mine]),
            "tokens": _entry([r.tokens[-1] for r in mine]),
            "steps_to_level": _entry([r.first_at(target, r.steps) for r in mine], median=True),
            "tokens_to_level": _entry([r.first_at(target, r.tokens) for r in mine], median=True),
            **_differences(mine, base, "paper"),
        }
        if without != name:
            found[name] |= _differences(mine, runs[without], "without")
    return {"level": target, "ways": found}


def _differences(mine: Sequence[Run], base: Sequence[Run], name: str) -> dict[str, Any]:
    """How far the runs are above those of `base`, by mean and worst domain at the end."""
    pairs = list(zip(mine, base, strict=True))
    return {
        f"mean_minus_{name}": _entry([a.end - b.end for a, b in pairs]),
        f"worst_minus_{name}": _entry([a.worst - b.worst for a, b in pairs]),
    }


def seeds_agree(effects: Effects) -> dict[str, Any]:
    """The matrix measured with each of two training seeds alone.

    cells: [stages or pairs * domains] changes with either seed, and the standard error of their
    difference, from the tasks alone. within: share of the cells that differ by less than 1.96 of
    it; 0.95 if a training seed adds nothing to the luck of the tasks. correlation: of the changes.
    """
    one, two = (
        Effects(
            replace(
                effects.measured,
                branches=[b for b in effects.measured.branches if b.seed == number],
            )
        )
        for number in (0, 1)
    )
    cells = []
    for name in one.names[1:]:
        first, second = (e.effect(name, name[:-1]) for e in (one, two))
        for domain, a, b in zip(one.domains, first, second, strict=True):
            error = float(np.hypot(a.standard_error, b.standard_error))
            cells.append(("+".join(name), domain, a.change, b.change, error))
    a, b, errors = np.array([cell[2:] for cell in cells]).T
    return {
        "cells": cells,
        "within": float(np.mean(np.abs(a - b) < 1.96 * errors)),
        "correlation": float(np.corrcoef(a, b)[0, 1]),
    }


def _entry(values: Sequence[float], *, median: bool = False) -> dict[str, Any]:
    def middle(found: np.ndarray) -> np.ndarray:
        return np.sort(found, -1)[..., found.shape[-1] // 2] if median else found.mean(-1)

    value, *ends = (None if np.isinf(x) else x for x in interval(values, middle))
    return {"value": value, "ci95": ends}


def plot(path: Path, runs: Mapping[str, Sequence[Run]]) -> None:
    """Plot the mean over domains after each stage: the mean over seeds, with its interval at the
    end."""
    with matplotlib.rc_context(figures.SETTINGS):
        figure = Figure(figsize=(7.5, 4.2), layout="constrained")
        ax = figure.add_subplot()
        ways = list(dict.fromkeys(name.removesuffix(WITH_MOPD) for name in runs))
        for style, (name, mine) in enumerate(runs.items()):
            color, _ = figures.style_of(ways.index(name.removesuffix(WITH_MOPD)))
            means = 100 * np.mean([r.means for r in mine], 0)
            dash = "--" if name.endswith(WITH_MOPD) else "-"
            ax.plot(mine[0].steps, means, color=color, ls=dash, label=name)
            _, low, high = interval([100 * r.end for r in mine], lambda v: v.mean(-1))
            end = mine[0].steps[-1] + 0.15 * style
            ax.plot([end, end], [low, high], color=color, lw=3, alpha=0.5)
        figures.finish_axes(ax)
        ax.set_xlabel("steps")
        ax.set_ylabel("mean over domains, points")
        ax.legend(frameon=False, fontsize=8)
        figures.png(path, figure)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5, help="this many seeds")
    parser.add_argument("--jobs", type=int, default=1, help="ways that run at a time")
    parser.add_argument("--work", type=Path, default=Path("runs/order_race"))
    parser.add_argument("--sft", type=Path, help="artifact that all ways start from")
    parser.add_argument("--mopd", action="store_true", help="each way also with MOPD")
    parser.add_argument("--updates", action="store_true", help="also with other batches")
    parser.add_argument("--out", type=Path, help="write the record to this file, and a plot")
    parser.add_argument("--quick", action="store_true", help="few steps, to try the code")
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value))
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    setting = Setting()
    if options.quick:
        setting = replace(
            setting, steps=1, mopd_steps=1, prompts=16, rollouts=2, tasks=4, advice_seeds=1
        )
    named = {n: v for n in asdict(setting) if (v := getattr(options, n)) is not None}
    setting = replace(setting, **named)
    race = OrderRace(
        setting,
        options.work.resolve(),
        options.sft and options.sft.resolve(),
        mopd=options.mopd,
    )
    effects = race.effects()
    # Empty if the orders do not differ by more than noise.
    advised = advise_order(effects, draws=setting.advice_draws).proposed
    ways = {name: Way(order) for name, order in ways_of(advised).items()}
    ways |= UPDATES if options.updates else {}
    seeds = list(range(1, options.seeds + 1))
    units = list(itertools.product(seeds, ways))
    runs: dict[str, list[Run]] = {}
    with ProcessPoolExecutor(options.jobs, multiprocessing.get_context("spawn")) as pool:
        races = (race.scaled(ways[name]) for _, name in units)
        orders = (ways[name].order for _, name in units)
        done = pool.map(OrderRace.run, races, orders, (seed for seed, _ in units))
        for (seed, name), found in zip(units, done, strict=True):
            for run, suffix in zip(found, ("", WITH_MOPD), strict=False):
                runs.setdefault(name + suffix, []).append(run)
                print(f"seed {seed}, {name}{suffix}: {run.end:.3f}", flush=True)
    record = new_record(
        "end_to_end",
        settings=asdict(setting) | {"sft": effects.measured.digest},
        seeds=seeds,
        orders={name: asdict(way) for name, way in ways.items()},
        advised=advised,
        seeds_agree=seeds_agree(effects) if effects.seeds > 1 else None,
        summary=summary(runs, setting.level),
        runs={name: [asdict(r) for r in mine] for name, mine in runs.items()},
    )
    print(json.dumps(record["summary"], indent=1))
    if options.out is not None:
        write_record(options.out, record)
        plot(options.out.with_suffix(".png"), {n: r for n, r in runs.items() if n not in UPDATES})
    return 0


if __name__ == "__main__":
    sys.exit(main())
