"""Temporary memory of the model's operators, for planners that build nothing."""

from __future__ import annotations

from nemocascade_kernels import logits_bytes
from nemocascade_kernels.mamba2.ssd import LARGEST_CHUNK

from nemocascade.recipe import ModelConfig


def head_bytes(model: ModelConfig, tokens: int, element_size: int, *, tp: int, on_gpu: bool) -> int:
    """Peak bytes of logits in the loss of `tokens` tokens on one of `tp` ranks."""
    device = "cuda" if on_gpu else "cpu"
    return logits_bytes(tokens, -(-model.vocab_size // tp), element_size, device=device, ranks=tp)


def scan_chunk(model: ModelConfig, *, fla: bool) -> int:
    """Tokens between two states that a GPU's scan keeps for backward."""
    return model.mamba_chunk if fla else LARGEST_CHUNK
