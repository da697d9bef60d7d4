"""The cascade of Qwen3-30B-A3B: SFT, RL on mathematics, distillation from its own artifacts.

Each stage has the settings and the layout of its own script, for 64 GPUs.

    nemocascade plan recipes/qwen3_30b_a3b/cascade.py --gpus 64 --gpu h200
    nemocascade preflight recipes/qwen3_30b_a3b/cascade.py --ranks 64 \\
        --stages.sft.init-from runs/qwen3_30b_a3b/base
    nemocascade submit recipes/qwen3_30b_a3b/cascade.py --nodes 8 --dry-run -- \\
        --stages.sft.init-from runs/qwen3_30b_a3b/base
"""

from dataclasses import replace
from pathlib import Path

from nemocascade.cascade.launch import launch
from nemocascade.recipe import (
    CascadeRecipe,
    GrpoRecipe,
    MopdRecipe,
    ParallelConfig,
    RlEvalConfig,
    ScoreConfig,
    ScoredDomain,
    SftRecipe,
    StageConfig,
    load_recipe,
)

HERE = Path(__file__).parent
MATH = load_recipe(HERE / "math_rl.py", GrpoRecipe)
MOPD = load_recipe(HERE / "mopd.py", MopdRecipe)
# The cascade scores every artifact itself, and chooses the teachers by these scores.
SCORED = RlEvalConfig(prompts=0)

RECIPE = CascadeRecipe(
    run_dir="runs/qwen3_30b_a3b/cascade",
    stages=(
        StageConfig("sft", load_recipe(HERE / "sft.py", SftRecipe)),
        StageConfig("math_rl", replace(MATH, eval=SCORED)),
        StageConfig("mopd", replace(MOPD, eval=SCORED, teachers=())),
    ),
    scores=ScoreConfig(
        domains=tuple(ScoredDomain(d.domain, heldout_path=d.heldout_path) for d in MOPD.domains),
        max_prompt_tokens=8192,
        max_response_tokens=32_768,
        parallel=ParallelConfig(ep=8),
    ),
)

if __name__ == "__main__":
    launch(RECIPE)
