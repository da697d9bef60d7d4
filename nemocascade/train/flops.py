"""Floating-point operations of a training step, for MFU.

Counted are the multiplications and additions of matrix products, 2 a multiply-add, forward; a
training step is three times that (the backward pass is twice the forward). Recomputation does not
count. For a document of n tokens, per layer and token:

    Mamba-2    2 H W_in + 2 D_inner H + 2 W_conv K + scan,  W_in = 2 D_inner + 2 G N + heads
               scan = 2 c (G N + D_inner) / 2 + 4 D_inner N   with chunks of c tokens: the causal
               half of C B^T and of its product with x, and the states written and read
    attention  2 H (Q + 2 KV) d + 2 Q d H + 2 n Q d    the last: the causal half of Q K^T and P V
    MoE        2 H E + K m H I + m H S    m = 4 (relu2) or 6 (SwiGLU); S the shared expert's width
    MLP        m H F
    LM head    2 H V, on trained tokens only

D_inner is the true Mamba width, heads x head_dim, not 2 H.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from nemocascade.recipe import ModelConfig
from nemocascade.types import PackedBatch

# Dense bf16 peaks by datasheet, TFLOP/s.
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "B200": 2250.0}


def layer_flops(model: ModelConfig, symbol: str, length: int) -> float:
    """Forward FLOPs of one layer for a document of `length` tokens."""
    hidden = model.hidden_size
    if symbol == "M":
        inner, groups_state = model.mamba_inner, model.mamba_groups * model.mamba_state
        chunk = min(model.mamba_chunk, length)
        per_token = 2 * hidden * model.mamba_in_proj + 2 * inner * hidden
        per_token += 2 * (inner + 2 * groups_state) * model.mamba_conv
        per_token += chunk * (groups_state + inner) + 4 * inner * model.mamba_state
        return float(length * per_token)
    if symbol == "*":
        queries = model.num_heads * model.head_dim
        keys = model.num_kv_heads * model.head_dim
        per_token = 2 * hidden * (queries + 2 * keys) + 2 * queries * hidden
        return float(length * per_token + 2 * queries * length * length)
    matrices = 6 if model.activation == "swiglu" else 4
    if symbol == "E":
        width = model.experts_per_token * model.expert_width + model.shared_expert_width
        return float(length * (2 * hidden * model.num_experts + matrices * hidden * width))
    return float(length * matrices * hidden * model.mlp_width)


def step_flops(model: ModelConfig, lengths: Iterable[int], trained_tokens: int) -> float:
    """FLOPs of a training step over documents of `lengths` tokens."""
    cache: dict[int, float] = {}
    total = 0.0
    for length in lengths:
        if length not in cache:
            cache[length] = sum(layer_flops(model, s, length) for s in model.pattern)
        total += cache[length]
    return 3.0 * (total + 2.0 * model.hidden_size * model.vocab_size * trained_tokens)


def batch_flops(model: ModelConfig, batch: PackedBatch) -> float:
    """FLOPs of a training step on one packed batch; padding is not work.

    The first context-parallel rank counts the layers of the whole pack, so that the ranks' sum is
    that of the pack.
    """
    lengths = batch.cu_seqlens.diff()[: batch.num_documents].tolist() if not batch.cp_rank else []
    return step_flops(model, lengths, batch.num_trained())


def peak_tflops(device: torch.device) -> float | None:
    """Dense bf16 datasheet peak of the device in TFLOP/s; None where it is not known (CPUs)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)
