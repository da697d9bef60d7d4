"""A small model with random weights, and assertions shared by the generation tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nemocascade.megatron.config import Accelerators, make_config
from nemocascade.megatron.generation.model_runner import ModelRunner
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import CascadeModel, build_model
from nemocascade.recipe import EngineConfig, LoraConfig, ModelConfig, MoeTrainingConfig, tiny
from nemocascade.runtime.world import World
from nemocascade.types import Document, pack_documents

# Small, with sizes that fill no vector and no power of two.
ODD = replace(
    tiny(),
    pattern="MEM*E-",
    hidden_size=48,
    vocab_size=151,
    num_heads=6,
    num_kv_heads=2,
    head_dim=20,
    mamba_heads=6,
    mamba_groups=2,
    mamba_head_dim=12,
    mamba_state=10,
    num_experts=5,
    expert_width=20,
    shared_expert_width=36,
    mlp_width=70,
)
# With sizes that every layout of two ranks divides.
EVEN = replace(tiny(), vocab_size=256, hidden_size=64, pattern="MEM*")

# What makes a shape one of Qwen3-MoE, with a pattern of `*E` pairs.
QWEN3: dict[str, Any] = {
    "activation": "swiglu",
    "rope": True,
    "qk_norm": True,
    "router_score": "softmax",
    "router_bias": False,
    "router_scale": 1.0,
    "shared_expert_width": 0,
}


def make_model(
    world: World, shape: ModelConfig, seed: int = 1, lora: LoraConfig | None = None
) -> list[CascadeModel]:
    """Chunks of `shape` with weights that spread the logits, in float32. lora: with adapters as
    after some training."""
    config = make_config(
        shape,
        world.parallel,
        EngineConfig(precision="fp32"),
        MoeTrainingConfig(load_balance="none"),
        seed=seed,
        lora=lora,
    )
    chunks = build_model(world, config, Accelerators())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for chunk in chunks:
            for name, value in chunk.named_parameters():
                if value.dim() > 1 and "conv1d" not in name:
                    value.mul_(4.0)
                if name.endswith("lora_b"):
                    # Factors that several ranks hold have the same values on them.
                    value.normal_(0.0, 0.05, generator=generator)
    return chunks


def make_runner(
    world: World, chunks: Sequence[CascadeModel], slots: int, context: int = 512
) -> ModelRunner:
    """A runner whose slots have blocks of their own for `context` tokens, in a mixed order."""
    model = ModelRunner(world, chunks, slots)
    columns = -(-context // model.table.size)
    model.allocate(slots * columns, context)
    generator = torch.Generator().manual_seed(slots)
    order = torch.randperm(slots * columns, generator=generator).view(slots, columns)
    for slot, blocks in enumerate(order.tolist()):
        model.table.assign(slot, 0, blocks)
    return model


def copies_of(model: ModelRunner, source: int, target: int, tokens: int) -> list[tuple[int, int]]:
    """Pairs of all blocks of a slot's tokens and those of another slot."""
    both = (model.table.named(slot, tokens).tolist() for slot in (source, target))
    return list(zip(*both, strict=True))


def full_logits(chunks: Sequence[CascadeModel], tokens: Tensor) -> Tensor:
    """[n, V] of one document by the training forward, on one process."""
    document = Document(tokens, torch.ones(tokens.numel(), dtype=torch.bool), "all")
    packed = Microbatch.from_batch(pack_documents([document], tokens.numel()), torch.device("cpu"))
    with torch.no_grad():
        hidden: Any = chunks[0](packed)
        logits: Tensor = hidden.squeeze(1) @ chunks[0].lm_head().t()
        return logits


def draw_tokens(vocabulary: int, length: int, seed: int) -> Tensor:
    """[length] random ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (length,), generator=generator)
