"""IF-RL of the tiny model: GRPO on instructions that rules verify.

torchrun --nproc-per-node 2 recipes/tiny/domains_sft.py
torchrun --nproc-per-node 2 recipes/tiny/if_rl.py
"""

from dataclasses import replace

from nemocascade.recipe import DomainConfig, EnvConfig, GrpoConfig, GrpoRecipe, tiny_stage
from nemocascade.stages.launch import launch

BASE = tiny_stage(GrpoRecipe)

RECIPE = replace(
    BASE,
    steps=25,
    stage="if_rl",
    run_dir="runs/tiny/if_rl",
    domains=(DomainConfig(domain="instruction_following", tasks=800),),
    # Otherwise the policy learns to write until it is cut off.
    rollout=replace(
        BASE.rollout,
        max_prompt_tokens=96,
        max_response_tokens=48,
        stop_properly_penalty_coef=0.0,
    ),
    grpo=GrpoConfig(capacity=2048),
    envs=EnvConfig(if_language_check="letters", if_tokenizer="rule"),
)

if __name__ == "__main__":
    launch(RECIPE)
