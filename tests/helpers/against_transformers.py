"""Shapes of the models that transformers has too, and both programs' results on documents.

transformers gets one document at a time; our model gets them packed, with padding.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from nemocascade_kernels import Nll
from torch import Tensor, nn

from helpers.transformers_weights import WeightMap, part_of, parts_by_key
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.model import CascadeModel
from nemocascade.recipe import ModelConfig, tiny
from nemocascade.runtime.world import World
from nemocascade.types import Document, PackedBatch, pack_documents

# Short, around chunk edges (16, 32, 64, 128), and longer than transformers' chunk of 128.
LENGTHS = (1, 33, 130, 2, 16, 63, 3, 65, 128)
PADDING = 7
TOLERANCE = 1e-5  # of the largest value; seen: 2e-6 in outputs, 3e-6 in gradients
TINY = replace(tiny(), vocab_size=512)
NEMOTRON_H = {
    "tiny": TINY,
    "mamba, a group a head": replace(
        TINY,
        pattern="MM",
        hidden_size=40,
        mamba_heads=3,
        mamba_groups=3,
        mamba_head_dim=10,
        mamba_state=6,
        mamba_conv=3,
    ),
    "one group, one kv head, k of an odd E": replace(
        TINY,
        pattern="MEM*E",
        hidden_size=48,
        num_heads=6,
        num_kv_heads=1,
        head_dim=20,
        mamba_heads=6,
        mamba_groups=1,
        mamba_head_dim=24,
        num_experts=7,
        experts_per_token=3,
        expert_width=20,
        shared_expert_width=36,
        router_scale=1.5,
    ),
    "attention first, dense MLP, tied": replace(
        TINY,
        pattern="*-M-*",
        hidden_size=56,
        num_heads=6,
        num_kv_heads=6,
        head_dim=14,
        mlp_width=90,
        tie_embeddings=True,
    ),
    "router groups, weights as they are": replace(
        TINY,
        pattern="EM-E*",
        num_experts=12,
        experts_per_token=5,
        router_groups=4,
        router_top_groups=2,
        router_normalize=False,
        router_scale=0.7,
        tie_embeddings=True,
    ),
    "all experts": replace(TINY, pattern="E*", num_experts=2, experts_per_token=2),
}
QWEN3 = replace(
    TINY,
    pattern="*E*E",
    norm_eps=1e-6,
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    rope=True,
    qk_norm=True,
    activation="swiglu",
    router_score="softmax",
    router_bias=False,
    router_scale=1.0,
    shared_expert_width=0,
    num_experts=9,
    experts_per_token=4,
    expert_width=24,
)
QWEN3_MOE = {
    "tied": replace(QWEN3, tie_embeddings=True),
    "large base, weights as they are": replace(QWEN3, router_normalize=False, rope_base=1e6),
    "dense SwiGLU layers": replace(QWEN3, pattern="*-*E*-", mlp_width=70),
}
DENSE = replace(
    TINY,
    pattern="*-*-*-",
    norm_eps=1e-6,
    num_heads=6,
    head_dim=24,
    rope=True,
    qk_norm=True,
    activation="swiglu",
    mlp_width=70,
)
QWEN3_DENSE = {
    "tied": replace(DENSE, tie_embeddings=True),
    "large base, one kv head": replace(DENSE, num_kv_heads=1, rope_base=1e6),
}


@dataclass(frozen=True)
class Readings:
    """A model's results on the documents.

    hidden: [T, H] after the final norm. logits: [T, V]. logprob: [T], of the next token, 0 where it
    does not train. loss: scalar. gradients: of the loss, under our names.
    """

    hidden: Tensor
    logits: Tensor
    logprob: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]


def documents(vocabulary: int, seed: int) -> list[Document]:
    random = torch.Generator().manual_seed(seed)
    return [
        Document(
            tokens=torch.randint(vocabulary, (n,), generator=random, dtype=torch.int32),
            trained=torch.rand(n, generator=random) < 0.7,
            source=f"document {i}",
        )
        for i, n in enumerate(LENGTHS)
    ]


def packed_batch(shape: ModelConfig, seed: int) -> PackedBatch:
    """The documents, with an unequal weight on every trained row."""
    batch = pack_documents(documents(shape.vocab_size, seed), sum(LENGTHS) + PADDING)
    random = torch.Generator().manual_seed(seed + 1)
    weight = batch.token_weight * torch.rand(batch.capacity, generator=random)
    return replace(batch, token_weight=weight / weight.sum())


def read_with_transformers(
    model: nn.Module, shape: ModelConfig, batch: PackedBatch, to_ours: WeightMap
) -> Readings:
    """One document after the other; gradients add up."""
    model.zero_grad()
    losses, hidden, logits, logprobs = [], [], [], []
    bounds = batch.cu_seqlens.tolist()
    for first, end in itertools.pairwise(bounds):
        if first >= batch.num_tokens:
            break
        rows = slice(first, end)
        out: Any = model(input_ids=batch.tokens[None, rows], output_hidden_states=True)
        chosen = out.logits[0].log_softmax(-1).gather(1, batch.targets[rows, None]).squeeze(1)
        loss = -(batch.token_weight[rows] * chosen).sum()
        loss.backward()
        losses.append(loss.detach())
        hidden.append(out.hidden_states[-1][0].detach())
        logits.append(out.logits[0].detach())
        logprobs.append(torch.where(batch.token_weight[rows] != 0, chosen.detach(), 0.0))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return Readings(
        hidden=torch.cat(hidden),
        logits=torch.cat(logits),
        logprob=torch.cat(logprobs),
        loss=torch.stack(losses).sum(),
        gradients=to_ours(gradients, shape),
    )


def read_packed(model: CascadeModel, batch: PackedBatch, world: World) -> Readings:
    """All documents and the padding at once."""
    model.zero_grad()
    packed = Microbatch.from_batch(batch, world.device)
    assert packed.batch is not None
    with torch.no_grad():
        hidden = model(packed).squeeze(1)[: batch.num_tokens]
        logits = hidden @ model.lm_head().t()
    out = model(packed, Nll(packed.batch.token_weight))
    out.loss.backward()
    return Readings(
        hidden=hidden,
        logits=logits,
        logprob=out.logprob[: batch.num_tokens],
        loss=out.loss.detach(),
        gradients={
            key: part_of(part, part.owner.grad)
            for key, part in parts_by_key(model, world).items()
            if part.owner.grad is not None
        },
    )


def error(value: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    scale = expected.abs().max().clamp(min=1e-30)
    return float((value - expected).abs().max() / scale)
