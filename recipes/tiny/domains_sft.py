"""SFT on the tasks of all RL domains: the start of the tiny RL stages.

Rows are generated from the environments' own tasks with their known solutions, a quarter of them
with reasoning. Two in three show a habit that costs the reward: a code fence around JSON, a call of
the wrong tool, `print` for `return`. Greedy answers therefore mostly fail, while samples sometimes
succeed, so that RL can improve within minutes. The preference domain has no such habit: its answers
vary in quality anyway.

    torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
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

# Domain, difficulty, rows. Domains with short or hard answers have more rows.
ROWS = (
    ("instruction_following", 0, 500),
    ("instruction_following", 1, 400),
    ("multiple_choice", 0, 1000),
    ("tool_calling", 0, 900),
    ("structured_output", 0, 500),
    ("math", 0, 1200),
    ("code", 0, 100),
    ("code", 1, 150),
    ("preference", 0, 400),
    ("long_context", 0, 1000),
    ("swe_agentless", 0, 450),
    ("swe_agentic", 0, 450),
)

RECIPE = SftRecipe(
    steps=1200,
    run_dir="runs/tiny/domains_sft",
    model=tiny_policy(),
    # Small steps: the words of a prompt are copied after a number of updates, not of tokens.
    data=DataConfig(capacity=1024, sequences_per_step=2, balance_group=1),
    demonstrations=DemonstrationConfig(
        domains=tuple(
            DomainConfig(domain=name, difficulty=difficulty, tasks=rows)
            for name, difficulty, rows in ROWS
        ),
        thinking=0.25,
        careless=0.65,
    ),
    tokenizer=TokenizerConfig(train_vocab_size=1024),
    optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4, warmup_steps=20, decay_steps=1200),
    engine=EngineConfig(precision="fp32"),
    checkpoint=CheckpointConfig(every=0),
    eval=EvalConfig(every=200),
)

if __name__ == "__main__":
    launch(RECIPE)
