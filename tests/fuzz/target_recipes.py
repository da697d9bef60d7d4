"""Settings: every option of every recipe with odd values, on the command line and in scripts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from fuzz.harness import Target
from fuzz.mutations import NUMBERS, TEXTS, Choices

from nemocascade.cascade.launch import parse_cascade
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import job_of_recipe
from nemocascade.plan.preflight import problems_before
from nemocascade.plan.search import faults, price
from nemocascade.recipe import (
    PRESETS,
    CascadeRecipe,
    GrpoRecipe,
    MopdRecipe,
    ScoreConfig,
    ScoredDomain,
    SftRecipe,
    StageConfig,
    UserError,
    tiny_stage,
)
from nemocascade.recipe.changes import as_json, changes_of_run, flat
from nemocascade.recipe.mopd import TeacherConfig
from nemocascade.recipe.paths import named_paths
from nemocascade.recipe.rules import hints_of
from nemocascade.stages.launch import parse

Path_ = tuple[str | int, ...]
"""Where a setting is: names of fields, and numbers in tuples."""


@functools.cache
def recipes() -> tuple[Any, ...]:
    """Valid recipes of each kind."""
    sft = replace(SftRecipe(), model=PRESETS["tiny"]())
    sft = replace(sft, data=replace(sft.data, path=("synthetic:arithmetic",), capacity=512))
    mopd = tiny_stage(MopdRecipe)
    rollout = replace(mopd.rollout, dynamic_filtering=False)
    teachers = (TeacherConfig("multiple_choice", "runs/a/artifact"),)
    return sft, tiny_stage(GrpoRecipe), replace(mopd, rollout=rollout, teachers=teachers)


@functools.cache
def cascade() -> CascadeRecipe:
    """A cascade of one stage of each kind."""
    stages = tuple(StageConfig(f"s{i}", recipe) for i, recipe in enumerate(recipes()))
    scores = ScoreConfig(domains=(ScoredDomain(domain="math"),))
    return CascadeRecipe(stages=stages, scores=scores)


def leaves(settings: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any, Any]]:
    """Path, type and value of every setting."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        here = (*path, field.name)
        kind: Any = type(settings)
        hint = hints_of(kind)[field.name]
        if dataclasses.is_dataclass(value):
            yield from leaves(value, here)
        elif isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
            for number, inner in enumerate(value):
                yield from leaves(inner, (*here, number))
        else:
            yield here, hint, value


def put(settings: Any, path: Path_, value: Any) -> Any:
    """A copy of the settings with another value at a path."""
    if not path:
        return value
    first, *rest = path
    if isinstance(first, int):
        items = list(settings)
        items[first] = put(items[first], tuple(rest), value)
        return tuple(items)
    return replace(settings, **{first: put(getattr(settings, first), tuple(rest), value)})


def value_of(choices: Choices, hint: Any, value: Any) -> Any:
    """A value of a setting's type, or for numbers also of another numeric type."""
    kind = get_args(hint)[0] if hasattr(hint, "__metadata__") else hint
    if isinstance(value, bool):
        return choices.chance(2)
    if get_origin(kind) is Literal:
        return choices.of(get_args(kind))
    if isinstance(value, int | float) or value is None:
        near = (1, 2, 3, 4, 8, 16, 64, value)
        return choices.of((*near, *near, *NUMBERS, None if value is None else value))
    if isinstance(value, tuple) and get_args(kind)[0] is not str:
        return value
    if isinstance(value, tuple):
        return tuple(choices.of(TEXTS) for _ in range(choices.below(3)))
    if isinstance(value, dict):
        return {choices.of(TEXTS): choices.of(("sft", *TEXTS))}
    return choices.of(("M*E", "M|*E", "math", "http://a:1", "http://[", "synthetic:x", *TEXTS))


Scripted = tuple[int, list[tuple[Path_, Any]]]


def _scripted(choices: Choices) -> Scripted:
    number = choices.below(3)
    options = list(leaves(recipes()[number]))
    changed = []
    for _ in range(1 + choices.below(4)):
        path, hint, value = choices.of(options)
        changed.append((path, value_of(choices, hint, value)))
    return number, changed


def _check(case: Scripted, folder: Path) -> None:
    number, changed = case
    recipe = recipes()[number]
    for path, value in changed:
        recipe = put(recipe, path, value)
    _use(recipe)


def _use(recipe: Any) -> None:
    """Do what a start does with the settings before it opens a file."""
    problems = problems_before(recipe, 1)
    assert all(isinstance(p, str) for p in problems)
    for kind in ("input", "artifact", "url", "output"):
        list(named_paths(recipe, kind))
    if problems:
        return
    changes_of_run(as_json(recipes()[0]), recipe)
    for step in (0, 1, recipe.steps - 1):
        assert recipe.optimizer.lr_at(step) >= 0
    for gpu in ("cpu", "h200"):
        model = None if isinstance(recipe, SftRecipe) else PRESETS["tiny_policy"]()
        job = job_of_recipe(recipe, find_gpu(gpu), 1, model=model)
        if not faults(job):
            price(job).describe()


def _arguments(choices: Choices) -> tuple[int, list[str]]:
    number = choices.below(4)
    recipe: Any = (*recipes(), cascade())[number]
    names = [name for name, _ in flat(as_json(recipe)) if name != "kind"]
    found: list[str] = []
    for _ in range(1 + choices.below(4)):
        name = choices.of(names)
        value = choices.of((*map(str, NUMBERS[:-3]), "nan", "inf", "-inf", "1e400", *TEXTS, "True"))
        found += [f"--{choices.of((name, name, name, name.replace('_', '-'), name[:-1]))}"]
        found += [value] * choices.of((1, 1, 1, 1, 1, 0, 2))
    return number, found


def _parse(case: tuple[int, list[str]], folder: Path) -> None:
    number, arguments = case
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            if number == 3:
                parsed, _, _ = parse_cascade(cascade(), arguments)
                for stage in parsed.stages:
                    _use(stage.recipe)
                parsed.name_problems()
                parsed.scores.problems(1)
                return
            parsed = parse(recipes()[number], arguments)
        except SystemExit as error:
            # The parser names what it rejects, and ends with this code.
            if error.code not in (0, 2):
                raise
            return
    _use(parsed)


TARGETS = (
    Target("settings", _scripted, _check, (UserError,), share=14),
    Target("command line", _arguments, _parse, (UserError,), share=2.5),
)
