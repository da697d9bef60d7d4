"""Keys of a `config.json`: spellings, fixed values, and keys without effect on the model.

Every key of a folder is read, or has the one value that our model has, or is listed here as
harmless. Any other key is an error: it may change what the model computes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from nemocascade.megatron.convert.names import Family

Config = Mapping[str, Any]

_QWEN3: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "use_sliding_window": (False,),
    "hidden_act": ("silu", "swish"),
    "attention_dropout": (0, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False,),
}

FIXED: dict[Family, dict[str, tuple[Any, ...]]] = {
    "NemotronHForCausalLM": {
        "model_type": ("nemotron_h",),
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
        "residual_in_fp32": (False,),
        "is_encoder_decoder": (False,),
    },
    "Qwen3ForCausalLM": {"model_type": ("qwen3",), **_QWEN3},
    "Qwen3MoeForCausalLM": {"model_type": ("qwen3_moe",), **_QWEN3},
}
"""Settings that our model does not have: the values with the same meaning as ours."""

SPELLINGS: dict[Family, dict[str, str]] = {
    "NemotronHForCausalLM": {
        "attention_head_dim": "head_dim",
        "num_query_groups": "num_key_value_heads",
        "norm_eps": "layer_norm_epsilon",
        "rms_norm_eps": "layer_norm_epsilon",
        "mamba_n_groups": "n_groups",
        "mamba_num_groups": "n_groups",
        "mamba_state_dim": "ssm_state_size",
        "mamba_d_conv": "conv_kernel",
        "mamba_chunk_size": "chunk_size",
        "mamba_conv_bias": "use_conv_bias",
        "mamba_expand": "expand",
        "mamba_dt_limit": "time_step_limit",
        "num_local_experts": "n_routed_experts",
        "layer_types": "layers_block_type",
    },
    "Qwen3ForCausalLM": {},
    "Qwen3MoeForCausalLM": {"num_local_experts": "num_experts"},
}
"""Other spelling of a key -> the key."""

_HARMLESS = {
    # Bookkeeping.
    "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "name_or_path", "tokenizer_class", "id2label", "label2id", "problem_type",
    # Token ids and limits of serving.
    "bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "max_position_embeddings",
    "use_cache",
    # Outputs, and implementations of the same function.
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "chunk_size_feed_forward", "_attn_implementation", "attn_implementation",
    "_experts_implementation", "experts_implementation", "num_logits_to_keep",
}  # fmt: skip

HARMLESS: dict[Family, frozenset[str]] = {
    "NemotronHForCausalLM": frozenset(_HARMLESS)
    | {
        # Attention of this family has no position embedding.
        "rope_theta", "partial_rotary_factor",
        # Initial weights.
        "rescale_prenorm_residual", "time_step_min", "time_step_max", "time_step_floor",
        "time_step_rank", "mamba_dt_min", "mamba_dt_max", "mamba_dt_init_floor",
        # Kernels and their overlap; layers of a multi-token prediction that is off.
        "use_mamba_kernels", "mamba_ssm_cache_dtype", "moe_shared_expert_overlap",
        "mtp_layers_block_type", "mtp_hybrid_override_pattern",
    },
    # Sliding windows are off in every model that can be read.
    "Qwen3ForCausalLM": frozenset(_HARMLESS) | {"sliding_window", "max_window_layers"},
    "Qwen3MoeForCausalLM": frozenset(_HARMLESS)
    # The last is a loss of training.
    | {"sliding_window", "max_window_layers", "router_aux_loss_coef"},
}  # fmt: skip
"""Keys that change no value that the model computes from its weights."""

_LAYER_TYPES = {
    "linear_attention": "M",
    "mamba": "M",
    "full_attention": "*",
    "attention": "*",
    "moe": "E",
    "mlp": "-",
}
# The family's default, which its files carry whatever the inner width is: no model code reads it.
_EXPAND = 2


def one_spelling(config: Config, family: Family) -> tuple[dict[str, Any], list[str]]:
    """The config with each key in its main spelling, and a problem for two that differ."""
    found, problems = dict(config), []
    for other, name in SPELLINGS[family].items():
        if other not in found:
            continue
        value = found.pop(other)
        # Null is not a value: the other spelling has it.
        if found.get(name) is None:
            found[name] = value
        elif value is not None and found[name] != value:
            problems.append(
                f"{other}({value!r}) in config.json is another spelling of {name}"
                f"({found[name]!r}): give both the value that the weights were trained with"
            )
    return found, problems


def key_problems(config: Config, family: Family, read: Collection[str]) -> list[str]:
    """Keys with a value that our model does not have, and keys that nothing reads.

    config: in its main spelling. read: keys that the conversion reads.
    """
    fixed = FIXED[family]
    known = {*read, *fixed, *HARMLESS[family]}
    return [
        f"{name}({config[name]!r}) in config.json: our model has "
        f"{' or '.join(map(repr, values))}, so these weights cannot be converted"
        for name, values in fixed.items()
        if name in config and not _is_one_of(config[name], values)
    ] + [
        f"{name}({value!r}) in config.json is unknown, and may change what the model computes: "
        "remove the key if it has no effect on the weights' function"
        for name, value in sorted(config.items())
        if name not in known
    ]


def missing_keys(config: Config, needed: Iterable[str]) -> list[str]:
    """A problem for each needed key that is missing or null."""
    return [f"config.json has no {name!r}" for name in needed if config.get(name) is None]


def layer_pattern(config: Config) -> tuple[str, list[str]]:
    """The layers of a NemotronH config, and the problems of its keys that name them."""
    problems: list[str] = []
    spelled: dict[str, str] = {}
    types = config.get("layers_block_type")
    if types is not None:
        unknown = sorted({str(t) for t in types} - set(_LAYER_TYPES))
        problems += [
            f"layers_block_type holds {name!r}, which is not a layer here" for name in unknown
        ]
        spelled["layers_block_type"] = "".join(_LAYER_TYPES.get(t, "?") for t in types)
    if written := config.get("hybrid_override_pattern"):
        spelled["hybrid_override_pattern"] = str(written)
    if not spelled:
        return "", ["config.json has neither 'layers_block_type' nor 'hybrid_override_pattern'"]
    pattern = next(iter(spelled.values()))
    if len(set(spelled.values())) > 1:
        both = " and ".join(f"{name}({value})" for name, value in spelled.items())
        problems.append(f"{both} in config.json differ: keep the one that the weights have")
    count = config.get("num_hidden_layers")
    if count is not None and count != len(pattern):
        problems.append(
            f"num_hidden_layers({count}) in config.json, but {pattern} has {len(pattern)} layers: "
            "set it to their number, or fix the pattern"
        )
    return pattern, problems


def width_problems(config: Config, pattern: str) -> list[str]:
    """Widths that are named twice and disagree."""
    problems = []
    if "E" in pattern and config.get("n_shared_experts", 1) != 1:
        problems.append(
            f"n_shared_experts({config['n_shared_experts']!r}) in config.json: our MoE layer has "
            "1, of width moe_shared_expert_intermediate_size"
        )
    expand = config.get("expand")
    if "M" in pattern and expand not in (None, _EXPAND):
        hidden, heads, width = (
            config.get(name) for name in ("hidden_size", "mamba_num_heads", "mamba_head_dim")
        )
        if hidden and heads and width and expand * hidden != heads * width:
            problems.append(
                f"expand({expand!r}) x hidden_size({hidden}) in config.json is not the inner width "
                f"mamba_num_heads({heads}) x mamba_head_dim({width}) = {heads * width}: fix what "
                "the weights do not have"
            )
    return problems


def _is_one_of(value: Any, values: tuple[Any, ...]) -> bool:
    """True if the value is among `values`; 0 and False differ, 0 and 0.0 do not."""
    return any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values)
