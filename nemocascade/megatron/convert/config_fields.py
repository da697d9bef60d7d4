"""Parts of `config.json` that all families share: the family, types, the way to a ModelConfig."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast, get_args

from nemocascade.megatron.convert.names import Family
from nemocascade.recipe import ModelConfig, PicklableError
from nemocascade.runtime.stored_records import record_of

FAMILIES: tuple[Family, ...] = get_args(Family)

# Types of the settings that are not fields of ours, and of their elements.
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


class ConfigError(PicklableError, ValueError):
    """A model that one of the two sides cannot express; `problems` lists every reason."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("; ".join(problems))


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that `config.json` names. Raises ConfigError for others."""
    check_types(config)
    named = list(config.get("architectures") or [])
    known = [name for name in named if name in FAMILIES]
    if len(named) != 1 or not known:
        raise ConfigError(
            [f"architectures({named}) in config.json: one of {', '.join(FAMILIES)} can be read"]
        )
    return cast(Family, known[0])


def check_types(config: Mapping[str, Any]) -> None:
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


def take(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The ModelConfig fields that are in the config."""
    fields = {ours: config[n] for ours, n in names.items() if config.get(n) is not None}
    if "initializer_range" in config:
        fields["init_std"] = config["initializer_range"]
    return {**fields, "tie_embeddings": bool(config.get("tie_word_embeddings", False))}


READ = ("initializer_range", "tie_word_embeddings", "num_hidden_layers")
"""Keys that are read in every family, besides those of a field."""


def build(fields: dict[str, Any], problems: list[str]) -> ModelConfig:
    """The ModelConfig of the fields. Raises ConfigError for `problems` and for its own rules."""
    if problems:
        raise ConfigError(problems)
    try:
        shape = record_of(ModelConfig, fields)
    except ValueError as error:
        raise ConfigError([f"config.json: {error}"]) from None
    if found := shape.problems():
        raise ConfigError(found)
    return shape


def differences(shape: ModelConfig, fixed: Mapping[str, Any]) -> list[str]:
    """A problem for each field whose value is not the one that all models of a family share."""
    return [
        f"model.{name}({getattr(shape, name)!r}) can only be {value!r}"
        for name, value in fixed.items()
        if getattr(shape, name) != value
    ]


def common(
    shape: ModelConfig, family: Family, model_type: str, names: Mapping[str, str]
) -> dict[str, Any]:
    """The settings that every family's `config.json` has."""
    return {
        "architectures": [family],
        "model_type": model_type,
        "tie_word_embeddings": shape.tie_embeddings,
        "initializer_range": shape.init_std,
        **{theirs: getattr(shape, ours) for ours, theirs in names.items()},
    }
