"""Settings: rules, remedies, overrides, presets."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import run_command

from nemocascade.recipe import (
    DataConfig,
    DemonstrationConfig,
    DomainConfig,
    EngineConfig,
    GrpoConfig,
    GrpoRecipe,
    ModelConfig,
    MopdRecipe,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RolloutParallelConfig,
    RolloutServerConfig,
    SftRecipe,
    TeacherConfig,
    nemotron3_nano_30b,
    tiny,
)
from nemocascade.recipe.rl import prompt_quotas
from nemocascade.stages.launch import parse

ROOT = Path(__file__).resolve().parents[2]


def recipe(**changes: object) -> SftRecipe:
    base = SftRecipe(
        model=tiny(), data=DataConfig(path=("x",), capacity=2048, sequences_per_step=8)
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def test_presets_are_legal() -> None:
    assert recipe().problems(1) == []
    assert nemotron3_nano_30b().problems() == []
    nano = recipe(model=nemotron3_nano_30b(), parallel=ParallelConfig(tp=8, pp=2, ep=8))
    big = replace(nano, data=replace(nano.data, capacity=262_144, sequences_per_step=64))
    assert big.problems(256) == []


def test_nano_has_the_published_layers() -> None:
    pattern = nemotron3_nano_30b().pattern
    assert len(pattern) == 52
    assert {s: pattern.count(s) for s in "ME*"} == {"M": 23, "E": 23, "*": 6}
    assert nemotron3_nano_30b().mamba_in_proj == 10_304


def test_world_size_rule_names_value_and_remedy() -> None:
    (problem,) = recipe(parallel=ParallelConfig(tp=2, pp=2)).problems(6)
    assert "tp(2) x pp(2)" in problem
    assert "6 ranks" in problem
    assert "--parallel" in problem


@pytest.mark.parametrize(("name", "share"), [("careless", 1.5), ("thinking", -0.1)])
def test_a_share_lies_between_none_and_all(name: str, share: float) -> None:
    shares: dict[str, Any] = {name: share}
    (problem,) = recipe(demonstrations=DemonstrationConfig(**shares)).problems(1)
    assert problem == f"demonstrations.{name}({share}) must be in 0..1"


def test_all_problems_at_once() -> None:
    bad = recipe(
        steps=0,
        parallel=ParallelConfig(tp=3, pp=3, cp=2, ep=5),
        optimizer=OptimizerConfig(min_lr=1.0),
        model=replace(tiny(), num_heads=5),
    )
    found = "\n".join(bad.problems(7))
    for part in ("steps(0)", "min_lr", "num_heads"):
        assert part in found
    shape_is_fine = replace(
        bad, model=tiny(), optimizer=OptimizerConfig(), steps=1, parallel=ParallelConfig(3, 3, 2, 3)
    )
    found = "\n".join(shape_is_fine.problems(18))
    for part in ("vocab_size", "num_heads", "mamba_groups", "num_experts", "layers"):
        assert part in found, part


def test_fp8_linears_need_transformer_engine_on_a_gpu() -> None:
    engine = EngineConfig("fp32", device="cpu", transformer_engine="off", linears="fp8")
    found = "\n".join(recipe(engine=engine).problems(1))
    for part in ("precision bf16, or", "device cuda, or", "transformer_engine auto, or"):
        assert f"set --engine.{part} --engine.linears bf16" in found
    # A CPU has the arithmetic of the experts.
    assert not recipe(engine=EngineConfig("fp32", device="cpu", experts="fp8")).problems(1)


@pytest.mark.parametrize(
    ("parallel", "world", "part"),
    [
        (ParallelConfig(vpp=2), 1, "vpp(2)"),
        (
            ParallelConfig(cp=3),
            3,
            "is not a multiple of 2 x cp(3) x tp(1) = 6: set the capacity to",
        ),
        (ParallelConfig(cp=2), 3, "cp(2) = 2 does not divide the world of 3"),
        (ParallelConfig(cp=512), 512, "/ (2 x cp(512)) = 2 tokens"),
        (ParallelConfig(pp=3), 3, "8 layers"),
        (ParallelConfig(ep=3), 3, "num_experts(8)"),
        (ParallelConfig(etp=3), 3, "expert_width(128)"),
        (ParallelConfig(pp=2, pipeline_layout="MEM|EME*"), 2, "is not"),
        (ParallelConfig(pp=2, pipeline_layout="MEM*EME*"), 2, "chunks"),
        (ParallelConfig(tp=0), 1, "tp(0)"),
        (ParallelConfig(), 3, "sequences_per_step(8)"),
        (ParallelConfig(pp=4, vpp=2), 16, "interleaved"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_one_rule(parallel: ParallelConfig, world: int, part: str) -> None:
    problems = recipe(parallel=parallel).problems(world)
    assert any(part in p for p in problems), problems


def test_a_million_tokens_on_eight_context_parallel_ranks() -> None:
    parallel = ParallelConfig(tp=2, ep=8, cp=8)
    big = recipe(
        model=nemotron3_nano_30b(),
        parallel=parallel,
        data=DataConfig(path=("x",), capacity=2**20, sequences_per_step=8),
    )
    assert big.problems(128) == []
    (problem,) = replace(big, data=replace(big.data, capacity=2**20 + 16)).problems(128)
    assert "= 32: set the capacity to 1048608" in problem


@pytest.mark.parametrize(
    "change",
    [
        {"pattern": "MXE"},
        {"pattern": ""},
        {"num_kv_heads": 3},
        {"mamba_groups": 3},
        {"experts_per_token": 9},
        {"router_groups": 3},
        {"router_top_groups": 2},
        {"hidden_size": 0},
    ],
    ids=str,
)
def test_shape_rules(change: dict[str, object]) -> None:
    assert replace(tiny(), **change).problems()  # type: ignore[arg-type]


def test_layout_cuts_the_pattern() -> None:
    assert ParallelConfig(pp=2, vpp=2).layout("MEM*EME*") == "ME|M*|EM|E*"
    assert ParallelConfig(pp=2, pipeline_layout="M|E").layout("ME") == "M|E"


def test_domains_of_a_mixed_stage() -> None:
    """Their own limits lie within the stage's, and each has a share of the prompts."""
    base = GrpoRecipe(
        init_from="a",
        domains=(
            DomainConfig("math", share=3.0, max_response_tokens=128),
            DomainConfig("code", share=1.0),
        ),
        rollout=RolloutConfig(prompts_per_step=16, max_response_tokens=256, filter_by="domain"),
    )
    assert base.problems(1) == []
    assert prompt_quotas({"math": 3.0, "code": 1.0}, 16) == {"math": 12, "code": 4}
    assert prompt_quotas({"a": 1.0, "b": 1.0, "c": 1.0}, 16) == {"a": 6, "b": 5, "c": 5}

    def problem(**changes: Any) -> str:
        [found] = replace(base, rollout=replace(base.rollout, **changes)).problems(1)
        return found

    assert "domains.0.max_response_tokens(128) is above" in problem(max_response_tokens=64)
    assert "the penalty grows towards one limit" in problem(overlong_penalty=0.5)
    assert "code would train on no group" in problem(prompts_per_step=1)
    assert "rollout.dynamic_filtering is False" in problem(dynamic_filtering=False)
    assert problem(dynamic_filtering=False, prompts_per_step=1).startswith("rollout.filter_by")
    assert (
        replace(base, rollout=replace(base.rollout, prompts_per_step=1, filter_by="step")).problems(
            1
        )
        == []
    )


def test_truncated_policies_are_not_compared_with_whole_ones() -> None:
    """Neither by the KL penalty nor with a teacher."""
    sampled = RolloutConfig(top_p=0.9)
    penalty = GrpoConfig(kl_coef=0.03, capacity=81_920)
    grpo = GrpoRecipe(init_from="a", rollout=sampled, grpo=penalty)
    mopd = MopdRecipe(
        init_from="a",
        domains=(DomainConfig("math"),),
        teachers=(TeacherConfig("math", "t"),),
        rollout=replace(sampled, dynamic_filtering=False),
    )
    for broken, part in ((grpo, "grpo.kl_coef(0.03)"), (mopd, "rollout.truncated_logprobs")):
        [problem] = broken.problems(1)
        assert problem.startswith(part)
        assert "rollout.top_p" in problem
        rollout = replace(broken.rollout, truncated_logprobs=False)
        assert replace(broken, rollout=rollout).problems(1) == []
    assert replace(grpo, grpo=GrpoConfig(capacity=81_920)).problems(1) == []


def test_cosine_schedule_is_the_papers() -> None:
    lr = OptimizerConfig(lr=5e-5, min_lr=5e-6, warmup_steps=200, decay_steps=40_000).lr_at
    assert lr(0) == pytest.approx(5e-5 / 200)
    assert lr(199) == pytest.approx(5e-5)
    assert lr(20_100) == pytest.approx(2.75e-5)
    assert lr(40_000) == pytest.approx(5e-6)
    assert lr(99_999) == pytest.approx(5e-6)
    values = [lr(s) for s in range(200, 40_000, 100)]
    assert values == sorted(values, reverse=True)


def test_linear_and_constant_schedules() -> None:
    linear = OptimizerConfig(lr=2.0, min_lr=0.0, warmup_steps=0, decay_steps=10, schedule="linear")
    assert linear.lr_at(5) == pytest.approx(1.0)
    warm = OptimizerConfig(
        lr=2e-6, min_lr=0, warmup_steps=30, warmup_start_lr=2e-7, schedule="constant"
    )
    assert warm.lr_at(29) == pytest.approx(2e-6)
    assert warm.lr_at(10_000) == pytest.approx(2e-6)
    assert 2e-7 < warm.lr_at(0) < 3e-7


def test_overrides_by_dotted_name() -> None:
    resolved = parse(recipe(), ["--steps", "7", "--parallel.tp", "2", "--data.path", "a", "b"])
    assert (resolved.steps, resolved.parallel.tp, resolved.data.path) == (7, 2, ("a", "b"))
    assert resolved.model == tiny()


def test_recipe_survives_json() -> None:
    resolved = parse(recipe(), [])
    assert json.loads(json.dumps(asdict(resolved)))["model"]["pattern"] == tiny().pattern


def test_unknown_name_suggests_the_nearest() -> None:
    run = subprocess.run(
        [sys.executable, "recipes/tiny/sft.py", "--optimizer.warmup-step", "1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "--optimizer.warmup-steps" in run.stderr + run.stdout


def test_illegal_settings_stop_before_a_process_group() -> None:
    run = run_command(["recipes/tiny/sft.py", "--parallel.tp", "2", "--parallel.pp", "3"])
    assert run.returncode == 2
    assert "tp(2) x pp(3)" in run.stderr
    assert "Traceback" not in run.stderr


def test_model_config_defaults_are_legal() -> None:
    assert ModelConfig().problems() == []
    assert not math.isnan(ModelConfig().norm_eps)


def test_a_generation_layout_keeps_the_rules() -> None:
    """By default it is training's; its problems name its own settings."""
    training = ParallelConfig(tp=2, pp=2, vpp=2, ep=2, etp=2)
    same = RolloutParallelConfig()
    assert same.layout(training) == training
    assert same.problems(training, tiny(), 8) == []
    assert same.layout(replace(training, cp=2)) == training
    own = RolloutParallelConfig(tp=1).layout(training)
    assert own == ParallelConfig(tp=1, pp=2, ep=2)
    assert RolloutParallelConfig(tp=2, ep=2).layout(replace(training, etp=1)) == replace(
        training, etp=1
    )
    [problem] = same.problems(ParallelConfig(tp=2, ep=3), tiny(), 6)
    assert "ep(3) x etp(1) = 3 and tp(2)" in problem
    assert RolloutParallelConfig(tp=1).problems(ParallelConfig(tp=2, ep=2), tiny(), 6) == []
    for bad in (RolloutParallelConfig(tp=3), RolloutParallelConfig(ep=16)):
        found = bad.problems(training, tiny(), 8)
        assert any("world of 8 ranks" in problem for problem in found)
        for problem in found:
            assert problem.startswith("rollout.parallel: ")
            assert " --parallel" not in problem
            assert "rollout.parallel.etp" not in problem


def test_servers_have_no_generation_layout() -> None:
    """That of a recipe is for the live engine: with servers the ranks keep training's."""
    server = RolloutServerConfig(urls=("http://host:1",))
    own = RolloutParallelConfig(tp=2)
    found = RolloutConfig(engine="server", server=server, parallel=own, offload=True)
    assert any("rollout.offload(True)" in problem for problem in found.problems())
    assert len(found.problems()) == 1
    assert found.layout == RolloutParallelConfig()
    assert replace(found, engine="live").layout == own
