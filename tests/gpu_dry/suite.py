"""The cases of the dry run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gpu_dry.cases import NANO_TOKENS, Case

from nemocascade.megatron.config import Accelerators
from nemocascade.recipe import (
    CascadeRecipe,
    EngineConfig,
    LoraConfig,
    MopdRecipe,
    OptimizerConfig,
    ParallelConfig,
    SftRecipe,
    nemotron3_nano_30b,
    tiny,
)
from nemocascade.recipe.loading import load_any_recipe

REPOSITORY = Path(__file__).resolve().parents[2]

TINY = replace(tiny(), pattern="M*E-")
"""One layer of each kind."""
STAGES = ("sft", "grpo", "mopd")
LAYOUTS = {
    "tp2": (ParallelConfig(tp=2), 2, 0),
    "ep2": (ParallelConfig(ep=2), 2, 0),
    "cp2": (ParallelConfig(cp=2), 2, 0),
    "tp2_ep2": (ParallelConfig(tp=2, ep=2), 4, 0),
    "pp2_first": (ParallelConfig(pp=2), 2, 0),
    "pp2_last": (ParallelConfig(pp=2), 2, 1),
}
FLA = Accelerators(mamba2="fla")


def _tiny() -> Iterator[Case]:
    for stage in STAGES:
        yield Case(stage, stage, TINY, quick=stage == "grpo")
        yield Case(f"{stage}-recompute", stage, TINY, engine=EngineConfig(recompute=True))
        for name, (parallel, world, rank) in LAYOUTS.items():
            yield Case(
                f"{stage}-{name}",
                stage,
                TINY,
                parallel,
                world,
                rank,
                engine=EngineConfig(recompute=stage == "mopd"),
                quick=stage == "sft" and name in ("tp2_ep2", "pp2_first"),
            )
    yield Case("distill", "distill", TINY)
    yield Case("distill-tp2", "distill", TINY, ParallelConfig(tp=2), 2)
    yield Case("sft-fla", "sft", TINY, accelerators=FLA)
    yield Case(
        "sft-fla-recompute", "sft", TINY, accelerators=FLA, engine=EngineConfig(recompute=True)
    )


def _settings() -> Iterator[Case]:
    """Settings of the engine, the optimizer and adapters, beside the cases without them."""
    shared = EngineConfig(overlap_shared_expert="on")
    for name in ("ep2", "tp2_ep2"):
        yield Case(f"sft-{name}-shared", "sft", TINY, *LAYOUTS[name], engine=shared)
    yield Case("sft-moments", "sft", TINY, optimizer=OptimizerConfig(moments="bf16"))
    yield Case("sft-lora", "sft", TINY, lora=LoraConfig(rank=8))
    adapted = LoraConfig(rank=8, targets=("linear_qkv", "in_proj", "experts"))
    yield Case("sft-lora-experts-tp2_ep2", "sft", TINY, *LAYOUTS["tp2_ep2"], lora=adapted)
    yield Case(
        "sft-tp2-buffers",
        "sft",
        TINY,
        *LAYOUTS["tp2"],
        engine=EngineConfig(overlap_tensor_parallel=True),
        accelerators=Accelerators(te_overlap=True),
        packages=("transformer_engine",),
    )


def _packages() -> Iterator[Case]:
    """Optional packages that are installed: switched off, and each of them on."""
    te, apex = "transformer_engine", "apex"
    settings = {
        "te-off": ((te,), Accelerators()),
        "apex-off": ((apex,), Accelerators()),
        "both-off": ((te, apex), Accelerators()),
        "te": ((te,), Accelerators(adam="transformer_engine", te_attention=True)),
        "apex": ((apex,), Accelerators(adam="apex", fused_weight_gradient=True)),
        "apex-beside-te": ((te, apex), Accelerators(adam="apex", fused_weight_gradient=True)),
    }
    for name, (packages, accelerators) in settings.items():
        yield Case(f"sft-{name}", "sft", TINY, accelerators=accelerators, packages=packages)


def _rollouts() -> Iterator[Case]:
    yield Case("rollout", "rollout", TINY, tokens=40, quick=True)
    yield Case("rollout-strings", "rollout", TINY, tokens=40, strings=True)
    yield Case("rollout-fla", "rollout", TINY, tokens=40, accelerators=FLA)
    for name, (parallel, world, rank) in LAYOUTS.items():
        yield Case(f"rollout-{name}", "rollout", TINY, parallel, world, rank, tokens=40)


def _nano_layers() -> Iterator[Case]:
    """One layer of each kind at the 30B model's widths and the capacity of its recipes."""
    for symbol, kind in (("M", "mamba"), ("*", "attention"), ("E", "moe")):
        shape = replace(nemotron3_nano_30b(), pattern=symbol)
        for recompute in (False, True):
            yield Case(
                f"nano-{kind}" + ("-recompute" if recompute else ""),
                "sft",
                shape,
                tokens=NANO_TOKENS,
                engine=EngineConfig(recompute=recompute),
            )
    yield Case(
        "nano-moe-fp8",
        "sft",
        replace(nemotron3_nano_30b(), pattern="E"),
        tokens=NANO_TOKENS,
        engine=EngineConfig(experts="fp8"),
    )
    shape = replace(nemotron3_nano_30b(), pattern="M")
    for recompute in (False, True):
        yield Case(
            "nano-mamba-fla" + ("-recompute" if recompute else ""),
            "sft",
            shape,
            tokens=NANO_TOKENS,
            accelerators=FLA,
            engine=EngineConfig(recompute=recompute),
        )
    shape = replace(nemotron3_nano_30b(), pattern="M*E")
    yield Case("nano-rollout", "rollout", shape, tokens=2048)
    # Ranks share key/value heads, and all experts.
    yield Case(
        "nano-rollout-tp8",
        "rollout",
        shape,
        ParallelConfig(tp=8, ep=8),
        world=8,
        rank=5,
        tokens=2048,
    )
    # Decode steps of 8 rows, then of 4: two graphs in one pool.
    yield Case("nano-rollout-sizes", "rollout", shape, tokens=2048, requests=12)


def _nano_context() -> Iterator[Case]:
    """A pack of 256K tokens over context-parallel ranks: a layer of each kind, and the whole model,
    which runs over tensor-parallel ranks as well. Both segments of rank 5 of 8 continue a document
    and leave one."""
    shape = nemotron3_nano_30b()
    for symbol, kind in (("M", "mamba"), ("*", "attention"), ("E", "moe")):
        parallel = ParallelConfig(cp=8, ep=8 if symbol == "E" else 1)
        yield Case(
            f"nano-{kind}-cp8",
            "sft",
            replace(shape, pattern=symbol),
            parallel,
            world=8,
            rank=5,
            tokens=NANO_TOKENS,
        )
    for name, parallel in (
        ("cp2", ParallelConfig(cp=2, ep=8)),
        ("cp8", ParallelConfig(cp=8, ep=8)),
        ("tp8", ParallelConfig(tp=8, ep=8)),
    ):
        yield Case(
            f"nano-sft-{name}",
            "sft",
            shape,
            parallel,
            world=8,
            rank=5,
            tokens=NANO_TOKENS,
            engine=EngineConfig(recompute=True),
            steps=(1, 1),
        )


def _kernels() -> Iterator[Case]:
    for architecture in (80, 90, 100):
        yield Case(f"kernels-sm_{architecture}", "kernels", TINY, architecture=architecture)


def _recipes() -> Iterator[Case]:
    """A step of every stage of the 30B model, at the recipe's own layout and capacity, on the first
    and on the last rank of a pipeline."""
    for script in sorted((REPOSITORY / "recipes" / "nemotron3_nano_30b").glob("*.py")):
        recipe = load_any_recipe(script)
        if isinstance(recipe, CascadeRecipe):
            continue
        stage = {SftRecipe: "sft", MopdRecipe: "mopd"}.get(type(recipe), "grpo")
        p = recipe.parallel
        world = p.pp * math.lcm(p.tp * p.cp, p.ep * p.etp)
        # Both segments of this context-parallel rank hold trained tokens.
        inner = p.tp * (5 * p.cp // 8)
        for rank in sorted({0, world - 1} if p.pp > 1 else {inner}):
            yield Case(
                f"recipe-{script.stem}" + (f"-rank{rank}" if p.pp > 1 else ""),
                stage,
                nemotron3_nano_30b(),
                p,
                world,
                rank,
                tokens=recipe.data.capacity if isinstance(recipe, SftRecipe) else recipe.capacity,
                engine=recipe.engine,
                steps=(1,),
            )


_PARTS = (_tiny, _settings, _packages, _rollouts, _nano_layers, _nano_context, _recipes, _kernels)
CASES = {case.name: case for part in _PARTS for case in part()}
