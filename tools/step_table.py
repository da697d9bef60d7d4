"""Print simulated steps of the 30B recipes at three sizes, into docs/scale.md.

python tools/step_table.py           # write the table
python tools/step_table.py --check   # exit code 1 if the page is not up to date
"""

from __future__ import annotations

import sys
from pathlib import Path

import pages

from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import job_of_recipe
from nemocascade.plan.rollout_step import RolloutStep
from nemocascade.plan.workload import RolloutAssumptions
from nemocascade.recipe import PolicyRecipe, load_any_recipe
from nemocascade.stages.simulation import simulated_step

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
SCRIPTS = ROOT / "recipes" / "nemotron3_nano_30b"
BEGIN, END = "<!-- table: tools/step_table.py -->\n", "<!-- end of the steps -->\n"

MEDIANS = {"if_rl": 8_000, "code_rl": 25_000, "mopd": 15_000, "swe_agentic_rl": 30_000}
"""Assumed median length of a response, in tokens."""
SIZES = (64, 256, 1024)
BASELINE = {
    "if_rl": (1850, 1330, 1319),
    "code_rl": (7623, 4057, 3759),
    "mopd": (2788, 2648, 2568),
    "swe_agentic_rl": (12_005, 7401, 7401),
}
"""Seconds of one round of rollouts on training's layouts at 25 ms a step, without CUDA graphs, with
whole prompts assigned to replicas; for IF without the rounds of dynamic filtering."""


def simulated(name: str, ranks: int) -> RolloutStep:
    """The simulated step of a recipe on its own layouts."""
    recipe = load_any_recipe(SCRIPTS / f"{name}.py")
    assert isinstance(recipe, PolicyRecipe)
    assumed = RolloutAssumptions(response_lengths=f"lognormal:{MEDIANS[name]}:1.0")
    gpu, preset = find_gpu("h200"), "nemotron3_nano_30b"
    job = job_of_recipe(recipe, gpu, ranks, preset=preset, assumed=assumed)
    return simulated_step(job, None, seed=1)


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| stage | ranks | baseline | generation | verdicts after it | teachers "
        "| training | step | ms a decode step | replicas idle |",
        f"|{'---|' * 10}",
    ]
    lines += [row(name, ranks) for name in BASELINE for ranks in SIZES]
    return "\n".join(lines) + "\n"


def row(name: str, ranks: int) -> str:
    """The row of a recipe and a number of ranks."""
    step = simulated(name, ranks)
    r = step.rollout
    seconds = (r.generation_s, r.verify_s, step.scoring, step.training, step.total)
    cells = [name, ranks, f"{BASELINE[name][SIZES.index(ranks)]:,}"]
    cells += [f"{s:,.0f}" for s in seconds]
    cells += [f"{1e3 * r.terms.total / r.steps:.1f}", f"{r.idle:.0%}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    sys.exit(pages.update(PAGE, (BEGIN, END), table, sys.argv[1:]))
