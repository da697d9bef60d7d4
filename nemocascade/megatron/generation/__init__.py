"""Generation on the training weights: KV cache, prefill, decode steps and CUDA graphs."""

from nemocascade_kernels.common.transfer import to_device

__all__ = ["to_device"]
