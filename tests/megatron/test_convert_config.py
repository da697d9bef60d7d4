"""Keys of `config.json`: published files are read, and every other key is named."""

from __future__ import annotations

from typing import Any

import pytest

from nemocascade.megatron.convert import ConfigError
from nemocascade.megatron.convert.config import (
    config_of_model,
    families_of_model,
    model_of_config,
)
from nemocascade.recipe import ModelConfig, nemotron3_nano_30b, qwen3_0_6b, qwen3_30b_a3b

DENSE = "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"
# Keys that the published files of the family share, at their values there.
FAMILY: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "bos_token_id": 1,
    "chunk_size": 128,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "hidden_dropout": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 8,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
}
H8B = FAMILY | {
    "attention_head_dim": 128,
    "hidden_size": 4096,
    "hybrid_override_pattern": DENSE,
    "intermediate_size": 21504,
    "mamba_num_heads": 128,
    "num_attention_heads": 32,
    "num_hidden_layers": 52,
    "num_key_value_heads": 8,
    "num_query_groups": 8,
    "rms_norm_eps": 1e-05,
    "time_step_rank": 256,
}
H4B = H8B | {"hidden_size": 3072, "intermediate_size": 12288, "mamba_num_heads": 112}
LARGE = {
    "hidden_size": 8192,
    "mamba_num_heads": 256,
    "num_attention_heads": 64,
    "ssm_state_size": 256,
}
H56B = (
    H8B
    | LARGE
    | {
        "hybrid_override_pattern": "M-M-M-M*-" + 10 * "M-M-M-M-M*-" + "M-",
        "intermediate_size": 32768,
    }
)
H56B["num_hidden_layers"] = len(str(H56B["hybrid_override_pattern"]))
H47B = H56B | {"intermediate_size": 30720}
NANO = FAMILY | {
    "head_dim": 128,
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 1856,
    "mamba_num_heads": 64,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 1.0,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
}
QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}

DENSE_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 40960,
    "max_window_layers": 28,
    "model_type": "qwen3",
    "num_attention_heads": 16,
    "num_hidden_layers": 28,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}


def problems_of(config: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        model_of_config(config)
    return caught.value.problems


def without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in names}


def test_the_published_nano_is_the_preset() -> None:
    # An artifact made of the published folder must have the shape of the recipes.
    assert model_of_config(NANO) == nemotron3_nano_30b()


@pytest.mark.parametrize(
    ("config", "sizes"),
    [(H4B, (3072, 112 * 64)), (H8B, (4096, 8192)), (H47B, (8192, 16384)), (H56B, (8192, 16384))],
    ids=["4B", "8B", "47B", "56B"],
)
def test_published_dense_models_are_read(config: dict[str, Any], sizes: tuple[int, int]) -> None:
    model = model_of_config(config)
    assert (model.hidden_size, model.mamba_inner) == sizes
    assert (model.head_dim, model.norm_eps) == (128, 1e-5)
    assert model.pattern == config["hybrid_override_pattern"]
    assert model.mlp_width == config["intermediate_size"]


def test_published_dense_qwen3_is_the_preset() -> None:
    assert model_of_config(DENSE_QWEN3) == qwen3_0_6b()
    newer = without(DENSE_QWEN3, "rope_theta", "rope_scaling") | {
        "layer_types": ["full_attention"] * 28,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    assert model_of_config(newer) == qwen3_0_6b()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer_types holds"),
        ({"layer_types": ["full_attention"] * 27}, "layer_types names 27 layers"),
        ({"head_dim": None}, "config.json has no 'head_dim'"),
        ({"num_experts": 8}, "num_experts(8)"),
        ({"attention_bias": True}, "attention_bias(True)"),
        ({"model_type": "qwen3_moe"}, "model_type('qwen3_moe')"),
    ],
    ids=str,
)
def test_a_key_that_changes_dense_qwen3_is_named(changes: dict[str, Any], named: str) -> None:
    (problem,) = problems_of(DENSE_QWEN3 | changes)
    assert problem.startswith(named)
    assert "config.json" in problem


def test_published_qwen3_is_read() -> None:
    model = model_of_config(QWEN)
    assert model == qwen3_30b_a3b()
    assert (model.pattern, model.rope_base, model.num_experts) == ("*E" * 48, 1e6, 128)
    large = QWEN | {"num_hidden_layers": 94, "num_attention_heads": 64, "hidden_size": 4096}
    assert model_of_config(large).num_layers == 188


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"residual_in_fp32": True}, "residual_in_fp32(True)"),
        ({"n_shared_experts": 0}, "n_shared_experts(0)"),
        ({"n_shared_experts": 2}, "n_shared_experts(2)"),
        ({"norm_eps": 1e-6}, "norm_eps(1e-06)"),
        ({"num_hidden_layers": 51}, "num_hidden_layers(51)"),
        ({"layers_block_type": ["mamba", "moe"] * 26}, "layers_block_type(MEME"),
        ({"expand": 3}, "expand(3)"),
        ({"attention_head_dim": 64}, "attention_head_dim(64)"),
        ({"num_local_experts": 64}, "num_local_experts(64)"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers(1)"),
        ({"logit_scale": 0.5}, "logit_scale(0.5)"),
        ({"attention_multiplier": None}, "attention_multiplier(None)"),
        ({"model_type": "nemotron"}, "model_type('nemotron')"),
        ({"use_conv_bias": 1}, "use_conv_bias(1)"),
        ({"time_step_limit": [0.0, 0.1]}, "time_step_limit([0.0, 0.1])"),
    ],
    ids=str,
)
def test_a_key_that_changes_the_model_is_named(changes: dict[str, Any], named: str) -> None:
    (problem,) = problems_of(NANO | changes)
    assert problem.startswith(named)
    assert "config.json" in problem


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, ["rope_type('yarn')", "factor(4.0)"]),
        ({"rope_parameters": {"rope_theta": 1e6, "attn_factor": 2.0}}, ["attn_factor(2.0)"]),
        ({"use_sliding_window": True}, ["use_sliding_window(True)"]),
        ({"shared_expert_intermediate_size": 512}, ["shared_expert_intermediate_size(512)"]),
        ({"num_local_experts": 64}, ["num_local_experts(64)"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
    ],
    ids=str,
)
def test_a_key_that_changes_qwen3_is_named(changes: dict[str, Any], named: list[str]) -> None:
    found = problems_of(QWEN | changes)
    assert len(found) == len(named)
    assert all(any(p.startswith(name) for p in found) for name in named)


def test_another_spelling_is_enough() -> None:
    expected = model_of_config(NANO)
    respelled = without(NANO, "head_dim", "layer_norm_epsilon", "n_routed_experts", "n_groups")
    found = respelled | {"attention_head_dim": 128, "num_local_experts": 128, "mamba_n_groups": 8}
    assert model_of_config(found) == expected
    nulls = NANO | {"attention_head_dim": 128, "head_dim": None, "layer_types": None}
    assert model_of_config(nulls) == expected


def test_an_expand_that_agrees_is_no_problem() -> None:
    widened = NANO | {"expand": 4, "mamba_num_heads": 168}
    assert model_of_config(widened).mamba_inner == 4 * 2688
    assert model_of_config(NANO | {"layers_block_type": None}) == model_of_config(NANO)


def test_keys_are_needed_where_the_pattern_has_their_layer() -> None:
    assert model_of_config(H8B).num_experts == ModelConfig().num_experts
    (missing,) = problems_of(without(NANO, "n_routed_experts"))
    assert missing == "config.json has no 'n_routed_experts'"
    (missing,) = problems_of(without(H8B, "intermediate_size"))
    assert missing == "config.json has no 'intermediate_size'"


def test_what_is_written_is_read_again() -> None:
    nano = nemotron3_nano_30b()
    assert model_of_config(config_of_model(nano, "NemotronHForCausalLM")) == nano
    qwen = model_of_config(QWEN)
    assert model_of_config(config_of_model(qwen, "Qwen3MoeForCausalLM")) == qwen
    dense = qwen3_0_6b()
    assert model_of_config(config_of_model(dense, "Qwen3ForCausalLM")) == dense
    assert families_of_model(dense) == ["Qwen3ForCausalLM"]
    assert families_of_model(qwen) == ["Qwen3MoeForCausalLM"]
