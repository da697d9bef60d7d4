"""The full cascade of Nemotron-3-Nano-30B-A3B, following Nemotron-Cascade 2 (arXiv 2603.19220).

SFT -> IF-RL -> multi-domain RL -> MOPD -> RLHF -> long-context RL -> code RL -> SWE RL. Each stage
uses the settings of its own script. After each, every domain gets a held-out score. On 256 GPUs,
SFT runs with tp 2 x cp 8, which leaves dp 16. The other stages have the layouts of their scripts,
and scoring uses tp 8, which leaves dp 32. ep 8 uses the same ranks.

As in the paper, the MOPD teacher for math is the SFT checkpoint, and the teacher for preference is
an RLHF side stage. The other domains use the artifact with the best held-out score. An alarm
reports a stage that loses more than 5 points in a domain. Held-out rows for preference need a
`baseline`, a text that answers are compared with.

SFT starts from the converted base model, and each judge runs on its own server. Options of a
stage begin with its name:

    nemocascade plan recipes/nemotron3_nano_30b/cascade.py --gpus 256 --gpu h200
    nemocascade preflight recipes/nemotron3_nano_30b/cascade.py --ranks 256 \\
        --stages.sft.init-from runs/nemotron3_nano_30b/base \\
        --stages.rlhf-teacher.envs.judge.url http://GENRM:8000 \\
        --stages.mopd.envs.judge.url http://GENRM:8000 \\
        --stages.rlhf.envs.judge.url http://GENRM:8000 \\
        --stages.long-context-rl.envs.judge.url http://INSTRUCT:8000 \\
        --stages.swe-agentless-rl.envs.judge.url http://GPTOSS:8000 \\
        --scores.envs.judge.url http://INSTRUCT:8000
    nemocascade submit recipes/nemotron3_nano_30b/cascade.py --nodes 32 --dry-run
"""

from dataclasses import replace
from pathlib import Path

from nemocascade.cascade.launch import launch
from nemocascade.recipe import (
    CascadeRecipe,
    GrpoRecipe,
    MopdRecipe,
    ParallelConfig,
    PolicyRecipe,
    RlEvalConfig,
    ScoreConfig,
    ScoredDomain,
    SftRecipe,
    StageConfig,
    TeacherChoice,
    load_recipe,
)

HERE = Path(__file__).parent


def policy[R: PolicyRecipe](kind: type[R], name: str) -> R:
    """Load a stage from its script, without its own evaluation: the cascade scores it."""
    return replace(load_recipe(HERE / f"{name}.py", kind), eval=RlEvalConfig(prompts=0))


DOMAINS = (
    "instruction_following",
    "multiple_choice",
    "tool_calling",
    "structured_output",
    "math",
    "preference",
    "long_context",
    "code",
    "swe_agentless",
    "swe_agentic",
)

# These domains have longer answers than the default, in training as well.
LIMITS = {"code": 120_832, "swe_agentless": 98_304, "swe_agentic": 229_376}
RLHF = policy(GrpoRecipe, "rlhf")
LONG_CONTEXT = policy(GrpoRecipe, "long_context_rl")
MOPD = policy(MopdRecipe, "mopd")
CODE, AGENTIC = policy(GrpoRecipe, "code_rl"), policy(GrpoRecipe, "swe_agentic_rl")

RECIPE = CascadeRecipe(
    run_dir="runs/nemotron3_nano_30b/cascade",
    stages=(
        StageConfig("sft", load_recipe(HERE / "sft.py", SftRecipe)),
        StageConfig("if_rl", policy(GrpoRecipe, "if_rl")),
        StageConfig("multi_domain_rl", policy(GrpoRecipe, "multi_domain_rl")),
        StageConfig("rlhf_teacher", RLHF, start="sft", side=True),
        StageConfig("mopd", replace(MOPD, teachers=())),
        StageConfig("rlhf", RLHF),
        StageConfig("long_context_rl", LONG_CONTEXT),
        StageConfig("code_rl", CODE),
        StageConfig("swe_agentless_rl", policy(GrpoRecipe, "swe_agentless_rl")),
        StageConfig("swe_agentic_rl", AGENTIC),
    ),
    scores=ScoreConfig(
        domains=tuple(
            ScoredDomain(
                name,
                heldout_path=(f"data/heldout/{name}.jsonl",),
                max_response_tokens=LIMITS.get(name, 0),
                # The same value as in its stage.
                thinking=name != "swe_agentic",
            )
            for name in DOMAINS
        ),
        max_turns=200,
        # The sandbox of the agentic stage tests repositories. The judge of the long-context stage
        # grades answers over documents. Programs run as in the code stage.
        envs=replace(
            AGENTIC.envs,
            judge=LONG_CONTEXT.envs.judge,
            code=CODE.envs.code,
            tool_calling=MOPD.envs.tool_calling,
        ),
        parallel=ParallelConfig(tp=8, ep=8),
    ),
    teachers=TeacherChoice(pinned={"math": "sft", "preference": "rlhf_teacher"}),
)

if __name__ == "__main__":
    launch(RECIPE)
