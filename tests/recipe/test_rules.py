"""Every numeric setting has a rule, and no walk over settings can miss one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest

from nemocascade.plan.settings import PlanSettings, PreflightSettings
from nemocascade.plan.submission import SubmitSettings
from nemocascade.recipe import (
    CascadeRecipe,
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    GrpoRecipe,
    MopdRecipe,
    ScoreConfig,
    ScoredDomain,
    SftRecipe,
)
from nemocascade.recipe.commands import (
    ConvertSettings,
    InterferenceSettings,
    OrderSettings,
    ReplaySettings,
    TokenizerSettings,
)
from nemocascade.recipe.paths import is_file_name
from nemocascade.recipe.rules import number_problems, numeric_fields
from nemocascade.stages.settings import EvalSettings, ScoreSettings

DOMAINS = (DomainConfig(),)
RECIPES: dict[str, Any] = {
    "sft": SftRecipe(
        data=DataConfig(path=("synthetic:arithmetic",)),
        demonstrations=DemonstrationConfig(domains=DOMAINS),
    ),
    "grpo": GrpoRecipe(domains=DOMAINS, init_from="x"),
    "mopd": MopdRecipe(domains=DOMAINS, init_from="x"),
    "scores": ScoreConfig(domains=(ScoredDomain(),)),
}
COMMANDS: list[Any] = [
    *(InterferenceSettings("x"), OrderSettings("x")),
    *(EvalSettings(), ScoreSettings(), ReplaySettings(), TokenizerSettings(), CascadeRecipe()),
    *(PlanSettings("x"), PreflightSettings("x"), SubmitSettings(("x",)), ConvertSettings("a", "b")),
]


def changed(settings: Any, value: float, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings with one number replaced, for each number at any depth, and its name."""
    for f in fields(settings):
        inner, name = getattr(settings, f.name), f"{prefix}{f.name}"
        if isinstance(inner, tuple) and inner and is_dataclass(inner[0]):
            for path, first in changed(inner[0], value, f"{name}.0."):
                yield path, replace(settings, **{f.name: (first, *inner[1:])})
        elif is_dataclass(inner):
            for path, other in changed(inner, value, f"{name}."):
                yield path, replace(settings, **{f.name: other})
        elif f.name in numeric_fields(type(settings)):
            yield name, replace(settings, **{f.name: value})


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_of_a_recipe_may_be_infinite_or_nan(kind: str, value: float) -> None:
    prefix = "scores." if kind == "scores" else ""
    cases = list(changed(RECIPES[kind], value))
    assert len(cases) > 30
    for name, broken in cases:
        found = broken.problems(1)
        assert f"{prefix}{name}({value}) must be a finite number" in found, name


@pytest.mark.parametrize("kind", RECIPES)
def test_no_number_of_a_recipe_may_be_negative(kind: str) -> None:
    free = "rollout.min_best_reward"  # rewards may be negative
    for name, broken in changed(RECIPES[kind], -1):
        named = [p for p in broken.problems(1) if f"{name}(-1) must" in p]
        assert name == free or named, name


@pytest.mark.parametrize("settings", [*RECIPES.values(), *COMMANDS], ids=lambda s: type(s).__name__)
def test_every_number_has_a_rule_that_its_default_keeps(settings: Any) -> None:
    def without_rule(value: Any) -> Iterator[str]:
        yield from (
            f"{type(value).__name__}.{n}" for n, r in numeric_fields(type(value)).items() if not r
        )
        for f in fields(value):
            inner = getattr(value, f.name)
            for part in inner if isinstance(inner, tuple) else (inner,):
                if is_dataclass(part):
                    yield from without_rule(part)

    assert list(without_rule(settings)) == []
    assert number_problems(settings) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"steps": 1.5}, "steps(1.5) must be a whole number"),
        ({"seed": 2**32}, "seed(4294967296) must be in 0..4294967295"),
        ({"engine.timeout_s": 1e9}, "engine.timeout_s(1000000000.0) must be in 1..2592000"),
        ({"optimizer.eps": 0.0}, "optimizer.eps(0.0) must be above 0"),
        ({"optimizer.beta1": 1.0}, "optimizer.beta1(1.0) must be in [0, 1)"),
        ({"data.capacity": 2**31}, "data.capacity(2147483648) must be in 1..2147483647"),
        ({"steps": 2**63}, "steps(9223372036854775808) must fit in 64 bits"),
        ({"optimizer.lr": -(2**63)}, "optimizer.lr(-9223372036854775808) must fit in 64 bits"),
    ],
    ids=str,
)
def test_a_rule_names_path_value_and_range(change: dict[str, float], problem: str) -> None:
    [(name, value)] = change.items()
    broken = dict(changed(RECIPES["sft"], value))[name]
    assert number_problems(broken) == [problem]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[("a.json", True), ("x" * 255, True), ("é" * 127, True), ("..a", True)],
        *[("", False), (".", False), ("..", False), ("a/b", False), ("/a", False), ("a/", False)],
        *[("x" * 256, False), ("é" * 128, False), ("a\0", False), ("\ud83d", False)],
    ],
    ids=repr,
)
def test_names_of_files(name: str, expected: bool) -> None:
    assert is_file_name(name) is expected


@pytest.mark.parametrize("path", ["x" * 256, "a/" * 2048, "a\0b", "\ud83d", "a/" + "é" * 128])
@pytest.mark.parametrize("kind", RECIPES)
def test_a_path_that_no_file_system_has_is_rejected(kind: str, path: str) -> None:
    recipe = RECIPES[kind]
    if kind == "scores":
        name = "scores.domains.0.heldout_path"
        recipe = replace(recipe, domains=(ScoredDomain(heldout_path=(path,)),))
    else:
        name, recipe = "run_dir", replace(recipe, run_dir=path)
    assert [p for p in recipe.problems(1) if p.startswith(f"{name}(") and "is not a path" in p]
    assert not [p for p in RECIPES[kind].problems(1) if "is not a path" in p]
