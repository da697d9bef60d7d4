"""Conversion between the `config.json` of a Hugging Face folder and our ModelConfig."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast, get_args

from nemocascade.megatron.convert.config_keys import (
    key_problems,
    layer_pattern,
    missing_keys,
    one_spelling,
    width_problems,
)
from nemocascade.megatron.convert.names import Family
from nemocascade.recipe import ModelConfig
from nemocascade.recipe.model import MOST_PARTS
from nemocascade.recipe.rules import LARGEST
from nemocascade.runtime.stored_records import record_of

FAMILIES: tuple[Family, ...] = get_args(Family)

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
# Types of the settings that are no field of ours, and of their elements.
_TYPES: dict[str, tuple[Any, Any]] = {
    "architectures": (list, str),
    "layers_block_type": (list, str),
    "layer_types": (list, str),
    "hybrid_override_pattern": (str, None),
    "time_step_limit": (list, int | float | str | dict),
    "rope_parameters": (dict, None),
    "rope_scaling": (dict, None),
    "mlp_only_layers": (list, int),
    **dict.fromkeys(
        (
            *("num_hidden_layers", "decoder_sparse_step", "num_attention_heads", "hidden_size"),
            *("mamba_num_heads", "mamba_head_dim"),
        ),
        (int, None),
    ),
    "expand": (int | float, None),
}
_NO_LIMIT = 1e-30
"""A time step so short that no softplus falls below it."""
_ROPE = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
_ROPE_KEYS = ("rope_type", "type", "rope_theta", "partial_rotary_factor")


class ConfigError(ValueError):
    """A model that one of the two sides cannot express; `problems` lists every reason."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that `config.json` names. Raises ConfigError for others."""
    _check_types(config)
    named = list(config.get("architectures") or [])
    known = [name for name in named if name in FAMILIES]
    if len(named) != 1 or not known:
        raise ConfigError(
            [f"architectures({named}) in config.json: one of {', '.join(FAMILIES)} can be read"]
        )
    return cast(Family, known[0])


def _check_types(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for each setting that is not of the type in `_TYPES`."""
    wrong = [
        f"{name}({str(config[name])[:80]}) in config.json is of another type"
        for name, (kind, inner) in _TYPES.items()
        if config.get(name) is not None
        and not (
            isinstance(config[name], kind)
            and (inner is None or all(isinstance(v, inner) for v in config[name]))
        )
    ]
    if wrong:
        raise ConfigError(wrong)


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


def _take(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The ModelConfig fields that are in the config."""
    fields = {ours: config[n] for ours, n in names.items() if config.get(n) is not None}
    if "initializer_range" in config:
        fields["init_std"] = config["initializer_range"]
    return {**fields, "tie_embeddings": bool(config.get("tie_word_embeddings", False))}


_READ = ("initializer_range", "tie_word_embeddings", "num_hidden_layers")
"""Keys that are read in every family, besides those of a field."""


def _build(fields: dict[str, Any], problems: list[str]) -> ModelConfig:
    if problems:
        raise ConfigError(problems)
    try:
        shape = record_of(ModelConfig, fields)
    except ValueError as error:
        raise ConfigError([f"config.json: {error}"]) from None
    if found := shape.problems():
        raise ConfigError(found)
    return shape


def _from_nemotron_h(config: Mapping[str, Any]) -> ModelConfig:
    config, problems = one_spelling(config, "NemotronHForCausalLM")
    _check_types(config)
    own = ("layers_block_type", "hybrid_override_pattern", "time_step_limit")
    read = {*_NEMOTRON_H.values(), *_READ, *own, "expand", "n_shared_experts"}
    problems += key_problems(config, "NemotronHForCausalLM", read)
    pattern, found = layer_pattern(config)
    problems += found
    unused = {field for symbol, of in _OF_LAYER.items() if symbol not in pattern for field in of}
    needed = [theirs for ours, theirs in _NEMOTRON_H.items() if ours not in unused]
    problems += missing_keys(config, needed)
    fields = _take(config, _NEMOTRON_H)
    low, high = _limits(config.get("time_step_limit") or [0.0, math.inf])
    if math.isfinite(high):
        problems.append(f"time_step_limit({[low, high]}) in config.json: ours has no upper bound")
    problems += width_problems(config, pattern)
    return _build({**fields, **_NEMOTRON_H_OURS, "pattern": pattern, "mamba_dt_min": low}, problems)


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


def _from_qwen3_moe(config: Mapping[str, Any]) -> ModelConfig:
    config, problems = one_spelling(config, "Qwen3MoeForCausalLM")
    _check_types(config)
    names = {**_QWEN3_MOE, "num_layers": "num_hidden_layers"}
    own = ("head_dim", "mlp_only_layers", "decoder_sparse_step", *_ROPE)
    read = {*_QWEN3_MOE.values(), *_READ, *own}
    problems += key_problems(config, "Qwen3MoeForCausalLM", read)
    problems += missing_keys(config, names.values())
    fields = _take(config, names)
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta")}
    scaling = config.get("rope_scaling") or rope
    problems += [
        f"{name}({value!r}) of the rope settings in config.json is unknown: ours has a base only"
        for name, value in {**rope, **scaling}.items()
        if name not in _ROPE_KEYS
    ]
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        problems.append(f"rope_type({kind!r}) in config.json: ours has 'default' only")
    if rope.get("rope_theta") is None:
        problems.append("config.json lacks 'rope_theta'")
    if config.get("partial_rotary_factor", rope.get("partial_rotary_factor", 1.0)) != 1.0:
        problems.append("partial_rotary_factor in config.json: Qwen3 rotates whole heads")
    layers = fields.pop("num_layers", 0)
    if layers > MOST_PARTS:
        raise ConfigError([f"num_hidden_layers({layers}) in config.json: at most {MOST_PARTS}"])
    dense = set(config.get("mlp_only_layers") or [])
    step = config.get("decoder_sparse_step")
    step = 1 if step is None else step
    pattern = "".join(
        "*-" if i in dense or step < 1 or (i + 1) % step else "*E" for i in range(layers)
    )
    if not problems:
        fields["head_dim"] = config.get("head_dim") or config["hidden_size"] // max(
            1, config["num_attention_heads"]
        )
        theta = rope["rope_theta"]
        whole = isinstance(theta, int) and abs(theta) <= LARGEST
        fields["rope_base"] = float(theta) if whole else theta
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
        # transformers takes this for the lower limit, and its logarithm for new weights.
        "time_step_min": shape.mamba_dt_min or _NO_LIMIT,
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
