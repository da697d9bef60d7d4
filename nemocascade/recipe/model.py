"""The shape of a model, and its presets."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from nemocascade.recipe.rules import (
    Count,
    Natural,
    NonNegative,
    Positive,
    Probability,
    number_problems,
)

MOST_PARTS = 1 << 17
"""Most layers, experts and key/value heads together: programs name each of them."""
LAYER_SYMBOLS = {"M": "Mamba-2", "*": "attention", "E": "MoE", "-": "MLP"}


@dataclass(frozen=True)
class ModelConfig:
    """A hybrid language model: one mixer per layer, pre-RMSNorm, residual."""

    pattern: str = "M*E"
    """One symbol per layer: M Mamba-2, * attention, E mixture of experts, - dense MLP."""

    hidden_size: Count = 128
    vocab_size: Count = 2048
    """Rows of the embedding and of the LM head; at least the tokenizer's size."""

    tie_embeddings: bool = False
    """Share the embedding's weights with the LM head."""

    norm_eps: Positive = 1e-5

    num_heads: Count = 4
    """Number of query heads of attention."""

    num_kv_heads: Count = 2
    head_dim: Count = 32
    rope: bool = False
    """Rotary position embedding within each document. Off: attention has no position embedding."""

    rope_base: Positive = 10_000.0
    rope_percent: Probability = 1.0
    """Fraction of the head dimension that is rotated."""

    qk_norm: bool = False
    """RMSNorm on each query and key head before the rotation (Qwen3)."""

    mamba_heads: Count = 8
    mamba_head_dim: Count = 32
    """The inner width is mamba_heads x mamba_head_dim; it need not be twice hidden_size."""

    mamba_state: Count = 32
    mamba_groups: Count = 2
    mamba_conv: Count = 4
    """Width of the causal convolution in tokens."""

    mamba_chunk: Count = 128
    """Tokens in a chunk of the scan, as in the family's checkpoints; FLOPs are counted by it."""

    mamba_dt_min: NonNegative = 0.0
    """Lower bound of the scan's time step, softplus(dt + dt_bias)."""

    num_experts: Count = 8
    experts_per_token: Count = 2
    expert_width: Count = 128
    shared_expert_width: Natural = 256
    """Width of the expert that every token passes through; 0 = none."""

    activation: Literal["relu2", "swiglu"] = "relu2"
    """Activation of experts and MLP. relu2 is `relu(x)^2`, not gated."""

    mlp_width: Count = 512
    """Width of the dense MLP layers (`-`)."""

    router_score: Literal["sigmoid", "softmax"] = "sigmoid"
    router_bias: bool = True
    """Add a bias for each expert in the selection only; training updates it from the load."""

    router_normalize: bool = True
    """Divide the weights of the selected experts by their sum."""

    router_scale: Positive = 2.5
    """Factor on the weights of the selected experts, applied last."""

    router_groups: Count = 1
    router_top_groups: Count = 1
    """Group-limited routing: experts form `router_groups` groups, and a token uses this many."""

    init_std: NonNegative = 0.02
    """Standard deviation of the normal initialisation of linears; projections back into the
    residual stream are divided by sqrt(layers)."""

    @property
    def num_layers(self) -> int:
        return len(self.pattern)

    @property
    def mamba_inner(self) -> int:
        return self.mamba_heads * self.mamba_head_dim

    @property
    def mamba_channels(self) -> int:
        """Channels of the mixer's convolution: x, B, C."""
        return self.mamba_inner + 2 * self.mamba_groups * self.mamba_state

    @property
    def mamba_in_proj(self) -> int:
        """Output width of the mixer's input projection: z, x, B, C, dt."""
        return self.mamba_inner + self.mamba_channels + self.mamba_heads

    def problems(self) -> list[str]:
        """Every rule that this shape breaks, each with its remedy."""
        return list(self._problems())

    @functools.lru_cache(maxsize=64)  # noqa: B019 - shapes are few, small and frozen
    def _problems(self) -> tuple[str, ...]:
        found = number_problems(self, "model")
        if not self.pattern:
            found.append("model.pattern is empty: give at least one layer, for example M*E")
        for symbol in sorted(set(self.pattern) - set(LAYER_SYMBOLS)):
            known = ", ".join(f"{s} ({n})" for s, n in LAYER_SYMBOLS.items())
            found.append(f"model.pattern holds {symbol!r}, which is not a layer: use {known}")
        for small, big, why in (
            ("num_kv_heads", "num_heads", "query heads share key/value heads in equal groups"),
            ("mamba_groups", "mamba_heads", "heads share B and C in equal groups"),
            ("router_groups", "num_experts", "expert groups are equal"),
        ):
            a, b = getattr(self, small), getattr(self, big)
            if a > 0 and b % a:
                found.append(f"model.{big}({b}) is not a multiple of model.{small}({a}): {why}")
        if "E" in self.pattern and not 1 <= self.experts_per_token <= self.num_experts:
            found.append(
                f"model.experts_per_token({self.experts_per_token}) must be in "
                f"1..num_experts({self.num_experts})"
            )
        parts = {
            "layers": self.num_layers,
            "experts": self.pattern.count("E") * self.num_experts,
            "key/value heads": self.pattern.count("*") * self.num_kv_heads,
        }
        if sum(parts.values()) > MOST_PARTS:
            said = ", ".join(f"{count} {name}" for name, count in parts.items())
            found.append(f"the model has {said} in all layers: at most {MOST_PARTS} together")
        if not 1 <= self.router_top_groups <= self.router_groups:
            found.append(
                f"model.router_top_groups({self.router_top_groups}) must be in "
                f"1..router_groups({self.router_groups})"
            )
        return tuple(found)


def tiny() -> ModelConfig:
    """About 2 M parameters with the three main kinds of layer, for CPUs."""
    return ModelConfig(pattern="MEM*EME*")


def tiny_policy() -> ModelConfig:
    """About 1.3 M parameters, for cascades on CPUs. Attention directly follows a convolution and
    the embedding is tied, so that it learns within minutes to copy words of its prompt."""
    return ModelConfig(pattern="M*EM*E", tie_embeddings=True)


def small() -> ModelConfig:
    """About 100 M parameters, 37 M active, in the proportions of Nemotron-3-Nano: for one GPU, or a
    patient CPU."""
    return ModelConfig(
        pattern="M*EMEM*EMEM*EMEM*EME",
        hidden_size=512,
        vocab_size=8192,
        tie_embeddings=True,
        num_heads=8,
        head_dim=64,
        mamba_heads=16,
        mamba_head_dim=64,
        mamba_state=64,
        num_experts=16,
        expert_width=512,
        shared_expert_width=1024,
    )


def nemotron3_nano_30b() -> ModelConfig:
    """Nemotron-3-Nano-30B-A3B as published (arXiv 2512.20848): 31.6 B parameters, 3.2 B active."""
    return ModelConfig(
        pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=2688,
        vocab_size=131_072,
        num_heads=32,
        num_kv_heads=2,
        head_dim=128,
        mamba_heads=64,
        mamba_head_dim=64,
        mamba_state=128,
        mamba_groups=8,
        num_experts=128,
        experts_per_token=6,
        expert_width=1856,
        shared_expert_width=3712,
        # No layer has it; published files name it, and an artifact made of them must agree.
        mlp_width=1856,
    )


def qwen3_0_6b() -> ModelConfig:
    """Qwen3-0.6B as published (arXiv 2505.09388): 28 dense layers, 0.6 B parameters."""
    return ModelConfig(
        pattern="*-" * 28,
        hidden_size=1024,
        vocab_size=151_936,
        tie_embeddings=True,
        norm_eps=1e-6,
        num_heads=16,
        num_kv_heads=8,
        head_dim=128,
        rope=True,
        rope_base=1e6,
        qk_norm=True,
        activation="swiglu",
        mlp_width=3072,
    )


def qwen3_30b_a3b() -> ModelConfig:
    """Qwen3-30B-A3B as published (arXiv 2505.09388): 48 layers, 30.5 B parameters, 3.3 B active."""
    return ModelConfig(
        pattern="*E" * 48,
        hidden_size=2048,
        vocab_size=151_936,
        norm_eps=1e-6,
        num_heads=32,
        num_kv_heads=4,
        head_dim=128,
        rope=True,
        rope_base=1e6,
        qk_norm=True,
        num_experts=128,
        experts_per_token=8,
        expert_width=768,
        shared_expert_width=0,
        activation="swiglu",
        # No layer has it; published files name it, and an artifact made of them must agree.
        mlp_width=6144,
        router_score="softmax",
        router_bias=False,
        router_scale=1.0,
    )


PRESETS = {
    "tiny": tiny,
    "tiny_policy": tiny_policy,
    "small": small,
    "qwen3_0_6b": qwen3_0_6b,
    "qwen3_30b_a3b": qwen3_30b_a3b,
    "nemotron3_nano_30b": nemotron3_nano_30b,
}
