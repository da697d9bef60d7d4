"""Every script in recipes/ loads as its type and sets only what is specific to its stage."""

from __future__ import annotations

import ast
import importlib
import runpy
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nemocascade.envs.registry import close_environments, make_environments
from nemocascade.recipe import (
    CascadeRecipe,
    DomainConfig,
    EngineConfig,
    EnvConfig,
    GrpoRecipe,
    MopdRecipe,
    RecipeError,
    SftRecipe,
    StageConfig,
    load_any_recipe,
    load_recipe,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
KINDS: dict[str, type[object]] = {
    "cascade": CascadeRecipe,
    "domains_sft": SftRecipe,
    "mopd": MopdRecipe,
    "sft": SftRecipe,
    "sorting_sft": SftRecipe,
    "tool_math_sft": SftRecipe,
}
MODULES = {RECIPES / "own_domain" / "sorting.py"}
"""Modules that scripts name in `envs.modules`."""
SCRIPTS = sorted(set(RECIPES.glob("*/*.py")) - MODULES)
LARGE = sorted((RECIPES / "nemotron3_nano_30b").glob("*.py"))
OTHERS = sorted(
    path
    for name in ("small", "qwen3_0_6b", "qwen3_30b_a3b")
    for path in (RECIPES / name).glob("*.py")
)


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_loads_as_its_type(script: Path) -> None:
    recipe: Any = load_recipe(script, KINDS.get(script.stem, GrpoRecipe))
    assert recipe.run_dir == f"runs/{name_of(script)}"
    if isinstance(recipe, GrpoRecipe | MopdRecipe):
        assert recipe.stage == script.stem


def test_another_type_is_rejected_with_script_and_types(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tiny/sft\.py: RECIPE is of type SftRecipe, not Grpo"):
        load_recipe(RECIPES / "tiny" / "sft.py", GrpoRecipe)
    script = tmp_path / "script.py"
    script.write_text("RECIPE = 7\n")
    with pytest.raises(RecipeError, match="of type int, not the recipe of a stage"):
        load_any_recipe(script)
    script.write_text("")
    with pytest.raises(RecipeError, match="defines no RECIPE"):
        load_recipe(script, SftRecipe)


def generated(script: Path) -> Iterator[tuple[DomainConfig, int, bool, int]]:
    """Domains of a script's stages whose tasks are made, with their number, their side and seed."""
    loaded: Any = load_any_recipe(script)
    stages = loaded.stages if isinstance(loaded, CascadeRecipe) else [StageConfig("", loaded)]
    for stage in stages:
        recipe: Any = stage.recipe
        is_sft = isinstance(recipe, SftRecipe)
        owner = recipe.demonstrations if is_sft else recipe
        heldout = recipe.demonstrations.heldout if is_sft else recipe.eval.prompts
        for domain in owner.domains:
            if not domain.path:
                yield domain, domain.tasks, False, recipe.seed
                if not domain.heldout_path:
                    yield domain, heldout, True, recipe.seed
    if isinstance(loaded, CascadeRecipe):
        for scored in loaded.scores.domains:
            if not scored.heldout_path:
                domain = DomainConfig(domain=scored.domain, difficulty=scored.difficulty)
                yield domain, scored.tasks or loaded.scores.tasks, True, loaded.scores.seed


def test_every_domain_can_make_the_tasks_that_a_script_asks_for() -> None:
    environments = make_environments(EnvConfig())
    asked: dict[tuple[str, int, bool, int], int] = {}
    # The domain of own_domain is in a file of its own, which another test runs.
    for script in (s for s in SCRIPTS if s.parent.name != "own_domain"):
        for domain, count, is_heldout, seed in generated(script):
            key = domain.domain, domain.difficulty, is_heldout, seed
            asked[key] = max(asked.get(key, 0), count)
    assert len(asked) > 20
    for (name, difficulty, is_heldout, seed), count in asked.items():
        made = environments[name].prompts(
            seed=seed, count=count, difficulty=difficulty, heldout=is_heldout
        )
        assert len(list(made)) == count
    close_environments(environments)


def restated(script: Path) -> Iterator[str]:
    """Keywords of a script's calls that leave a recipe's setting as it is: of a settings class, the
    field's default; of `replace`, the value of the object that is replaced."""
    scope = runpy.run_path(str(script), run_name="recipe")
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            continue
        called: Any = scope.get(node.func.id)
        for keyword in node.keywords:
            if keyword.arg == "domain":
                # A list names all of its domains, the default one too.
                continue
            try:
                value = evaluate(keyword.value, scope)
                if is_dataclass(called):
                    before = default_of(called, keyword.arg)
                elif node.func.id == "replace":
                    before = getattr(evaluate(node.args[0], scope), keyword.arg or "")
                else:
                    continue
            except NameError:
                # Inside a function or a comprehension the value is not the script's own.
                continue
            if value == before:
                yield f"{script.name}:{keyword.value.lineno}: {keyword.arg} is {value!r} anyway"


def evaluate(node: ast.expr, scope: dict[str, Any]) -> Any:
    """The value of an expression among a script's names."""
    return eval(compile(ast.Expression(node), "<recipe>", "eval"), scope)


def default_of(kind: Any, name: str | None) -> Any:
    """Default of a field; MISSING where it has none."""
    field = next(f for f in fields(kind) if f.name == name)
    return field.default if field.default_factory is MISSING else field.default_factory()


@pytest.mark.parametrize("script", [*LARGE, *OTHERS], ids=name_of)
def test_no_large_script_restates_a_setting(script: Path) -> None:
    assert list(restated(script)) == []


@pytest.fixture
def recipe_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """tools/recipe_table.py, with the paper's settings."""
    monkeypatch.syspath_prepend(str(RECIPES.parent / "tools"))
    return importlib.import_module("recipe_table")


def test_the_large_recipes_are_the_papers(recipe_table: ModuleType) -> None:
    """Every published setting has our value, or a reason why ours differs."""
    assert list(recipe_table.differences()) == []
    covered = {fact.script for fact in recipe_table.FACTS}
    assert covered == {path.stem for path in LARGE} - {"cascade"}


def test_the_table_of_the_recipes_is_up_to_date(recipe_table: ModuleType) -> None:
    text = recipe_table.PAGE.read_text(encoding="utf-8")
    assert recipe_table.page() == text, "python tools/recipe_table.py writes it anew"
    assert text.count("\n| `") > len(recipe_table.FACTS)


def test_a_setting_that_differs_needs_a_reason(
    recipe_table: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = next(f for f in recipe_table.FACTS if (f.script, f.setting) == ("code_rl", "steps"))
    wrong = (steps._replace(value=23), steps._replace(why="no reason is needed"))
    monkeypatch.setattr(recipe_table, "FACTS", wrong)
    assert list(recipe_table.differences()) == [
        "code_rl.steps is 22, Table 9 says 23",
        "code_rl.steps is 22 as in Table 9: drop the reason",
    ]


def test_the_cascade_has_the_settings_of_its_stages() -> None:
    """A published setting holds in the cascade too, but for what the cascade itself decides."""
    cascade = load_recipe(RECIPES / "nemotron3_nano_30b" / "cascade.py", CascadeRecipe)
    for stage in cascade.stages:
        script = {"rlhf_teacher": "rlhf"}.get(stage.name, stage.name)
        alone: Any = load_any_recipe(RECIPES / "nemotron3_nano_30b" / f"{script}.py")
        own: dict[str, Any] = {"eval": stage.recipe.eval}
        if isinstance(stage.recipe, MopdRecipe):
            own["teachers"] = ()
        assert stage.recipe == replace(alone, **own)


def test_restated_settings_are_found(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from dataclasses import replace\n"
        "from nemocascade.recipe import EngineConfig, GrpoConfig, GrpoRecipe\n"
        "BASE = GrpoRecipe(steps=3, seed=1)\n"
        "RECIPE = replace(BASE, steps=3, grpo=GrpoConfig(kl_coef=0.0, capacity=1),\n"
        "    engine=replace(BASE.engine, precision='bf16'))\n"
    )
    found = sorted(line.split(": ")[1] for line in restated(script))
    assert found == [
        f"engine is {EngineConfig()} anyway",
        "kl_coef is 0.0 anyway",
        "precision is 'bf16' anyway",
        "seed is 1 anyway",
        "steps is 3 anyway",
    ]
