"""SFT on the tasks of all reinforcement-learning domains: what the tiny RL stages start from.

The rows are made from the environments' own tasks with their known solutions, a quarter of them
with reasoning. It is short on purpose: the policy half knows each domain, and RL teaches the rest.

    python recipes/tiny/domains_sft.py
"""

from nemocascade.recipe import (
    CheckpointConfig,
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    EngineConfig,
    EvalConfig,
    OptimizerConfig,
    SftRecipe,
    TokenizerConfig,
    tiny_policy,
)
from nemocascade.stages.launch import launch

# Rows of each domain. Domains whose answers are short, or hard, have more.
ROWS = {
    "instruction_following": 400,
    "multiple_choice": 2400,
    "tool_calling": 800,
    "structured_output": 600,
    "math": 400,
    "code": 400,
    "preference": 400,
    "long_context": 800,
    "swe_agentless": 700,
    "swe_agentic": 500,
}

RECIPE = SftRecipe(
    steps=400,
    run_dir="runs/tiny/domains_sft",
    model=tiny_policy(),
    data=DataConfig(capacity=2048, sequences_per_step=2, balance_group=1),
    demonstrations=DemonstrationConfig(
        domains=tuple(DomainConfig(domain=name, tasks=rows) for name, rows in ROWS.items()),
        thinking=0.25,
    ),
    tokenizer=TokenizerConfig(train_vocab_size=1024),
    optimizer=OptimizerConfig(lr=4e-3, min_lr=4e-4, warmup_steps=20, decay_steps=400),
    engine=EngineConfig(precision="fp32"),
    checkpoint=CheckpointConfig(every=0),
    eval=EvalConfig(every=50),
)

if __name__ == "__main__":
    launch(RECIPE)
