"""Conversion between the `config.json` of a Hugging Face folder and our ModelConfig."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast, get_args

from nemocascade.megatron.convert.names import Family
from nemocascade.recipe import ModelConfig

FAMILIES: tuple[Family, ...] = get_args(Family)

# ModelConfig field -> their name. All are required in config.json.
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
_QWEN3_MOE = {
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "mlp_width": "intermediate_size",
    "num_experts": "num_experts",
    "experts_per_token": "num_experts_per_tok",
    "expert_width": "moe_intermediate_size",
    "router_normalize": "norm_topk_prob",
}
# Settings that our model does not have: name -> the values with the same meaning as ours.
_NEMOTRON_H_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_bias": (False,),
    "mamba_proj_bias": (False,),
    "use_conv_bias": (True,),
    "mlp_hidden_act": ("relu2",),
    "mamba_hidden_act": ("silu", "swish"),
    "sliding_window": (None,),
    "moe_latent_size": (None,),
    "num_nextn_predict_layers": (0, None),
    "attention_dropout": (0, None),
    "hidden_dropout": (0, None),
    "quantization_config": (None,),
}
_QWEN3_FIXED: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
}
# Values that all models of a family share and that differ from ModelConfig's defaults.
_NEMOTRON_H_OURS: dict[str, Any] = {
    "activation": "relu2",
    "rope": False,
    "qk_norm": False,
    "router_score": "sigmoid",
    "router_bias": True,
}
_QWEN3_OURS: dict[str, Any] = {
    "activation": "swiglu",
    "rope": True,
    "rope_percent": 1.0,
    "qk_norm": True,
    "router_score": "softmax",
    "router_bias": False,
    "router_scale": 1.0,
    "router_groups": 1,
    "router_top_groups": 1,
    "shared_expert_width": 0,
    "mamba_dt_min": 0.0,
}
_LAYER_TYPES = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}


class ConfigError(ValueError):
    """A model that one of the two sides cannot express; `problems` lists every reason."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that `config.json` names. Raises ConfigError for others."""
    named = list(config.get("architectures") or [])
    known = [name for name in named if name in FAMILIES]
    if len(named) != 1 or not known:
        raise ConfigError(
            [f"architectures({named}) in config.json: one of {', '.join(FAMILIES)} can be read"]
        )
    return cast(Family, known[0])


def model_of_config(config: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a `config.json`.

    Raises ConfigError with every setting that is missing or that our model does not have.
    """
    if family_of(config) == "NemotronHForCausalLM":
        return _from_nemotron_h(config)
    return _from_qwen3_moe(config)


def config_of_model(shape: ModelConfig, family: Family) -> dict[str, Any]:
    """The settings of `config.json` that `shape` determines; the family's defaults cover the rest.

    Raises ConfigError with every setting that the family does not have.
    """
    return _to_nemotron_h(shape) if family == "NemotronHForCausalLM" else _to_qwen3_moe(shape)


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


# Newer files name experts alike in all families.
_ALIASES = {"num_experts": "num_local_experts", "n_routed_experts": "num_local_experts"}


def _take(
    config: Mapping[str, Any], names: Mapping[str, str], fixed: Mapping[str, tuple[Any, ...]]
) -> tuple[dict[str, Any], list[str]]:
    known = {name: config[other] for name, other in _ALIASES.items() if other in config}
    config = {**known, **config}
    problems = [f"config.json lacks {name!r}" for name in names.values() if name not in config]
    problems += [
        f"{name}({config[name]!r}) in config.json: our model has {' or '.join(map(repr, values))}"
        for name, values in fixed.items()
        if name in config and config[name] not in values
    ]
    fields = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
    if "initializer_range" in config:
        fields["init_std"] = config["initializer_range"]
    fields["tie_embeddings"] = bool(config.get("tie_word_embeddings", False))
    return fields, problems


def _build(fields: dict[str, Any], problems: list[str]) -> ModelConfig:
    if problems:
        raise ConfigError(problems)
    shape = ModelConfig(**fields)
    if found := shape.problems():
        raise ConfigError(found)
    return shape


def _from_nemotron_h(config: Mapping[str, Any]) -> ModelConfig:
    fields, problems = _take(config, _NEMOTRON_H, _NEMOTRON_H_FIXED)
    low, high = map(_number, config.get("time_step_limit") or (0.0, math.inf))
    if math.isfinite(high):
        problems.append(f"time_step_limit({[low, high]}) in config.json: ours has no upper bound")
    types = config.get("layers_block_type") or config.get("layer_types")
    if types is not None:
        unknown = sorted({str(t) for t in types} - set(_LAYER_TYPES))
        problems += [
            f"layers_block_type holds {name!r}, which is no layer here" for name in unknown
        ]
        pattern = "".join(_LAYER_TYPES.get(t, "?") for t in types)
    else:
        pattern = config.get("hybrid_override_pattern", "")
        if not pattern:
            problems.append("config.json lacks 'layers_block_type' and 'hybrid_override_pattern'")
    return _build({**fields, **_NEMOTRON_H_OURS, "pattern": pattern, "mamba_dt_min": low}, problems)


def _number(value: Any) -> float:
    """Parse a number; Hugging Face's files spell infinity as `Infinity` or as an object."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def _from_qwen3_moe(config: Mapping[str, Any]) -> ModelConfig:
    names = {**_QWEN3_MOE, "num_layers": "num_hidden_layers"}
    fields, problems = _take(config, names, _QWEN3_FIXED)
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    scaling = config.get("rope_scaling") or rope
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        problems.append(f"rope_type({kind!r}) in config.json: ours has 'default' only")
    if rope.get("rope_theta") is None:
        problems.append("config.json lacks 'rope_theta'")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial_rotary_factor in config.json: Qwen3 rotates whole heads")
    layers = fields.pop("num_layers", 0)
    dense = set(config.get("mlp_only_layers") or [])
    step = config.get("decoder_sparse_step", 1)
    pattern = "".join(
        "*-" if i in dense or step < 1 or (i + 1) % step else "*E" for i in range(layers)
    )
    if not problems:
        heads = config["num_attention_heads"]
        fields["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
        fields["rope_base"] = float(rope["rope_theta"])
    return _build({**fields, **_QWEN3_OURS, "pattern": pattern}, problems)


def _differences(shape: ModelConfig, fixed: Mapping[str, Any]) -> list[str]:
    return [
        f"model.{name}({getattr(shape, name)!r}) can only be {value!r}"
        for name, value in fixed.items()
        if getattr(shape, name) != value
    ]


def _common(
    shape: ModelConfig, family: Family, model_type: str, names: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "architectures": [family],
        "model_type": model_type,
        "tie_word_embeddings": shape.tie_embeddings,
        "initializer_range": shape.init_std,
        **{theirs: getattr(shape, ours) for ours, theirs in names.items()},
    }


def _to_nemotron_h(shape: ModelConfig) -> dict[str, Any]:
    problems = _differences(shape, _NEMOTRON_H_OURS)
    if "E" in shape.pattern and not shape.shared_expert_width:
        problems.append("model.shared_expert_width(0): every MoE layer has a shared expert")
    if problems:
        raise ConfigError(problems)
    kinds = {"M": "linear_attention", "*": "full_attention", "E": "moe", "-": "mlp"}
    return {
        **_common(shape, "NemotronHForCausalLM", "nemotron_h", _NEMOTRON_H),
        "layers_block_type": [kinds[symbol] for symbol in shape.pattern],
        # JSON has no infinity, but Hugging Face's files spell it so.
        "time_step_limit": [shape.mamba_dt_min, math.inf],
    }


def _to_qwen3_moe(shape: ModelConfig) -> dict[str, Any]:
    problems = _differences(shape, _QWEN3_OURS)
    mixers, mlps = shape.pattern[::2], shape.pattern[1::2]
    if set(mixers) != {"*"} or not set(mlps) <= {"E", "-"} or len(mixers) != len(mlps):
        problems.append(f"model.pattern({shape.pattern}) is no sequence of *E and *-")
    if problems:
        raise ConfigError(problems)
    return {
        **_common(shape, "Qwen3MoeForCausalLM", "qwen3_moe", _QWEN3_MOE),
        "head_dim": shape.head_dim,
        "num_hidden_layers": len(mlps),
        "mlp_only_layers": [i for i, symbol in enumerate(mlps) if symbol == "-"],
        "decoder_sparse_step": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_base},
    }
