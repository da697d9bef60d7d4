"""SFT of a model of 96 M parameters on GSM8K, for one GPU or a patient CPU.

The prompts are those of `math_rl.py`: the question, and a request for a boxed answer. The answers
are GSM8K's own steps without its calculator's marks. Rows of multiple choice are generated, so that
`mopd.py` has a second domain. A tokenizer of 8,192 ids is trained at the first start. One pass over
the rows is about 50 steps.

GSM8K (arXiv 2110.14168) is two files of JSON lines. Name yours if they are elsewhere:

    python recipes/small/sft.py --demonstrations.domains.0.path TRAIN.jsonl \\
        --demonstrations.domains.0.heldout-path TEST.jsonl
    python recipes/small/sft.py --engine.precision fp32      # on a CPU
"""

from nemocascade.recipe import (
    CheckpointConfig,
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    EvalConfig,
    OptimizerConfig,
    SftRecipe,
    TokenizerConfig,
    small,
)
from nemocascade.stages.launch import launch

GSM8K = DomainConfig(
    domain="math",
    path=("data/gsm8k_train.jsonl",),
    tasks=0,
    heldout_path=("data/gsm8k_test.jsonl",),
)

RECIPE = SftRecipe(
    steps=600,
    run_dir="runs/small/sft",
    model=small(),
    data=DataConfig(capacity=8192, sequences_per_step=4, balance_group=4),
    demonstrations=DemonstrationConfig(
        domains=(GSM8K, DomainConfig(domain="multiple_choice")), heldout=256, thinking=0.0
    ),
    tokenizer=TokenizerConfig(train_vocab_size=8192),
    # A small model from random weights takes larger steps than the paper's 30B.
    optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=50, decay_steps=600),
    checkpoint=CheckpointConfig(every=100),
    eval=EvalConfig(every=100),
)

if __name__ == "__main__":
    launch(RECIPE)
