"""SFT on products of two-digit numbers, with the Python tool: the start of `tool_math_rl.py`.

Six rows in ten answer without a call, which the tiny model cannot do right; the others run the
product in the tool and answer with what it prints.

    torchrun --nproc-per-node 2 recipes/tiny/tool_math_sft.py
"""

from dataclasses import replace
from pathlib import Path

from nemocascade.recipe import (
    DemonstrationConfig,
    DomainConfig,
    PythonToolConfig,
    SftRecipe,
    load_recipe,
)
from nemocascade.stages.launch import launch

BASE = load_recipe(Path(__file__).parent / "domains_sft.py", SftRecipe)
STEPS = 500
# A declaration by the template would be three quarters of a row.
TOOL = PythonToolConfig(domains=("math",), prompt="stateful_python_code_exec(code)", declare=False)

RECIPE = replace(
    BASE,
    steps=STEPS,
    run_dir="runs/tiny/tool_math_sft",
    demonstrations=DemonstrationConfig(
        domains=(DomainConfig(domain="math", difficulty=4, tasks=3000),),
        thinking=0.0,
        careless=0.6,
        python_tool=TOOL,
    ),
    optimizer=replace(BASE.optimizer, decay_steps=STEPS),
)

if __name__ == "__main__":
    launch(RECIPE)
