"""`attention_step`: checks and choice of the implementation. Nothing here has a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from nemocascade_kernels import backends, native

_MODULE = "nemocascade_kernels.attention_step"


def native_refusal(*tensors: Tensor) -> str | None:
    """Why the compiled CPU step cannot take such a call."""
    if any(tensor.dtype not in (torch.float32, torch.int64) for tensor in tensors):
        return "it works in float32"
    return native.lacks("attention_step")


OP = backends.Op("attention_step")
OP.register("native", f"{_MODULE}.native", refuse=native_refusal)
OP.register("reference", f"{_MODULE}.reference")


def attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    longest: int,
    *,
    backend: str | None = None,
) -> Tensor:
    """One token of causal grouped-query attention for n sequences, over their cached past::

        keys[s, :, t], values[s, :, t] = k, v
        out = softmax(q keys[s, :, :t + 1]^T / sqrt(d)) values[s, :, :t + 1]

    The caches are changed in place. What stands in them past a row's position does not matter, NaN
    included. A row's result does not depend, in the compiled implementation not in a single bit,
    on the other rows.

    Args:
        q: [n, h, d] floating point; query head i uses key/value head i // (h / g).
        k, v: [n, g, d], of the same token.
        keys, values: [S, g, L, d], the caches.
        slots: [n] int64, the slot of each row.
        positions: [n] int64, t: the tokens that the slot holds already, below `longest`.
        longest: at most L; bounds the work where the host does not read `positions`.
        backend: demand an implementation; see `nemocascade_kernels.backends`.

    Returns:
        [n, h, d], q's dtype.

    Raises:
        ValueError: a shape or dtype is wrong; the message names all that are.
        BackendRefusedError: the demanded implementation cannot take the call.
    """
    _check(q, k, v, keys, values, slots, positions, longest)
    module = OP.choose(q, keys, slots, backend=backend)
    out: Tensor = module.attention_step(q, k, v, keys, values, slots, positions, longest)
    return out


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    positions: Tensor,
    longest: int,
) -> None:
    rows, heads, dim = q.shape
    count, kv_heads, capacity = keys.shape[:3]
    # Shapes as tuples: this runs for every layer and token.
    if (
        k.shape == v.shape == (rows, kv_heads, dim)
        and keys.shape == values.shape == (count, kv_heads, capacity, dim)
        and slots.shape == positions.shape == (rows,)
        and slots.dtype == positions.dtype == torch.int64
        and 1 <= longest <= capacity
        and heads % kv_heads == 0
    ):
        return
    faults = [
        f"{name} is {list(t.shape)}, not {list(shape)}"
        for name, t, shape in (
            ("k", k, (rows, kv_heads, dim)),
            ("v", v, (rows, kv_heads, dim)),
            ("keys", keys, (count, kv_heads, capacity, dim)),
            ("values", values, (count, kv_heads, capacity, dim)),
            ("slots", slots, (rows,)),
            ("positions", positions, (rows,)),
        )
        if tuple(t.shape) != tuple(shape)
    ]
    if heads % kv_heads:
        faults.append(f"{heads} query heads cannot share {kv_heads} key/value heads equally")
    if not 1 <= longest <= capacity:
        faults.append(f"longest({longest}) must lie in 1..{capacity}, the capacity of the caches")
    for name, t in (("slots", slots), ("positions", positions)):
        if t.dtype != torch.int64:
            faults.append(f"{name} are {t.dtype}, not torch.int64")
    raise ValueError(f"attention_step with q {list(q.shape)}: " + "; ".join(faults))
