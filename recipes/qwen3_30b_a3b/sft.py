"""SFT of Qwen3-30B-A3B-Base.

Qwen publishes no settings of its SFT. Optimizer, schedule and load balance are the defaults of
`SftRecipe`, those of Nemotron-Cascade 2 (arXiv 2603.19220): AdamW (0.9, 0.98), learning rate 5e-5
to 5e-6 by cosine, sequence-level load balance 1e-4. Sequences are packed to 40,960 tokens, the
context of Qwen3-30B-A3B's `config.json`, 64 of them per step. On 64 GPUs, tp 1 x cp 4 leaves dp 16,
and ep 8 uses the same ranks. Data: rows of conversations, in a folder.

    nemocascade convert Qwen3-30B-A3B-Base runs/qwen3_30b_a3b/base
    torchrun ... recipes/qwen3_30b_a3b/sft.py --init-from runs/qwen3_30b_a3b/base
"""

from nemocascade.recipe import (
    DataConfig,
    OptimizerConfig,
    ParallelConfig,
    SftRecipe,
    qwen3_30b_a3b,
)
from nemocascade.stages.launch import launch

RECIPE = SftRecipe(
    steps=2000,
    run_dir="runs/qwen3_30b_a3b/sft",
    base_model="Qwen/Qwen3-30B-A3B-Base",
    model=qwen3_30b_a3b(),
    data=DataConfig(path=("data/sft",), capacity=40_960, thinking=True),
    optimizer=OptimizerConfig(decay_steps=2000),
    parallel=ParallelConfig(cp=4, ep=8),
)

if __name__ == "__main__":
    launch(RECIPE)
