"""Losses and the bias update that keep the experts' load even.

Padding and other documents are excluded: every sum runs over the tokens of a document, or over the
tokens that `token_mask` keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemocascade_kernels.common.routing import NORMALIZE_EPSILON, Routing, scores_of

_KINDS = ("sequence", "global")


def load_balance_loss(
    logits: Tensor,
    routing: Routing,
    cu_seqlens: Tensor | None = None,
    coef: float = 1e-4,
    *,
    kind: str = "sequence",
    score: str = "sigmoid",
    token_mask: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Load-balance loss of packed documents, or of all tokens at once.

    With P_te the scores of token t divided by their sum, n_d the tokens of document d, c_de the
    number of their choices of expert e, and D the number of documents that have tokens::

        sequence:  L = coef / D * sum_d  E / (K n_d^2) * sum_e c_de * sum_{t in d} P_te
        global:    the same with all tokens as one document

    (Switch Transformer, arXiv 2101.03961, eq. 4; sequence-wise: DeepSeek-V3, arXiv 2412.19437,
    eq. 17-20; global: arXiv 2501.11873.) An even load gives coef. The gradient reaches the logits
    only through P. DeepSeek-V3 and Megatron-Core count choices made without the expert bias: pass
    `moe_route(logits, top_k)` as `routing` for that, or the layer's own routing to count the
    actual load of the experts.

    Args:
        logits: [T, E], differentiable.
        routing: of the same tokens.
        cu_seqlens: [D + 1] integers, first tokens of the documents, then the end of the last.
            Tokens past the end are excluded. Required for "sequence".
        coef: factor on the loss.
        kind: "sequence" or "global".
        score: "sigmoid" or "softmax", as in `moe_route`.
        token_mask: [T] bool, False where a token does not count.
        reduce: sums an integer tensor over the ranks that hold the other tokens. The sum of the
            ranks' losses is then the loss. For "sequence" these are tokens of the same documents:
            every rank passes the same D, with empty documents where it holds no tokens.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: an unknown kind or score, or "sequence" without `cu_seqlens`.
    """
    if kind not in _KINDS:
        raise ValueError(f"load_balance_loss: kind={kind!r}: choose one of {_KINDS}")
    if score not in ("sigmoid", "softmax"):
        raise ValueError(f"load_balance_loss: score={score!r}: choose sigmoid or softmax")
    if kind == "sequence" and cu_seqlens is None:
        raise ValueError("load_balance_loss: kind='sequence' needs cu_seqlens")
    num_experts, top_k = routing.num_experts, routing.top_k
    document, documents = _documents(routing, cu_seqlens, kind, token_mask)
    with torch.no_grad():
        # An additional row is for excluded tokens, an additional column for slots without an
        # expert.
        lengths = torch.zeros(documents + 1, dtype=torch.int64, device=logits.device)
        lengths.scatter_add_(0, document, torch.ones_like(document))
        width = num_experts + 1
        loads = torch.zeros((documents + 1) * width, dtype=torch.int64, device=logits.device)
        slots = (document.unsqueeze(1) * width + routing.experts).reshape(-1)
        loads.scatter_add_(0, slots, torch.ones_like(slots))
        loads = loads.view(documents + 1, width)[:, :num_experts].contiguous()
        if reduce is not None:
            lengths, loads = reduce(lengths), reduce(loads)
        lengths[-1] = 0
        present = (lengths > 0).sum().clamp(min=1)
        scale = num_experts * coef / top_k / present / lengths.clamp(min=1).double().square()
        factors = (loads * (scale * (lengths > 0)).unsqueeze(1)).float()
    return _recomputed(_weighted_shares, logits, document, factors, score)


def _recomputed(function: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """Call `function`; backward computes it again, instead of keeping [T, E] tensors."""
    result: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
    return result


def _weighted_shares(logits: Tensor, document: Tensor, factors: Tensor, score: str) -> Tensor:
    """Sum over tokens and experts of the scores' shares times factors [D + 1, E]."""
    # An excluded token may hold any value, even NaN: it is replaced.
    absent = document == factors.shape[0] - 1
    scores = scores_of(logits.masked_fill(absent.unsqueeze(1), 0.0), score)
    shares = scores / (scores.sum(dim=-1, keepdim=True) + NORMALIZE_EPSILON)
    # Weighting each token by its document's factors avoids a sum over a document, and atomics.
    return (shares * factors.to(shares.dtype)[document]).sum()


def _documents(
    routing: Routing, cu_seqlens: Tensor | None, kind: str, token_mask: Tensor | None
) -> tuple[Tensor, int]:
    """The document of each token [T] int64, and D; an excluded token has document D."""
    tokens = torch.arange(routing.tokens, device=routing.experts.device)
    if cu_seqlens is None:
        document, documents = torch.zeros_like(tokens), 1
    else:
        documents = cu_seqlens.shape[0] - 1
        document = torch.bucketize(tokens, cu_seqlens[1:].contiguous(), right=True)
        document = document.masked_fill(tokens < cu_seqlens[0], documents)
        if kind == "global":
            document, documents = (document == documents).long(), 1
    if token_mask is not None:
        document = document.masked_fill(~token_mask, documents)
    return document, documents


def z_loss(
    logits: Tensor,
    coef: float = 1e-3,
    *,
    token_mask: Tensor | None = None,
    num_tokens: Tensor | int | None = None,
) -> Tensor:
    """`coef * mean_t logsumexp_e(logits_te)^2` over the tokens kept (ST-MoE, arXiv 2202.08906).

    Args:
        logits: [T, E], differentiable.
        coef: factor on the loss.
        token_mask: [T] bool, False where a token does not count.
        num_tokens: divisor of the sum; default, the number of tokens kept here. With the number
            over all ranks, the sum of the ranks' losses is the loss.

    Returns:
        A float32 scalar; 0 if no token counts.
    """
    squares = _recomputed(_squared_sums, logits, token_mask)
    if num_tokens is None:
        num_tokens = squares.shape[0] if token_mask is None else token_mask.sum()
    if isinstance(num_tokens, Tensor):
        return coef * squares.sum() / num_tokens.clamp(min=1)
    return coef * squares.sum() / max(num_tokens, 1)


def _squared_sums(logits: Tensor, token_mask: Tensor | None) -> Tensor:
    """logsumexp_e(logits_te)^2, [T]; 0 where a token does not count."""
    if token_mask is not None:
        logits = logits.masked_fill(~token_mask.unsqueeze(1), 0.0)
    wide = logits if logits.dtype == torch.float64 else logits.float()
    squares = wide.logsumexp(dim=-1).square()
    return squares if token_mask is None else squares * token_mask


@torch.no_grad()
def update_expert_bias(expert_bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """`expert_bias + rate * sign(mean(counts) - counts)` (arXiv 2408.15664, algorithm 1).

    Args:
        expert_bias: [E] (or [L, E] for L layers) floating point.
        counts: the same shape; the load of each expert since the last update, summed over all
            ranks that share the bias.
        rate: step of the bias; Nemotron 3 Nano uses 1e-3.

    Returns:
        The new bias; `expert_bias` itself is unchanged.

    Raises:
        ValueError: the shapes differ.
    """
    if expert_bias.shape != counts.shape:
        raise ValueError(
            f"update_expert_bias: expert_bias {list(expert_bias.shape)} and counts "
            f"{list(counts.shape)} must have one shape"
        )
    # Compare count * E with the total, in integers: the mean may not be representable.
    load = counts.long() * counts.shape[-1]
    direction = torch.sign(load.sum(dim=-1, keepdim=True) // counts.shape[-1] - load)
    return expert_bias + rate * direction.to(expert_bias.dtype)
