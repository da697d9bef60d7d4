"""SFT of Nemotron-3-Nano-30B-A3B with the numbers of Nemotron-Cascade 2 (arXiv 2603.19220).

Sequences packed to 256K tokens, 64 of them a step, AdamW (0.9, 0.98), weight decay 0.1, learning
rate 5e-5 -> 5e-6 by cosine over 40,000 steps with 200 of warm-up, 33,000 steps run, sequence-level
load balance 1e-4: the defaults of `SftRecipe`. 256 GPUs: tp 8 x pp 2 leaves dp 16, and ep 8 on the
same ranks.

    torchrun ... recipes/nemotron3_nano_30b/sft.py --data.path DATA --tokenizer.path tokenizer.json
"""

from nemocascade.recipe import (
    DataConfig,
    EngineConfig,
    ParallelConfig,
    SftRecipe,
    nemotron3_nano_30b,
)
from nemocascade.stages.launch import launch

RECIPE = SftRecipe(
    run_dir="runs/nemotron3_nano_30b/sft",
    model=nemotron3_nano_30b(),
    data=DataConfig(thinking=True),
    parallel=ParallelConfig(tp=8, pp=2, ep=8),
    engine=EngineConfig(recompute=True),
)

if __name__ == "__main__":
    launch(RECIPE)
