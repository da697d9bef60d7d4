"""Every script in recipes/ loads as its type and sets only what is specific to its stage."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

from nemocascade.recipe import (
    CascadeRecipe,
    GrpoRecipe,
    MopdRecipe,
    RecipeError,
    SftRecipe,
    load_any_recipe,
    load_recipe,
)

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
KINDS: dict[str, type[object]] = {
    "cascade": CascadeRecipe,
    "domains_sft": SftRecipe,
    "mopd": MopdRecipe,
    "sft": SftRecipe,
}
SCRIPTS = sorted(RECIPES.glob("*/*.py"))
LARGE = sorted((RECIPES / "nemotron3_nano_30b").glob("*.py"))


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("script", SCRIPTS, ids=name_of)
def test_a_script_loads_as_its_type(script: Path) -> None:
    recipe: Any = load_recipe(script, KINDS.get(script.stem, GrpoRecipe))
    assert recipe.run_dir == f"runs/{name_of(script)}"
    if isinstance(recipe, GrpoRecipe | MopdRecipe):
        assert recipe.stage == script.stem


def test_another_type_is_refused_with_script_and_types(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"tiny/sft\.py: RECIPE is of type SftRecipe, not Grpo"):
        load_recipe(RECIPES / "tiny" / "sft.py", GrpoRecipe)
    script = tmp_path / "script.py"
    script.write_text("RECIPE = 7\n")
    with pytest.raises(RecipeError, match="of type int, not the recipe of a stage"):
        load_any_recipe(script)
    script.write_text("")
    with pytest.raises(RecipeError, match="defines no RECIPE"):
        load_recipe(script, SftRecipe)


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


@pytest.mark.parametrize("script", LARGE, ids=name_of)
def test_no_large_script_restates_a_setting(script: Path) -> None:
    assert list(restated(script)) == []


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
        "engine is EngineConfig(precision='bf16', recompute=False, device='auto', "
        "transformer_engine='auto', apex='auto', fla='auto', timeout_s=1800.0, preflight=True) "
        "anyway",
        "kl_coef is 0.0 anyway",
        "precision is 'bf16' anyway",
        "seed is 1 anyway",
        "steps is 3 anyway",
    ]
