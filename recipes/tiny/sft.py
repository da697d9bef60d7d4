"""SFT of a 2 M-parameter hybrid model, for CPUs. It generates its own data, without a download.

python recipes/tiny/sft.py --steps 50
torchrun --nproc-per-node 2 recipes/tiny/sft.py --parallel.tp 2
"""

from nemocascade.recipe import (
    CheckpointConfig,
    DataConfig,
    EngineConfig,
    EvalConfig,
    OptimizerConfig,
    SftRecipe,
    tiny,
)
from nemocascade.stages.launch import launch

RECIPE = SftRecipe(
    steps=200,
    run_dir="runs/tiny/sft",
    model=tiny(),
    data=DataConfig(
        path=("synthetic:arithmetic",),
        capacity=2048,
        sequences_per_step=4,
        balance_group=4,
    ),
    optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup_steps=20, decay_steps=200),
    engine=EngineConfig(precision="fp32"),
    checkpoint=CheckpointConfig(every=100),
    eval=EvalConfig(every=50),
)

if __name__ == "__main__":
    launch(RECIPE)
