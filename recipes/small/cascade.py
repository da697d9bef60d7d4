"""The small model's cascade: SFT on GSM8K, RL on mathematics, distillation from its own artifacts.

nemocascade run recipes/small/cascade.py --dry-run
nemocascade run recipes/small/cascade.py
"""

from dataclasses import replace
from pathlib import Path

from nemocascade.cascade.launch import launch
from nemocascade.recipe import (
    CascadeRecipe,
    GrpoRecipe,
    MopdRecipe,
    RlEvalConfig,
    ScoreConfig,
    ScoredDomain,
    SftRecipe,
    StageConfig,
    load_recipe,
)

HERE = Path(__file__).parent
SFT = load_recipe(HERE / "sft.py", SftRecipe)
MATH = load_recipe(HERE / "math_rl.py", GrpoRecipe)
MOPD = load_recipe(HERE / "mopd.py", MopdRecipe)
# The cascade scores every artifact itself, and chooses the teachers by these scores.
SCORED = RlEvalConfig(prompts=0)

RECIPE = CascadeRecipe(
    run_dir="runs/small/cascade",
    stages=(
        StageConfig("sft", SFT),
        StageConfig("math_rl", replace(MATH, eval=SCORED)),
        StageConfig("mopd", replace(MOPD, eval=SCORED, teachers=())),
    ),
    scores=ScoreConfig(
        domains=(
            ScoredDomain(heldout_path=MATH.domains[0].heldout_path),
            ScoredDomain("multiple_choice"),
        ),
        max_prompt_tokens=512,
        max_response_tokens=512,
        thinking=False,
        slots=256,
    ),
)

if __name__ == "__main__":
    launch(RECIPE)
