"""SFT of the tiny model on the domain of `sorting.py`, six answers in ten in the wrong order."""

from nemocascade.recipe import (
    CheckpointConfig,
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    EngineConfig,
    OptimizerConfig,
    SftRecipe,
    TokenizerConfig,
    tiny_policy,
)
from nemocascade.stages.launch import launch

RECIPE = SftRecipe(
    steps=400,
    run_dir="runs/own_domain/sorting_sft",
    model=tiny_policy(),
    data=DataConfig(capacity=1024, sequences_per_step=2, balance_group=1),
    demonstrations=DemonstrationConfig(
        domains=(DomainConfig(domain="sorting", difficulty=1, tasks=1200),),
        modules=("sorting",),
        thinking=0.0,
        careless=0.6,
    ),
    tokenizer=TokenizerConfig(train_vocab_size=512),
    optimizer=OptimizerConfig(lr=4e-3, min_lr=4e-4, warmup_steps=20, decay_steps=400),
    engine=EngineConfig(precision="fp32"),
    checkpoint=CheckpointConfig(every=0),
)

if __name__ == "__main__":
    launch(RECIPE)
