"""Generation on the training weights: KV cache, prefill, decode steps and CUDA graphs."""

from nemocascade_kernels import SampleSettings
from nemocascade_kernels.common.random_numbers import STEP, mix
from nemocascade_kernels.common.transfer import to_device

__all__ = ["STEP", "SampleSettings", "mix", "to_device"]
