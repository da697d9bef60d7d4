"""Print predicted beside published training speeds, into docs/parallelism.md.

python tools/published_table.py           # write the table
python tools/published_table.py --check   # exit code 1 if the page is not up to date

The runs are those of other engines whose model, layout and batch the planner can express. Their
settings are given to the planner as they are in the sources: packs of equal length, forced
balance of experts or the planner's default imbalance of 1.5 where routing is natural, and
recomputation by kind of layer. No constant of the planner is chosen for a row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pages

from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import Job, job_of_recipe
from nemocascade.plan.rollout_step import expected_step
from nemocascade.plan.timing import StepModel
from nemocascade.plan.workload import RolloutAssumptions
from nemocascade.recipe import (
    CheckpointConfig,
    EngineConfig,
    GrpoRecipe,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutParallelConfig,
    load_recipe,
    nemotron3_nano_30b,
    qwen3_30b_a3b,
)

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "parallelism.md"
MARKS = ("<!-- table: tools/published_table.py -->\n", "<!-- end of the published runs -->\n")
RANGE = (0.75, 1.35)
"""Least and largest ratio of a predicted to a published speed that counts as agreement."""

AUTOMODEL = "https://github.com/NVIDIA-NeMo/Automodel/blob/main/docs/performance-summary.mdx"
_BRIDGE = "https://github.com/NVIDIA-NeMo/Megatron-Bridge/blob/main/"
ARCHIVE = _BRIDGE + "docs/performance-summary-archive.md"
CARDS = _BRIDGE + "examples/model_verification_cards/"
LIGHTNING, QWEN_CARD = CARDS + "nemotron-3.5-lightning/card.yaml", CARDS + "qwen3-30b-a3b/card.yaml"
NEMO_RL = "https://github.com/NVIDIA-NeMo/RL/blob/main/docs/about/performance-summary.md"


@dataclass(frozen=True)
class Run:
    """A published run. published: tokens a second and GPU. sequence, batch: tokens of a sequence,
    and sequences of a step. packed: sequences of a micro-batch. document: mean tokens of a packed
    document; 0: of a sequence. natural: experts are chosen by the router. miss: reason why the
    prediction is outside of `RANGE`; empty if it is inside."""

    name: str
    source: str
    published: float
    model: ModelConfig
    gpus: int
    sequence: int
    batch: int
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    packed: int = 1
    document: int = 0
    natural: bool = False
    miss: str = ""

    @property
    def job(self) -> Job:
        """The run in the planner's terms."""
        capacity = self.sequence * self.packed
        return Job(
            model=self.model,
            parallel=self.parallel,
            engine=self.engine,
            moe=MoeTrainingConfig(),
            optimizer=OptimizerConfig(),
            capacity=capacity,
            sequences_per_step=self.batch // self.packed,
            gpu=find_gpu("h100"),
            world_size=self.gpus,
            document=self.document or self.sequence,
            imbalance=1.5 if self.natural else 1.0,
            checkpoint=CheckpointConfig(every=0),
        )

    def predicted(self) -> tuple[float, str]:
        """Predicted tokens a second and GPU, and the largest terms of the step."""
        job = self.job
        assert not job.problems(), job.problems()
        step = StepModel(job, pack_imbalance=1.0).step()
        return step.tokens / step.total / job.world_size, _largest(step.table(), step.total)


@dataclass(frozen=True)
class GrpoRun(Run):
    """A published step of GRPO; `batch` rollouts, of `document` tokens on average."""

    def predicted(self) -> tuple[float, str]:
        recipe = load_recipe(ROOT / "recipes" / "nemotron3_nano_30b" / "if_rl.py", GrpoRecipe)
        prompt = 200
        rollout = replace(
            recipe.rollout,
            prompts_per_step=self.batch // 32,
            rollouts_per_prompt=32,
            max_prompt_tokens=prompt,
            max_response_tokens=self.sequence - prompt,
            slots=self.batch // (self.gpus // 2),
            dynamic_filtering=False,
            offload=True,
            parallel=RolloutParallelConfig(tp=2, pp=1, ep=2),
        )
        recipe = replace(
            recipe,
            parallel=self.parallel,
            engine=self.engine,
            rollout=rollout,
            grpo=replace(recipe.grpo, capacity=self.sequence, kl_coef=0.01),
            checkpoint=CheckpointConfig(every=0),
        )
        job = job_of_recipe(
            recipe,
            find_gpu("h100"),
            self.gpus,
            model=self.model,
            # The mean that is published, if few answers are cut.
            assumed=RolloutAssumptions(
                response_lengths="lognormal:3200:0.35", prompt_tokens=prompt
            ),
        )
        assert job.work is not None
        step = expected_step(job)
        tokens = self.batch * (prompt + job.work.lengths.mean)
        return tokens / step.total / self.gpus, _largest(step.phases(), step.total)


def _largest(parts: list[tuple[str, float]], total: float) -> str:
    largest = sorted(parts, key=lambda part: -part[1])[:3]
    return ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in largest if seconds)


NANO, QWEN = nemotron3_nano_30b(), qwen3_30b_a3b()
# Its two further predictions of a token pass through an attention and an MoE layer each, and
# through the LM head.
LIGHTNING_MODEL = replace(NANO, pattern=NANO.pattern + "*E*E", vocab_size=3 * NANO.vocab_size)
QWEN_235B = replace(
    QWEN, pattern="*E" * 94, hidden_size=4096, num_heads=64, num_kv_heads=4, expert_width=1536
)
LLAMA_70B = replace(
    QWEN,
    pattern="*-" * 80,
    hidden_size=8192,
    vocab_size=128_256,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    qk_norm=False,
    mlp_width=28_672,
)
DEEPEP = EngineConfig(expert_exchange="deepep", overlap_parameter_gather=True)
FP8 = replace(DEEPEP, experts="fp8", linears="fp8")
HOST_OF_OTHERS = (
    "Megatron-Core's own host time: functional runs of the same cards take 0.45 to 0.6 s a "
    "micro-batch, whether a rank has 2,048 or 8,192 tokens"
)

RUNS: tuple[Run, ...] = (
    Run(
        "AutoModel, Nemotron-3-Nano, 4096, ep 8",
        AUTOMODEL,
        16_789,
        NANO,
        8,
        4096,
        512,
        ParallelConfig(ep=8),
        replace(DEEPEP, recompute=True),
        packed=4,
        miss="by a thousandth: the assumed shares of the matrix ceiling, 0.55 for Mamba-2 and 0.6 "
        "for experts, with all layers recomputed",
    ),
    Run(
        "AutoModel, Qwen3-30B-A3B, 4096, ep 8",
        AUTOMODEL,
        12_040,
        QWEN,
        8,
        4096,
        512,
        ParallelConfig(ep=8),
        replace(DEEPEP, recompute=True),
        packed=4,
    ),
    Run(
        "Bridge 26.06, Nemotron-3-Nano, FP8, 8192, ep 8",
        ARCHIVE,
        14_719,
        NANO,
        16,
        8192,
        1024,
        ParallelConfig(ep=8),
        replace(FP8, recompute_layers="E*"),
    ),
    Run(
        "Bridge, Nemotron-3.5-Lightning, 8192, ep 8",
        LIGHTNING,
        14_195,
        LIGHTNING_MODEL,
        16,
        8192,
        512,
        ParallelConfig(ep=8),
        DEEPEP,
    ),
    Run(
        "Bridge, the same, natural routing, cp 2",
        LIGHTNING,
        7110,
        LIGHTNING_MODEL,
        16,
        8192,
        512,
        ParallelConfig(cp=2, ep=8),
        replace(DEEPEP, recompute_layers="E*"),
        natural=True,
    ),
    Run(
        "Bridge, Lightning SFT, 32K packed, tp 2 cp 2 ep 8",
        LIGHTNING,
        6415,
        LIGHTNING_MODEL,
        16,
        32_768,
        128,
        ParallelConfig(tp=2, cp=2, ep=8),
        replace(DEEPEP, recompute_layers="E*", overlap_parameter_gather=False),
        document=512,
        natural=True,
    ),
    Run(
        "Bridge, Lightning SFT, 4K packed, tp 2 ep 8",
        LIGHTNING,
        3314,
        LIGHTNING_MODEL,
        16,
        4096,
        128,
        ParallelConfig(tp=2, ep=8),
        replace(DEEPEP, recompute_layers="E*", overlap_parameter_gather=False),
        document=512,
        natural=True,
        miss=HOST_OF_OTHERS,
    ),
    Run(
        "Bridge, Qwen3-30B-A3B, natural routing, 4096, ep 16",
        QWEN_CARD,
        8655,
        QWEN,
        16,
        4096,
        1024,
        ParallelConfig(ep=16),
        DEEPEP,
        natural=True,
    ),
    Run(
        "Bridge 26.06, Qwen3-30B-A3B, FP8, 4096, ep 16",
        ARCHIVE,
        8826,
        QWEN,
        16,
        4096,
        1024,
        ParallelConfig(ep=16),
        FP8,
    ),
    Run(
        "Bridge 26.02.01, Qwen3-30B-A3B, FP8, 4096, pp 2 vpp 12 ep 8",
        ARCHIVE,
        9058,
        QWEN,
        16,
        4096,
        1024,
        ParallelConfig(pp=2, vpp=12, ep=8),
        FP8,
    ),
    Run(
        "Bridge, Qwen3-30B-A3B SFT, 2048 packed, ep 16",
        QWEN_CARD,
        3395,
        QWEN,
        16,
        2048,
        32,
        ParallelConfig(ep=16),
        replace(DEEPEP, expert_exchange="direct"),
        document=512,
        natural=True,
    ),
    Run(
        "Bridge, Qwen3-30B-A3B SFT, 32K packed, tp 8 cp 2 ep 8",
        QWEN_CARD,
        459,
        QWEN,
        16,
        32_768,
        32,
        ParallelConfig(tp=8, cp=2, ep=8),
        replace(DEEPEP, recompute=True),
        document=512,
        natural=True,
        miss="4.5 s a micro-batch, 2.6 % of the GPUs' peak: a functional check of short documents "
        "in rings of context-parallel ranks, whose cost by document the planner does not know",
    ),
    Run(
        "Bridge 26.04.01, Qwen3-235B-A22B, FP8, 4096, tp 2 pp 8 vpp 4 ep 32",
        ARCHIVE,
        1712,
        QWEN_235B,
        256,
        4096,
        8192,
        ParallelConfig(
            tp=2, pp=8, vpp=4, ep=32, pipeline_layout="|".join(["*E*E", *["*E*E*E"] * 30, "*E*E"])
        ),
        FP8,
    ),
    Run(
        "Bridge 26.04.01, Llama 3 70B, FP8, 8192, tp 4 pp 8 vpp 5",
        ARCHIVE,
        1664,
        LLAMA_70B,
        64,
        8192,
        256,
        ParallelConfig(tp=4, pp=8, vpp=5),
        replace(FP8, experts="bf16", overlap_tensor_parallel=True),
    ),
    GrpoRun(
        "NeMo-RL 0.6, Qwen3-30B-A3B, GRPO, rollouts on tp 2",
        NEMO_RL,
        1102,
        QWEN,
        32,
        4096,
        2048,
        ParallelConfig(ep=8),
        replace(DEEPEP, expert_exchange="direct", overlap_parameter_gather=False, recompute=True),
        document=3203,
        natural=True,
        miss="a second pass for the policy's log-probabilities, the refit of vLLM's weights and "
        "transfers between Ray's actors, which our step does not have",
    ),
)


def row(run: Run) -> str:
    """The row of a run."""
    speed, terms = run.predicted()
    cells = (
        f"[{run.name}]({run.source})",
        f"{run.gpus}",
        f"{speed:,.0f}",
        f"{run.published:,.0f}",
        f"{speed / run.published:.2f}" + " (miss)" * bool(run.miss),
        terms,
    )
    return f"| {' | '.join(cells)} |"


def table() -> str:
    """The table and the reasons of misses as Markdown."""
    lines = [
        "| run | H100 | predicted tokens/s/GPU | published | ratio | largest predicted terms |",
        f"|{'---|' * 6}",
        *map(row, RUNS),
        "",
        "Known misses:",
        "",
        *(f"- {run.name}: {run.miss}." for run in RUNS if run.miss),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write the table; with --check, 1 if the page has another."""
    return pages.update(PAGE, MARKS, table, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
