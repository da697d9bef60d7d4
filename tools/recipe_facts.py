"""The settings that Nemotron-Cascade 2 (arXiv 2603.19220) publishes, each with its place.

`tools/recipe_table.py` prints them beside the 30B recipes, and a test compares them.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Fact(NamedTuple):
    """A published setting.

    script: of recipes/nemotron3_nano_30b. setting: dotted name in its recipe; an empty name is a
    fact that is not a setting. paper: the value as printed. place: in the paper. value: what
    follows for the setting. why: reason why ours differs from `value`; empty if it is the same.
    """

    script: str
    setting: str
    paper: str
    place: str
    value: Any
    why: str = ""


CODE_IN_NEMO_RL = "the training ran in NeMo-RL (4.1.2), whose Nano recipe does it so"
GENRM = "nvidia/Qwen3-Nemotron-235B-A22B-GenRM"

SFT = (
    Fact(
        "sft",
        "base_model",
        "Nemotron-3-Nano-30B-A3B-Base",
        "2",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-Base-BF16",
    ),
    Fact("sft", "data.sequences_per_step", "64", "Table 7", 64),
    Fact("sft", "data.capacity", "256K", "Table 7", 262_144),
    Fact("sft", "data.thinking", "thinking, but for agentic SWE", "3.2.9", True),
    Fact(
        "sft",
        "data.non_thinking_path",
        "SWE agentic: non-thinking",
        "3.2.9",
        ("data/sft/swe_agentic.jsonl",),
    ),
    Fact("sft", "optimizer.lr", "5e-5", "Table 7", 5e-5),
    Fact("sft", "optimizer.min_lr", "5e-6", "Table 7", 5e-6),
    Fact("sft", "optimizer.warmup_steps", "200", "Table 7", 200),
    Fact("sft", "optimizer.schedule", "cosine", "Table 7", "cosine"),
    Fact("sft", "optimizer.decay_steps", "40,000", "Table 7", 40_000),
    Fact("sft", "optimizer.beta1", "0.9", "Table 7", 0.9),
    Fact("sft", "optimizer.beta2", "0.98", "Table 7", 0.98),
    Fact("sft", "optimizer.weight_decay", "0.1", "Table 7", 0.1),
    Fact("sft", "steps", "33,000", "Table 7", 33_000),
)


def _grpo(script: str) -> tuple[Fact, ...]:
    """Facts of Eq. 1, which every GRPO stage shares."""
    return (
        Fact(script, "grpo.scale_by_std", "divided by std", "Eq. 1", True),
        Fact(
            script,
            "grpo.leave_one_out",
            "mean and std of all G rewards",
            "Eq. 1",
            False,
            CODE_IN_NEMO_RL,
        ),
        Fact(
            script,
            "grpo.normalize",
            "tokens of the group",
            "Eq. 1",
            "group",
            "token-level loss over the step, as NeMo-RL's `token_level_loss`",
        ),
    )


def _table(
    script: str,
    number: int,
    *,
    response: tuple[str, int],
    steps: tuple[str, int],
    rollouts: int = 16,
    top_p: float = 1.0,
) -> tuple[Fact, ...]:
    """Facts that Tables 8 and 9 print for a stage."""
    place = f"Table {number}"
    return (
        Fact(script, "rollout.max_response_tokens", response[0], place, response[1]),
        Fact(script, "rollout.prompts_per_step", "128", place, 128),
        Fact(script, "rollout.rollouts_per_prompt", str(rollouts), place, rollouts),
        Fact(script, "steps", steps[0], place, steps[1]),
        Fact(script, "optimizer.beta1", "0.9", place, 0.9),
        Fact(script, "optimizer.beta2", "0.95", place, 0.95),
        Fact(script, "rollout.temperature", "1.0", place, 1.0),
        Fact(script, "rollout.top_p", str(top_p), place, top_p),
    )


IF_RL = (
    *_table("if_rl", 8, response=("49K", 49_152), steps=("180", 180)),
    Fact("if_rl", "optimizer.lr", "3e-6", "4.2.2, Table 8", 3e-6),
    Fact("if_rl", "rollout.dynamic_filtering", "dynamic filtering", "4.2.2", True),
    Fact("if_rl", "rollout.overlong_filter", "False", "Table 8", False),
    Fact(
        "if_rl", "rollout.stop_properly_penalty_coef", "a truncated answer scores 0", "4.2.2", 0.0
    ),
    Fact("if_rl", "rollout.thinking", "exclusively thinking", "4.2.2", True),
    Fact("if_rl", "grpo.kl_coef", "0", "4.2.2", 0.0),
    *_grpo("if_rl"),
)
MULTI_DOMAIN_RL = (
    *_table("multi_domain_rl", 8, response=("49K", 49_152), steps=("70", 70)),
    Fact("multi_domain_rl", "optimizer.lr", "3e-6", "4.3, Table 8", 3e-6),
    Fact("multi_domain_rl", "rollout.overlong_filter", "True", "Table 8", True),
    Fact("multi_domain_rl", "domains.multiple_choice.share", "55 %", "4.3", 0.55),
    Fact("multi_domain_rl", "domains.tool_calling.share", "30 %", "4.3", 0.30),
    Fact("multi_domain_rl", "domains.structured_output.share", "15 %", "4.3", 0.15),
    Fact("multi_domain_rl", "grpo.kl_coef", "0", "4.3", 0.0),
    *_grpo("multi_domain_rl"),
)
MOPD = (
    *_table("mopd", 8, response=("98K", 98_304), steps=("52", 52), rollouts=4),
    Fact("mopd", "optimizer.lr", "2e-6; Table 8: 3e-6", "4.4", 2e-6),
    Fact("mopd", "optimizer.warmup_steps", "30", "4.4", 30),
    Fact("mopd", "optimizer.warmup_start_lr", "2e-7", "4.4", 2e-7),
    Fact("mopd", "rollout.overlong_filter", "False", "Table 8", False),
    Fact("mopd", "mopd.ratio_low", "0.5", "4.4", 0.5),
    Fact("mopd", "mopd.ratio_high", "2.0", "4.4", 2.0),
    Fact(
        "mopd",
        "teachers.math.artifact",
        "the initial SFT checkpoint",
        "4.4",
        "runs/nemotron3_nano_30b/sft/artifact",
    ),
    Fact(
        "mopd",
        "teachers.preference.artifact",
        "RLHF from the initial SFT checkpoint",
        "4.4",
        "runs/nemotron3_nano_30b/rlhf_teacher/artifact",
    ),
    Fact(
        "mopd",
        "teachers.instruction_following.artifact",
        "after IF-RL and multi-domain RL",
        "4.4",
        "runs/nemotron3_nano_30b/multi_domain_rl/artifact",
    ),
)
RLHF = (
    *_table("rlhf", 9, response=("16K", 16_384), steps=("25; 4.5.3: around 30", 25)),
    Fact("rlhf", "optimizer.lr", "3e-6", "4.5.3, Table 9", 3e-6),
    Fact("rlhf", "rollout.overlong_filter", "without; Table 9: True", "4.5.3", False),
    Fact("rlhf", "rollout.thinking", "exclusively thinking", "4.5.2", True),
    Fact("rlhf", "grpo.kl_coef", "0.03", "4.5.3", 0.03),
    Fact("rlhf", "envs.judge.model", "Qwen3-235B-A22B-Thinking-2507 as GenRM", "4.5.1", GENRM),
    *_grpo("rlhf"),
)
LONG_CONTEXT_RL = (
    *_table("long_context_rl", 9, response=("49K", 49_152), steps=("30", 30)),
    Fact("long_context_rl", "optimizer.lr", "3e-6", "4.6, Table 9", 3e-6),
    Fact("long_context_rl", "rollout.max_prompt_tokens", "32K", "4.6", 32_768),
    Fact("long_context_rl", "rollout.overlong_filter", "without; Table 9: True", "4.6", False),
    Fact("long_context_rl", "grpo.kl_coef", "0", "4.6", 0.0),
    Fact(
        "long_context_rl",
        "envs.judge.model",
        "Qwen3-235B-A22B-Instruct-2507",
        "4.6",
        "Qwen/Qwen3-235B-A22B-Instruct-2507",
    ),
    *_grpo("long_context_rl"),
)
CODE_RL = (
    *_table("code_rl", 9, response=("118K", 120_832), steps=("22", 22), top_p=0.95),
    Fact("code_rl", "optimizer.lr", "3e-6", "4.7.2, Table 9", 3e-6),
    Fact("code_rl", "rollout.overlong_filter", "True", "Table 9", True),
    Fact("code_rl", "domains.code.drop_solved", "8 of 8 solved: dropped", "4.7.1", 1.0),
    *_grpo("code_rl"),
)
SWE_AGENTLESS_RL = (
    Fact("swe_agentless_rl", "rollout.prompts_per_step", "128", "4.8.1", 128),
    Fact("swe_agentless_rl", "rollout.rollouts_per_prompt", "16", "4.8.1", 16),
    Fact("swe_agentless_rl", "rollout.max_response_tokens", "98,304", "4.8.1", 98_304),
    Fact("swe_agentless_rl", "optimizer.lr", "3e-6", "4.8.1", 3e-6),
    Fact("swe_agentless_rl", "rollout.temperature", "1.0", "4.8.1", 1.0),
    Fact("swe_agentless_rl", "rollout.top_p", "1.0", "4.8.1", 1.0),
    Fact("swe_agentless_rl", "steps", "40-50", "4.8.1", 45),
    Fact("swe_agentless_rl", "rollout.min_best_reward", "none above 0.5: masked", "4.8.1", 0.5),
    Fact(
        "swe_agentless_rl",
        "domains.swe_agentless.drop_solved",
        "easy samples: dropped",
        "4.8.1",
        1.0,
    ),
    Fact("swe_agentless_rl", "envs.agentless.retrieved", "top-5 retrieved", "4.8.1", 5),
    Fact("swe_agentless_rl", "envs.judge.model", "GPT-OSS-120B", "4.8.1", "openai/gpt-oss-120b"),
    *_grpo("swe_agentless_rl"),
)
SWE_AGENTIC_RL = (
    Fact("swe_agentic_rl", "rollout.prompts_per_step", "16", "Table 10", 16),
    Fact("swe_agentic_rl", "rollout.rollouts_per_prompt", "64", "Table 10", 64),
    Fact("swe_agentic_rl", "rollout.temperature", "0.8", "Table 10", 0.8),
    Fact("swe_agentic_rl", "grpo.capacity", "256k", "Table 10", 262_144),
    Fact("swe_agentic_rl", "rollout.max_turns", "200", "Table 10", 200),
    Fact("swe_agentic_rl", "optimizer.lr", "3e-6", "Table 10", 3e-6),
    Fact("swe_agentic_rl", "optimizer.min_lr", "0", "Table 10", 0.0),
    Fact("swe_agentic_rl", "optimizer.warmup_steps", "10", "Table 10", 10),
    Fact("swe_agentic_rl", "domains.swe_agentic.drop_solved", "all pass: dropped", "4.8.2", 1.0),
    Fact("swe_agentic_rl", "domains.swe_agentic.drop_unsolved", "none passes: 90 %", "4.8.2", 0.9),
    Fact(
        "swe_agentic_rl",
        "rollout.thinking",
        "non-thinking, as its evaluation",
        "3.2.9, A.6",
        False,
    ),
    *_grpo("swe_agentic_rl"),
)

FACTS = (
    *SFT,
    *IF_RL,
    *MULTI_DOMAIN_RL,
    *MOPD,
    *RLHF,
    *LONG_CONTEXT_RL,
    *CODE_RL,
    *SWE_AGENTLESS_RL,
    *SWE_AGENTIC_RL,
)
"""Every published setting of the 30B recipes, in the order of the cascade."""
