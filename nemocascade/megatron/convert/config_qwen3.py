"""Conversion between the `config.json` of Qwen3, dense or with experts, and our ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemocascade.megatron.convert.config_fields import (
    READ,
    ConfigError,
    build,
    check_types,
    common,
    differences,
    family_of,
    take,
)
from nemocascade.megatron.convert.config_keys import key_problems, missing_keys, one_spelling
from nemocascade.recipe import ModelConfig
from nemocascade.recipe.model import MOST_PARTS
from nemocascade.recipe.rules import LARGEST

# ModelConfig field -> their name.
_QWEN3 = {
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
}
_QWEN3_MOE = {
    **_QWEN3,
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_width": "moe_intermediate_size",
    "router_normalize": "norm_topk_prob",
}
# Values that all models of a family share and that differ from ModelConfig's defaults.
_QWEN3_OURS: dict[str, Any] = {
    "activation": "swiglu",
    "rope": True,
    "rope_percent": 1.0,
    "qk_norm": True,
}
_QWEN3_MOE_OURS: dict[str, Any] = {
    **_QWEN3_OURS,
    "router_score": "softmax",
    "router_bias": False,
    "router_scale": 1.0,
    "router_groups": 1,
    "router_top_groups": 1,
    "shared_expert_width": 0,
    "mamba_dt_min": 0.0,
}
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


def from_qwen3(config: Mapping[str, Any]) -> ModelConfig:
    """The shape of a dense Qwen3, or of one with experts."""
    family = family_of(config)
    is_dense = family == "Qwen3ForCausalLM"
    config, problems = one_spelling(config, family)
    check_types(config)
    shared = _QWEN3 if is_dense else _QWEN3_MOE
    names = {**shared, "num_layers": "num_hidden_layers"}
    own = ("layer_types",) if is_dense else ("mlp_only_layers", "decoder_sparse_step")
    problems += key_problems(config, family, {*shared.values(), *READ, "head_dim", *own, *_ROPE})
    # Without it transformers' classes take different widths.
    needed = (*names.values(), "head_dim") if is_dense else names.values()
    problems += missing_keys(config, needed)
    fields = take(config, names)
    base, found = _rope_base(config)
    problems += found
    layers = fields.pop("num_layers", 0)
    if layers > MOST_PARTS:
        raise ConfigError([f"num_hidden_layers({layers}) in config.json: at most {MOST_PARTS}"])
    kinds = config.get("layer_types") or []
    problems += [
        f"layer_types holds {kind!r} in config.json: every layer of ours is 'full_attention'"
        for kind in sorted(set(kinds) - {"full_attention"})
    ]
    if kinds and len(kinds) != layers:
        problems.append(
            f"layer_types names {len(kinds)} layers in config.json, num_hidden_layers {layers}: "
            "keep what the weights have"
        )
    if not problems:
        fields["head_dim"] = config.get("head_dim") or config["hidden_size"] // max(
            1, config["num_attention_heads"]
        )
        fields["rope_base"] = base
    pattern = "*-" * layers if is_dense else _moe_pattern(config, layers)
    ours = _QWEN3_OURS if is_dense else _QWEN3_MOE_OURS
    return build({**fields, **ours, "pattern": pattern}, problems)


def _moe_pattern(config: Mapping[str, Any], layers: int) -> str:
    dense = set(config.get("mlp_only_layers") or [])
    step = config.get("decoder_sparse_step")
    step = 1 if step is None else step
    return "".join(
        "*-" if i in dense or step < 1 or (i + 1) % step else "*E" for i in range(layers)
    )


def _rope_base(config: Mapping[str, Any]) -> tuple[Any, list[str]]:
    """The base of the rotary embedding of a Qwen3, and the problems of its settings."""
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    scaling = config.get("rope_scaling") or rope
    problems = [
        f"{name}({value!r}) of the rope settings in config.json is unknown: ours has a base only"
        for name, value in {**rope, **scaling}.items()
        if name not in _ROPE_KEYS
    ]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        problems.append(f"rope_type({kind!r}) in config.json: ours has 'default' only")
    theta = rope.get("rope_theta")
    if theta is None:
        problems.append("config.json has no 'rope_theta'")
    if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor in config.json: Qwen3 rotates whole heads")
    if isinstance(theta, int) and abs(theta) <= LARGEST:
        theta = float(theta)
    return theta, problems


def to_qwen3(shape: ModelConfig) -> dict[str, Any]:
    """The settings of a dense model. Raises ConfigError with all that the family does not have."""
    problems = differences(shape, _QWEN3_OURS)
    layers = shape.num_layers // 2
    if shape.pattern != "*-" * layers:
        problems.append(f"model.pattern({shape.pattern}) is not a sequence of *-")
    if problems:
        raise ConfigError(problems)
    return {
        **common(shape, "Qwen3ForCausalLM", "qwen3", _QWEN3),
        "head_dim": shape.head_dim,
        "num_hidden_layers": layers,
        "layer_types": ["full_attention"] * layers,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
    }


def to_qwen3_moe(shape: ModelConfig) -> dict[str, Any]:
    """The settings of a model with experts. Raises ConfigError as `to_qwen3`."""
    problems = differences(shape, _QWEN3_MOE_OURS)
    mixers, mlps = shape.pattern[::2], shape.pattern[1::2]
    if set(mixers) != {"*"} or not set(mlps) <= {"E", "-"} or len(mixers) != len(mlps):
        problems.append(f"model.pattern({shape.pattern}) is not a sequence of *E and *-")
    if problems:
        raise ConfigError(problems)
    return {
        **common(shape, "Qwen3MoeForCausalLM", "qwen3_moe", _QWEN3_MOE),
        "head_dim": shape.head_dim,
        "num_hidden_layers": len(mlps),
        "mlp_only_layers": [i for i, symbol in enumerate(mlps) if symbol == "-"],
        "decoder_sparse_step": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
    }
