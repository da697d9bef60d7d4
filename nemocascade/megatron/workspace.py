"""Memory that the model's operators hold for a moment, for planners that build nothing."""

from __future__ import annotations

from nemocascade_kernels import logits_bytes

from nemocascade.recipe import ModelConfig


def head_bytes(model: ModelConfig, tokens: int, element_size: int, *, tp: int, on_gpu: bool) -> int:
    """Bytes of logits that the loss of `tokens` tokens holds at a time on one of `tp` ranks."""
    device = "cuda" if on_gpu else "cpu"
    return logits_bytes(tokens, -(-model.vocab_size // tp), element_size, device=device, ranks=tp)
