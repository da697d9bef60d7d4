"""SFT of Qwen3-0.6B-Base on GSM8K, for one GPU.

The prompts are those of `math_rl.py`, the answers GSM8K's own steps. Qwen publishes no settings of
its SFT; the learning rate and its schedule are those of the `SftRecipe`, which are the paper's
(Nemotron-Cascade 2, arXiv 2603.19220), with a shorter decay. The tokenizer is the model's.

    nemocascade convert Qwen3-0.6B-Base runs/qwen3_0_6b/pretrained
    python recipes/qwen3_0_6b/sft.py --init-from runs/qwen3_0_6b/pretrained
    python recipes/qwen3_0_6b/math_rl.py --init-from runs/qwen3_0_6b/sft/artifact
"""

from dataclasses import replace

from nemocascade.recipe import (
    CheckpointConfig,
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    EvalConfig,
    SftRecipe,
    qwen3_0_6b,
)
from nemocascade.stages.launch import launch

BASE = SftRecipe()
GSM8K = DomainConfig(
    domain="math",
    path=("data/gsm8k_train.jsonl",),
    tasks=0,
    heldout_path=("data/gsm8k_test.jsonl",),
)

RECIPE = replace(
    BASE,
    steps=100,
    run_dir="runs/qwen3_0_6b/sft",
    base_model="Qwen/Qwen3-0.6B-Base",
    model=qwen3_0_6b(),
    data=DataConfig(capacity=16_384, sequences_per_step=4, balance_group=4),
    demonstrations=DemonstrationConfig(domains=(GSM8K,), heldout=256, thinking=0.0),
    optimizer=replace(BASE.optimizer, warmup_steps=10, decay_steps=100),
    checkpoint=CheckpointConfig(every=50),
    eval=EvalConfig(every=25),
)

if __name__ == "__main__":
    launch(RECIPE)
