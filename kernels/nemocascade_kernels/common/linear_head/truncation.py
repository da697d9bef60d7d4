"""Distributions truncated by top-k and top-p: the kept tokens, in sampling and in a loss.

Shape letters: n rows, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

#: Peak elements of the logits whose tokens are ranked at once: a sort takes about 30 bytes of each.
RANKED = 1 << 24
#: Logit of a token that is not kept: its probability is 0 at any temperature, and 0 times it is 0.
_FLOOR = {torch.float16: -6e4}


class Truncation(NamedTuple):
    """Truncation of a policy's distribution to the tokens that sampling could draw.

    top_k: keep only the k most probable tokens; 0 keeps all.
    top_p: of those, renormalised, keep the fewest whose probabilities sum to at least this.
    vocabulary: ids from here on are never drawn, so they are not kept; 0 excludes none.
    """

    top_k: int = 0
    top_p: float = 1.0
    vocabulary: int = 0


def check_truncation(truncation: Truncation) -> None:
    """Raise ValueError for a truncation that keeps nothing or has no meaning."""
    top_k, top_p, vocabulary = truncation
    if top_k < 0 or not 0 < top_p <= 1 or vocabulary < 0:
        raise ValueError(
            f"top_k({top_k}) and vocabulary({vocabulary}) must be at least 0, top_p({top_p}) in "
            "(0, 1]"
        )


def kept_tokens(logits: Tensor, scale: float, truncation: Truncation) -> Tensor:
    """[n, V] bool mask of the tokens that a truncation keeps.

    logits: [n, V]. scale: 1 / temperature. Among equal probabilities the lower id is kept first.
    The token that reaches top_p is kept.
    """
    top_k, top_p, vocabulary = truncation
    scaled = logits[:, : vocabulary or None].float() * scale
    ranked, order = scaled.softmax(1).sort(dim=1, descending=True, stable=True)
    kept = torch.ones_like(ranked, dtype=torch.bool)
    if top_k:
        kept[:, top_k:] = False
        ranked = ranked.masked_fill(~kept, 0)
    if top_p < 1:
        sums = ranked.cumsum(1, dtype=torch.float64)
        kept &= sums - ranked < top_p * sums[:, -1:]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, order, kept)


def kept_log_mass(logits: Tensor, scale: float, kept: Tensor) -> Tensor:
    """[n] log of the probability of the kept tokens, at most 0."""
    scaled = logits.float() * scale
    inside = scaled.masked_fill(~kept, -torch.inf).logsumexp(1)
    return (inside - scaled.logsumexp(1)).clamp(max=0)


def truncate_(
    logits: Tensor,
    target: Tensor,
    scale: float,
    truncation: Truncation,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Overwrite the logits of tokens that are not kept, so that their probability is 0.

    logits: [n, V]; under `group`, this rank's shard [n, V / ranks]. target: [n] int64, relative to
    the shard. Returns [n] bool: the target is kept; False on a rank whose shard does not hold it.
    """
    width = logits.shape[1]
    ranks = 1 if group is None else group.size()
    start = 0 if group is None or ranks == 1 else group.rank() * width
    inside = (target >= 0) & (target < width)
    index = target.clamp(0, width - 1)[:, None]
    floor = _FLOOR.get(logits.dtype, -1e30)
    rows = max(1, RANKED // (width * ranks))
    for first in range(0, logits.shape[0], rows):
        block = slice(first, first + rows)
        kept = kept_tokens(_whole(logits[block], group), scale, truncation)
        kept = kept[:, start : start + width]
        logits[block] = logits[block].masked_fill(~kept, floor)
        inside[block] &= kept.gather(1, index[block])[:, 0]
    return inside


def _whole(shard: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of the whole vocabulary, from every rank's shard."""
    if group is None or group.size() == 1:
        return shard
    found = shard.new_empty(group.size(), *shard.shape)
    dist.all_gather_into_tensor(found.flatten(0, 1), shard.contiguous(), group=group)
    return found.transpose(0, 1).flatten(1)
