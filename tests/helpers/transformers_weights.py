"""Models of transformers as an independent reference: built from a `ModelConfig`, with their
tensors mapped to our names in memory, as the converter does.

The maps only move tensors (cut, join, rename), so they serve for weights and for gradients alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from nemocascade.megatron.checkpoint.state import ModelPart, model_parts
from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.convert.config import config_of_model
from nemocascade.megatron.convert.names import Family, NameMap, Style, name_map
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.recipe import EngineConfig, ModelConfig, MoeTrainingConfig
from nemocascade.runtime.world import World

Tensors = dict[str, Tensor]
WeightMap = Callable[[Tensors, ModelConfig], Tensors]


def config_settings(shape: ModelConfig, family: Family) -> dict[str, Any]:
    """Settings of transformers' config class. Raises ConfigError for what the family has not."""
    settings = config_of_model(shape, family)
    return {**settings, "max_position_embeddings": 1 << 20, "use_cache": False}


def nemotron_h(shape: ModelConfig, shortest_step: float | None = None) -> nn.Module:
    """transformers' model of `shape`, with its own initial values, in float32.

    shortest_step: lower bound of softplus(dt + dt_bias); default, that of `shape`. transformers
        takes its `time_step_min` (0.001) for it; Megatron-Core and the published settings
        (`time_step_limit`) have 0.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(**config_settings(shape, "NemotronHForCausalLM"))
    model: Any = NemotronHForCausalLM(config)
    set_shortest_step(model, shape.mamba_dt_min if shortest_step is None else shortest_step)
    if shape.tie_embeddings:
        # Its class names no tied weights, so its own setting has no effect.
        model.lm_head.weight = model.model.embeddings.weight
    return cast(nn.Module, model)


def set_shortest_step(model: nn.Module, step: float) -> None:
    """Bound the time steps of transformers' Mamba layers from below by `step`."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            cast(Any, module).time_step_limit = (step, float("inf"))


def qwen3_moe(shape: ModelConfig) -> nn.Module:
    """transformers' Qwen3-MoE, each of whose layers is two of ours: `*` then `E` or `-`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings = config_settings(shape, "Qwen3MoeForCausalLM")
    return cast(nn.Module, Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)))


def qwen3(shape: ModelConfig) -> nn.Module:
    """transformers' dense Qwen3, each of whose layers is two of ours: `*` then `-`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    settings = config_settings(shape, "Qwen3ForCausalLM")
    return cast(nn.Module, Qwen3ForCausalLM(Qwen3Config(**settings)))


def in_memory(family: Family, shape: ModelConfig) -> NameMap:
    """The names that transformers' modules have, which are not those of their files."""
    return name_map(family, shape, Style("model.", merged_experts=True, stored_head=True))


def from_nemotron_h(tensors: Tensors, shape: ModelConfig) -> Tensors:
    """Tensors of NemotronHForCausalLM under our names. Raises ValueError if one is left over."""
    return _convert(in_memory("NemotronHForCausalLM", shape), tensors)


def from_qwen3_moe(tensors: Tensors, shape: ModelConfig) -> Tensors:
    """Tensors of Qwen3MoeForCausalLM under our names. Raises ValueError if one is left over."""
    return _convert(in_memory("Qwen3MoeForCausalLM", shape), tensors)


def from_qwen3(tensors: Tensors, shape: ModelConfig) -> Tensors:
    """Tensors of Qwen3ForCausalLM under our names. Raises ValueError if one is left over."""
    return _convert(in_memory("Qwen3ForCausalLM", shape), tensors)


def convert_tensors(names: NameMap, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in memory under our names, in their dtypes; moves of absent tensors are skipped."""
    ours: dict[str, Tensor] = {}
    for move in names.moves:
        if move.theirs in theirs and move.theirs not in names.copies:
            value = theirs[move.theirs]
            if move.ours not in ours:
                ours[move.ours] = value.new_zeros(names.ours[move.ours])
            source = value[move.their_box.slices()].reshape(move.our_box.size)
            ours[move.ours][move.our_box.slices()] = source
    return ours


def _convert(names: NameMap, tensors: Mapping[str, Tensor]) -> Tensors:
    left = sorted(set(tensors) - set(names.theirs))
    if left:
        raise ValueError(f"{len(left)} tensors have no place in our model: {left[:8]}")
    return convert_tensors(names, tensors)


def parts_by_key(model: nn.Module, world: World) -> dict[str, ModelPart]:
    """Our model's tensors, by the names that an artifact gives them."""
    return {part.key: part for part in model_parts([model], world)}


def part_of(part: ModelPart, tensor: Tensor) -> Tensor:
    """The elements of a part in a tensor that is shaped as the part's owner."""
    return tensor[part.local.slices()]


@torch.no_grad()
def load_into(model: nn.Module, ours: Tensors, shape: ModelConfig, world: World) -> None:
    """Copy `ours` into the parameters and buffers of `model`, our model of `shape`, in place.

    A router's bias that the shape does not use stays as it is.
    Raises ValueError if a name is missing on either side or a shape differs.
    """
    places = parts_by_key(model, world)
    needed = {n for n in places if shape.router_bias or not n.endswith("router.expert_bias")}
    wrong = [f"{name} is missing" for name in sorted(needed - set(ours))]
    wrong += [f"{name} has no place" for name in sorted(set(ours) - needed)]
    wrong += [
        f"{name} is {list(value.shape)}, not {list(places[name].local.size)}"
        for name, value in ours.items()
        if name in needed and tuple(value.shape) != places[name].local.size
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
    for name, value in ours.items():
        part_of(places[name], places[name].owner).copy_(value)


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Values that make every tensor matter: projections keep the size of what they project."""
    random = torch.Generator().manual_seed(seed)

    def normal(value: Tensor, std: float, mean: float = 0.0) -> None:
        value.copy_(mean + std * torch.randn(value.shape, generator=random))

    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("A_log"):
            value.copy_(torch.rand(value.shape, generator=random) * 2.7)
        elif name.endswith("dt_bias"):
            normal(value, 1.5, -4.0)
        elif name.endswith(("norm.weight", "layernorm.weight", "norm_f.weight", ".D")):
            normal(value, 0.2, 1.0)
        elif name.endswith("e_score_correction_bias"):
            normal(value, 0.1)
        elif name.endswith("conv1d.bias"):
            normal(value, 0.3)
        elif name.endswith(("embeddings.weight", "embed_tokens.weight")):
            normal(value, 1.0)
        elif not name.endswith("inv_freq"):
            normal(value, value.shape[-1] ** -0.5)


def build_ours(
    world: World, shape: ModelConfig, theirs: nn.Module, to_ours: WeightMap
) -> CascadeModel:
    """Our model of `shape` with the weights of `theirs`."""
    config = make_config(
        shape,
        world.parallel,
        EngineConfig(precision="fp32"),
        MoeTrainingConfig(load_balance="none"),
        seed=0,
    )
    [model] = build_model(world, config, Accelerators())
    tensors = {name: p.data for name, p in theirs.named_parameters()}
    kept = theirs.state_dict()
    tensors |= {name: value for name, value in theirs.named_buffers() if name in kept}
    load_into(model, to_ours(tensors, shape), shape, world)
    return model
