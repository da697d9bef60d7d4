"""SFT of Nemotron-3-Nano-30B-A3B, following Nemotron-Cascade 2 (arXiv 2603.19220).

The settings are the defaults of `SftRecipe`: 64 sequences per step, packed to 256K tokens, AdamW
(0.9, 0.98), weight decay 0.1, sequence-level load balance 1e-4. The learning rate decays from 5e-5
to 5e-6 by cosine over 40,000 steps after 200 of warm-up; 33,000 steps are run. On 256 GPUs, tp 2 x
cp 8 leaves dp 16, and ep 8 uses the same ranks. Data: the released rows, in a folder.

The stage starts from the published base model, whose tokenizer it keeps:

    nemocascade convert NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16 runs/nemotron3_nano_30b/base
    torchrun ... recipes/nemotron3_nano_30b/sft.py --init-from runs/nemotron3_nano_30b/base

Tokenise the released rows before the job, on processors alone (docs/your_data.md), and give the
stage the folder:

    nemocascade data build --recipe recipes/nemotron3_nano_30b/sft.py \\
        --init-from runs/nemotron3_nano_30b/base --output data/sft_tokens
    torchrun ... sft.py --init-from runs/nemotron3_nano_30b/base --data.path data/sft_tokens
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
    base_model="nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16",
    model=nemotron3_nano_30b(),
    # Agents are trained to act without reasoning; repairs without an agent have it.
    data=DataConfig(
        path=("data/sft",), thinking=True, non_thinking_path=("data/sft/swe_agentic.jsonl",)
    ),
    parallel=ParallelConfig(tp=2, cp=8, ep=8),
    engine=EngineConfig(overlap_parameter_gather=True),
)

if __name__ == "__main__":
    launch(RECIPE)
