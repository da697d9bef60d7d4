"""Benchmark of moe_experts, forward and with all gradients, against a loop over experts, torch's
grouped_mm, transformers' blocks and fused kernels of other libraries."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.kernels import moe_rows
from benchmarks.kernels.moe_rows import Problem
from benchmarks.measure import Case, Goal

NEMOTRON: dict[str, Any] = {
    "hidden": 2688, "experts": 128, "top_k": 6, "width": 1856, "activation": "relu2",
}  # fmt: skip
QWEN3: dict[str, Any] = {
    "hidden": 2048, "experts": 128, "top_k": 8, "width": 768, "activation": "swiglu",
}  # fmt: skip
MIXTRAL: dict[str, Any] = {
    "hidden": 4096, "experts": 8, "top_k": 2, "width": 14_336, "activation": "swiglu",
}  # fmt: skip
MEDIUM: dict[str, Any] = {"hidden": 512, "experts": 32, "top_k": 4, "width": 256}
TINY: dict[str, Any] = {"hidden": 128, "experts": 8, "top_k": 2, "width": 128}

#: Goals of kernels.md for an H200, in TFLOP/s of forward and of backward.
TARGETS = {("Qwen3-30B", 8192): (500.0, 380.0), ("Nemotron", 32_768): (600.0, 540.0)}


def cases(suite: str, device: torch.device, tiny: bool) -> list[Case]:
    """Every problem, forward alone and with its backward."""
    found = []
    for problem in problems(suite, device, tiny):
        for training in (False, True):
            found.append(case(suite, problem, training))
    return found


def problems(suite: str, device: torch.device, tiny: bool) -> list[Problem]:
    if tiny:
        sizes: dict[str, Any] = {"hidden": 32, "experts": 4, "top_k": 2, "width": 16}
        make = partial(Problem, "smallest", 48, **sizes, dtype=torch.float32, device=device)
        return [make(activation=kind) for kind in ("relu2", "swiglu")]
    if suite == "cpu":
        kinds = (torch.bfloat16, torch.float32)
        medium = partial(Problem, "medium", 8192, **MEDIUM, device=device)
        tiny_recipe = partial(Problem, "tiny recipe", 2048, **TINY, device=device)
        return [
            *(medium(activation=kind, dtype=d) for kind in ("relu2", "swiglu") for d in kinds),
            medium(activation="relu2", dtype=torch.float32, skewed=True),
            *(tiny_recipe(activation="relu2", dtype=d) for d in kinds),
        ]
    make = partial(Problem, dtype=torch.bfloat16, device=device)
    tokens = (1024, 8192, 32_768, 65_536)
    return [
        *(make("Nemotron", t, **NEMOTRON) for t in tokens),
        make("Nemotron", 32_768, **NEMOTRON, skewed=True),
        *(make("Qwen3-30B", t, **QWEN3) for t in tokens),
        make("Qwen3-30B", 8192, **QWEN3, skewed=True),
        *(make("Mixtral", t, **MIXTRAL) for t in tokens),
        make("Mixtral", 8192, **MIXTRAL, skewed=True),
    ]


def case(suite: str, problem: Problem, training: bool) -> Case:
    entries = [
        ("ours", "ours", moe_rows.ours),
        # On a CPU it is the definition.
        ("ours, FP8", "ours" if suite == "gpu" else "peer", moe_rows.ours_in_fp8),
        ("loop over experts", "peer", moe_rows.plain_loop),
        ("grouped_mm chain", "peer", moe_rows.grouped_mm),
        ("transformers", "peer", moe_rows.transformers_block),
    ]
    if suite == "gpu":
        entries += [
            ("quack-kernels", "peer", moe_rows.quack),
            ("Liger-Kernel", "peer", moe_rows.liger),
            ("SonicMoE", "peer", moe_rows.sonic),
            ("Transformer Engine", "peer", moe_rows.transformer_engine),
        ]
    what = "forward and backward" if training else "forward"
    skew = ", skewed" if problem.skewed else ""
    dtype = problem.settings()["dtype"]
    return Case(
        f"{what}, {problem.name} {problem.activation}{skew}, T {problem.tokens}, {dtype}",
        problem.settings(),
        [moe_rows.row(problem, training, *entry) for entry in entries],
        goals(suite, problem, training),
    )


def goals(suite: str, problem: Problem, training: bool) -> list[Goal]:
    """Goals of one problem. On a GPU the baseline is the unfused chain around grouped_mm."""
    if suite == "cpu":
        if not training or problem.name != "medium":
            return []
        return [
            Goal("beside the loop", "ours", 1 / 1.3, "loop over experts"),
            Goal("beside transformers", "ours", 1 / 1.3, "transformers"),
            Goal("memory beside the loop", "ours", 0.5, "loop over experts", "extra_memory"),
        ]
    found = [Goal("beside the chain", "ours", 0.5, "grouped_mm chain")]
    if training:
        found.append(
            Goal("memory beside the chain", "ours", 0.5, "grouped_mm chain", "extra_memory")
        )
    target = TARGETS.get((problem.name, problem.tokens))
    if target is not None and not problem.skewed:
        forward, backward = (problem.forward_flops / (rate * 1e12) for rate in target)
        seconds = forward + 2 * backward if training else forward
        rates = f"{target[0]:.0f} TFLOP/s forward"
        rates += f", {target[1]:.0f} backward" if training else ""
        found.append(Goal(f"seconds at {rates}", "ours", seconds))
    return found
