"""Conversion between the `config.json` of a Hugging Face folder and our ModelConfig."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from nemocascade.megatron.convert.config_fields import (
    FAMILIES,
    READ,
    ConfigError,
    build,
    check_types,
    common,
    differences,
    family_of,
    take,
)
from nemocascade.megatron.convert.config_keys import (
    key_problems,
    layer_pattern,
    missing_keys,
    one_spelling,
    width_problems,
)
from nemocascade.megatron.convert.config_qwen3 import from_qwen3, to_qwen3, to_qwen3_moe
from nemocascade.megatron.convert.names import Family
from nemocascade.recipe import ModelConfig

# ModelConfig field -> their name.
_NEMOTRON_H = {
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "norm_eps": "layer_norm_epsilon",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "mamba_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "mamba_state": "ssm_state_size",
    "mamba_groups": "n_groups",
    "mamba_conv": "conv_kernel",
    "mamba_chunk": "chunk_size",
    "mlp_width": "intermediate_size",
    "num_experts": "n_routed_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_width": "moe_intermediate_size",
    "shared_expert_width": "moe_shared_expert_intermediate_size",
    "router_scale": "routed_scaling_factor",
    "router_normalize": "norm_topk_prob",
    "router_groups": "n_group",
    "router_top_groups": "topk_group",
}
# Fields of layers that a pattern without their symbol does not need.
_OF_LAYER = {
    "M": (
        "mamba_heads", "mamba_head_dim", "mamba_state", "mamba_groups", "mamba_conv",
        "mamba_chunk",
    ),
    "*": ("num_heads", "num_kv_heads", "head_dim"),
    "-": ("mlp_width",),
    "E": (
        "num_experts", "experts_per_token", "expert_width", "shared_expert_width", "router_scale",
        "router_normalize", "router_groups", "router_top_groups",
    ),
}  # fmt: skip
# Values that all models of a family share and that differ from ModelConfig's defaults.
_NEMOTRON_H_OURS: dict[str, Any] = {
    "activation": "relu2",
    "rope": False,
    "qk_norm": False,
    "router_score": "sigmoid",
    "router_bias": True,
}
_NO_LIMIT = 1e-30
"""A time step so short that no softplus falls below it."""


def model_of_config(config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a `config.json`.

    Raises ConfigError with every setting that is missing or that our model does not have.
    """
    if family_of(config) == "NemotronHForCausalLM":
        return _from_nemotron_h(config)
    return from_qwen3(config)


def config_of_model(shape: ModelConfig, family: Family) -> dict[str, Any]:
    """The settings of `config.json` that `shape` determines; the family's defaults cover the rest.

    Raises ConfigError with every setting that the family does not have.
    """
    if family == "NemotronHForCausalLM":
        return _to_nemotron_h(shape)
    return to_qwen3(shape) if family == "Qwen3ForCausalLM" else to_qwen3_moe(shape)


def families_of_model(shape: ModelConfig) -> list[Family]:
    """The families that can express `shape`. Raises ConfigError with all reasons if none can."""
    found, problems = [], []
    for family in FAMILIES:
        try:
            config_of_model(shape, family)
            found.append(family)
        except ConfigError as error:
            problems += [f"{family}: {p}" for p in error.problems]
    if not found:
        raise ConfigError(problems)
    return found


def _from_nemotron_h(config: Mapping[str, Any]) -> ModelConfig:
    config, problems = one_spelling(config, "NemotronHForCausalLM")
    check_types(config)
    own = ("layers_block_type", "hybrid_override_pattern", "time_step_limit")
    read = {*_NEMOTRON_H.values(), *READ, *own, "expand", "n_shared_experts"}
    problems += key_problems(config, "NemotronHForCausalLM", read)
    pattern, found = layer_pattern(config)
    problems += found
    unused = {field for symbol, of in _OF_LAYER.items() if symbol not in pattern for field in of}
    needed = [theirs for ours, theirs in _NEMOTRON_H.items() if ours not in unused]
    problems += missing_keys(config, needed)
    fields = take(config, _NEMOTRON_H)
    low, high = _limits(config.get("time_step_limit") or [0.0, math.inf])
    if math.isfinite(high):
        problems.append(f"time_step_limit({[low, high]}) in config.json: ours has no upper bound")
    problems += width_problems(config, pattern)
    return build({**fields, **_NEMOTRON_H_OURS, "pattern": pattern, "mamba_dt_min": low}, problems)


def _limits(values: list[Any]) -> tuple[float, float]:
    """Parse two numbers; Hugging Face's files spell infinity as `Infinity` or as an object."""
    try:
        low, high = (_number(v["__float__"] if isinstance(v, dict) else v) for v in values)
    except (LookupError, TypeError, ValueError, OverflowError):
        raise ConfigError([f"time_step_limit({values}) in config.json: two numbers"]) from None
    return low, high


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    return float(value)


def _to_nemotron_h(shape: ModelConfig) -> dict[str, Any]:
    problems = differences(shape, _NEMOTRON_H_OURS)
    if "E" in shape.pattern and not shape.shared_expert_width:
        problems.append("model.shared_expert_width(0): every MoE layer has a shared expert")
    if problems:
        raise ConfigError(problems)
    kinds = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    return {
        **common(shape, "NemotronHForCausalLM", "nemotron_h", _NEMOTRON_H),
        "layers_block_type": [kinds[symbol] for symbol in shape.pattern],
        # JSON has no infinity, but Hugging Face's files spell it so.
        "time_step_limit": [shape.mamba_dt_min, math.inf],
        # transformers takes this for the lower limit, and its logarithm for new weights.
        "time_step_min": shape.mamba_dt_min or _NO_LIMIT,
    }
