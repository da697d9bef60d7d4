"""SFT on the tasks of all reinforcement-learning domains: what the tiny RL stages start from.

The rows are made from the environments' own tasks with their known solutions, half of them with
reasoning. It is short on purpose: the policy half knows each domain, and RL teaches the rest.

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
    tiny,
)
from nemocascade.stages.launch import launch

DOMAINS = (
    "instruction_following",
    "multiple_choice",
    "tool_calling",
    "structured_output",
    "math",
    "code",
    "long_context",
    "swe_agentless",
    "swe_agentic",
    "preference",
)

RECIPE = SftRecipe(
    steps=150,
    run_dir="runs/tiny/domains_sft",
    model=tiny(),
    data=DataConfig(capacity=2048, sequences_per_step=4, balance_group=4),
    demonstrations=DemonstrationConfig(
        domains=tuple(DomainConfig(domain=name, tasks=800) for name in DOMAINS)
    ),
    tokenizer=TokenizerConfig(train_vocab_size=1024),
    optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup_steps=20, decay_steps=150),
    engine=EngineConfig(precision="fp32"),
    checkpoint=CheckpointConfig(every=0),
    eval=EvalConfig(every=50),
)

if __name__ == "__main__":
    launch(RECIPE)
