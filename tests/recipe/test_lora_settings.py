"""Settings of adapters: what is adapted, and what is rejected with a remedy."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from nemocascade.recipe import (
    DataConfig,
    EngineConfig,
    GrpoRecipe,
    LoraConfig,
    SftRecipe,
    qwen3_0_6b,
    qwen3_30b_a3b,
    tiny,
)

ENGINE = EngineConfig()
ROWS = DataConfig(path=("synthetic:arithmetic",))


def test_without_targets_all_linears_but_the_experts_are_adapted() -> None:
    lora = LoraConfig(rank=8)
    assert lora.adapts("layers.3.mixer.linear_qkv.weight")
    assert lora.adapts("layers.0.mixer.linear_fc1.weight")
    assert lora.adapts("layers.1.mixer.shared_experts.linear_fc2.weight")
    assert not lora.adapts("layers.1.mixer.experts.linear_fc1")
    assert not lora.adapts("layers.1.mixer.router.weight")
    assert lora.scale == 4.0
    assert lora.problems(ENGINE, tiny()) == []
    assert lora.problems(ENGINE, qwen3_0_6b()) == []
    assert not LoraConfig().adapts("layers.3.mixer.linear_qkv.weight")


def test_a_target_may_name_one_weight_of_a_kind() -> None:
    lora = LoraConfig(rank=8, targets=("experts.linear_fc2", "mlp"))
    assert lora.sites == {"experts.linear_fc2", "mlp.linear_fc1", "mlp.linear_fc2"}
    assert not lora.adapts("layers.1.mixer.experts.linear_fc1")
    assert not lora.adapts("layers.1.mixer.shared_experts.linear_fc2.weight")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("router", r"lora.targets\(router\) is never adapted, for its choices"),
        ("gate", r"lora.targets\(gate\) is never adapted, for its choices"),
        ("lm_head", r"lora.targets\(lm_head\) is never adapted, for it is not a layer"),
        ("embedding", r"lora.targets\(embedding\) is never adapted, for its rows"),
        ("q_proj", r"lora.targets\(q_proj\) is no such weight: use linear_qkv, .*, experts"),
        ("mlp", r"lora.targets\(mlp\) is in no layer: the pattern .* has no MLP layer; leave"),
    ],
)
def test_a_target_that_cannot_be_adapted(target: str, said: str) -> None:
    [problem] = LoraConfig(rank=8, targets=(target,)).problems(ENGINE, tiny())
    assert re.search(said, problem)


def test_targets_of_the_model() -> None:
    shape = qwen3_30b_a3b()
    [problem] = LoraConfig(rank=8, targets=("shared_experts",)).problems(ENGINE, shape)
    assert "has no shared expert" in problem
    [problem] = LoraConfig(rank=8).problems(ENGINE, replace(shape, pattern="E"))
    assert "--lora.targets experts" in problem
    [problem] = LoraConfig(rank=4096).problems(ENGINE, shape)
    assert "lora.rank(4096) is above model.hidden_size(2048)" in problem


def test_settings_that_exclude_adapters() -> None:
    fp8 = EngineConfig(experts="fp8", linears="fp8")
    linears, experts = LoraConfig(rank=8, targets=("experts",)).problems(fp8)
    assert "engine.linears(fp8)" in linears
    assert "leave experts out of --lora.targets" in experts
    # Experts without adapters may be FP8.
    assert LoraConfig(rank=8).problems(EngineConfig(experts="fp8"), tiny()) == []
    [unused] = LoraConfig(targets=("experts",)).problems(ENGINE)
    assert "lora.targets(experts) has no effect, for lora.rank is 0: set --lora.rank 16" in unused


def test_an_adapter_needs_a_base() -> None:
    recipe = SftRecipe(data=ROWS, lora=LoraConfig(rank=8))
    assert any("name the base with --init-from" in p for p in recipe.problems(1))
    found = replace(recipe, init_from="runs/x/artifact").problems(1)
    assert not any("lora" in problem for problem in found)
    grpo = GrpoRecipe(init_from="runs/x/artifact", lora=LoraConfig(rank=8, targets=("router",)))
    assert any("lora.targets(router)" in problem for problem in grpo.problems(1))
