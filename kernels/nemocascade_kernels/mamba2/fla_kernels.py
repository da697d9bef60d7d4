"""fla-core's Triton kernels for the scan and the convolution, over tables made on the host.

fla-core's public functions count the chunks of the documents on the device and read the count back
in every call. The functions below start the same kernels with tables that are made once for a
microbatch. With a log decay `g_t = dt_t A` for each head, a state S [n, p] and L_t the sum of g
over a chunk up to t, a chunk computes

    y_t = sum_{j<=t} exp(L_t - L_j) (C_t . B_j) v_j + exp(L_t) C_t^T S
    S'  = exp(L_last) S + sum_j exp(L_last - L_j) B_j v_j^T

Tensors are contiguous. Shape letters: T tokens, D documents, N chunks, h heads, p head dimension,
g groups, n state, W convolution channels, K its width.
"""

from __future__ import annotations

import importlib
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.common.transfer import to_device

CHUNK = 64
# The kernels' decays are powers of two.
_LOG2_E = math.log2(math.e)
# The convolution's chunks are the second dimension of its launch grid.
_MOST_CHUNKS = 65_535

# Functions and kernels that are called here, with the arguments that a version must have.
_PLACES = "cu_seqlens chunk_indices"
_SCAN = "g g_gamma cu_seqlens split_offsets T H K V BT BS USE_G USE_G_GAMMA USE_GK USE_GV"
NEEDED = {
    "fla.modules.causal_conv1d": {
        "causal_conv1d_fwd": f"x weight bias residual activation {_PLACES}",
        "causal_conv1d_bwd": f"x dy dht weight bias activation {_PLACES}",
    },
    "fla.ops.utils": {"chunk_local_cumsum": f"g chunk_size reverse scale {_PLACES}"},
    "fla.ops.common.chunk_h": {
        "chunk_fwd_kernel_h": f"k v h gk gv h0 ht STATE_V_FIRST {_SCAN}",
        "chunk_bwd_kernel_dh": f"q gk gv do dh dht dh0 scale HQ NG STATE_V_FIRST {_SCAN}",
    },
    "fla.ops.common.chunk_o": {
        "chunk_fwd_o": f"q k v h g scale chunk_size {_PLACES}",
        "chunk_bwd_dqkwg": f"q k v h g do dh scale chunk_size {_PLACES}",
        "chunk_bwd_dv": f"q k g do dh scale chunk_size {_PLACES}",
    },
}


def missing_arguments() -> list[str]:
    """Modules, functions, kernels and arguments that are missing in the installed fla-core.

    Raises ImportError if one of its modules needs a package that is not installed.
    """
    missing = []
    for module, functions in NEEDED.items():
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("fla."):
                raise
            missing.append(module)
            continue
        for name, arguments in functions.items():
            function = getattr(found, name, None)
            if function is None:
                missing.append(f"{module}.{name}")
                continue
            has = getattr(function, "arg_names", None) or inspect.signature(function).parameters
            missing += [f"{a} of {module}.{name}" for a in arguments.split() if a not in has]
    return missing


def _load(module: str, name: str) -> Any:
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class ChunkTables:
    """Chunks of all documents: int64 tensors on the device.

    cu_seqlens: [D + 1]. offsets: [D + 1], the first chunk of each document, and N.
    indices: [N, 2], the document of each chunk and the chunk's index within it.
    """

    cu_seqlens: Tensor
    offsets: Tensor
    indices: Tensor

    @property
    def places(self) -> dict[str, Tensor]:
        """Keyword arguments of fla-core's functions."""
        return {"cu_seqlens": self.cu_seqlens, "chunk_indices": self.indices}


def tables(packed: PackedSeq) -> ChunkTables:
    """The pack's chunks; made once for all layers and passes, with one copy to the device.

    Raises ValueError if there are more chunks than one launch holds.
    """
    return packed.cached("fla chunks", lambda: _make_tables(packed))


def _make_tables(packed: PackedSeq) -> ChunkTables:
    counts = (packed.lengths + CHUNK - 1) // CHUNK
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    total = int(offsets[-1])
    if total > _MOST_CHUNKS:
        raise ValueError(
            f"{packed.num_documents} documents have {total} chunks of {CHUNK} rows, fla-core takes "
            f"at most {_MOST_CHUNKS}: use a smaller capacity, longer documents, or another backend "
            "than fla"
        )
    document = torch.repeat_interleave(torch.arange(packed.num_documents), counts)
    indices = torch.stack([document, torch.arange(total) - offsets[document]], 1)
    ends = torch.cat([packed.starts, packed.starts[-1:] + packed.lengths[-1:]])
    # Each part begins at a multiple of 16 bytes: Triton compiles other code for other addresses.
    parts = [torch.nn.functional.pad(t, (0, t.numel() % 2)) for t in (ends, offsets)]
    [whole] = to_device([torch.cat([*parts, indices.view(-1)])], packed.device)
    first, second, rest = whole.split([*(p.numel() for p in parts), indices.numel()])
    return ChunkTables(first[: ends.numel()], second[: offsets.numel()], rest.view(-1, 2))


def convolution(x: Tensor, weight: Tensor, bias: Tensor, t: ChunkTables) -> Tensor:
    """`silu(conv(x))` within documents, [T, W]. x: [T, W], rows at any distance."""
    forward = _load("fla.modules.causal_conv1d", "causal_conv1d_fwd")
    y: Tensor = forward(
        x=x[None], weight=weight, bias=bias, residual=None, activation="silu", **t.places
    )[0]
    return y[0]


def convolution_backward(
    x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor, t: ChunkTables
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [T, W], weight [W, K] and bias [W]. dy: [T, W], rows at any distance."""
    backward = _load("fla.modules.causal_conv1d", "causal_conv1d_bwd")
    dx, d_weight, d_bias, *_ = backward(
        x=x[None], dy=dy[None], dht=None, weight=weight, bias=bias, activation="silu", **t.places
    )
    return dx[0], d_weight, d_bias


def decay_sums(g: Tensor, t: ChunkTables) -> Tensor:
    """Sums of log decays `g` [T, h] within chunks, in base 2."""
    cumsum = _load("fla.ops.utils", "chunk_local_cumsum")
    sums: Tensor = cumsum(g[None], chunk_size=CHUNK, scale=_LOG2_E, **t.places)
    return sums[0]


def decay_sums_backward(d_sums: Tensor, t: ChunkTables) -> Tensor:
    """Gradient of the log decays [T, h], from that of their natural sums [T, h]."""
    cumsum = _load("fla.ops.utils", "chunk_local_cumsum")
    dg: Tensor = cumsum(d_sums[None], chunk_size=CHUNK, reverse=True, **t.places)
    return dg[0]


def states(B: Tensor, v: Tensor, sums: Tensor, t: ChunkTables, dtype: torch.dtype) -> Tensor:
    """The state that enters each chunk, [N, h, n, p] in `dtype`. B: [T, h, n]; v: [T, h, p]."""
    (rows, heads, n), p = B.shape, v.shape[2]
    h = v.new_empty(t.indices.shape[0], heads, n, p, dtype=dtype)
    kernel = _load("fla.ops.common.chunk_h", "chunk_fwd_kernel_h")
    kernel[_state_grid(t, heads, n, p)](
        k=B, v=v, h=h, h0=None, ht=None, **_state_arguments(sums, t, rows, heads, n, p)
    )
    return h


def state_gradients(C: Tensor, sums: Tensor, dy: Tensor, t: ChunkTables) -> Tensor:
    """The gradient of the state that leaves each chunk, [N, h, n, p] float32.

    C: [T, h, n]; dy: [T, h, p].
    """
    (rows, heads, n), p = C.shape, dy.shape[2]
    dh = dy.new_empty(t.indices.shape[0], heads, n, p, dtype=torch.float32)
    kernel = _load("fla.ops.common.chunk_h", "chunk_bwd_kernel_dh")
    kernel[_state_grid(t, heads, n, p)](
        q=C, do=dy, dh=dh, dht=None, dh0=None, scale=1.0, HQ=heads, NG=1,
        **_state_arguments(sums, t, rows, heads, n, p),
    )  # fmt: skip
    return dh


def _state_grid(t: ChunkTables, heads: int, n: int, p: int) -> Any:
    documents = t.offsets.shape[0] - 1
    return lambda meta: (-(-n // meta["BK"]) * -(-p // meta["BV"]) * documents * heads,)


def _state_arguments(
    sums: Tensor, t: ChunkTables, rows: int, heads: int, n: int, p: int
) -> dict[str, Any]:
    """Shared arguments of the two kernels over states."""
    tensors = {"g": sums, "g_gamma": None, "gk": None, "gv": None}
    places = {"cu_seqlens": t.cu_seqlens, "split_offsets": t.offsets}
    sizes = {"T": rows, "H": heads, "K": n, "V": p, "BT": CHUNK, "BS": CHUNK}
    uses = {"USE_G": True, "USE_G_GAMMA": False, "USE_GK": False, "USE_GV": False}
    return tensors | places | sizes | uses | {"STATE_V_FIRST": False}


def outputs(C: Tensor, B: Tensor, v: Tensor, h: Tensor, sums: Tensor, t: ChunkTables) -> Tensor:
    """y [T, h, p] in v's dtype. B, C: [T, g, n]; v: [T, h, p]; h: from `states`."""
    function = _load("fla.ops.common.chunk_o", "chunk_fwd_o")
    y: Tensor = function(
        q=C[None], k=B[None], v=v[None], h=h[None], g=sums[None],
        scale=1.0, chunk_size=CHUNK, **t.places,
    )  # fmt: skip
    return y[0]


def gradients(
    C: Tensor, B: Tensor, v: Tensor, h: Tensor, sums: Tensor, dy: Tensor, dh: Tensor, t: ChunkTables
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of C and B [T, g, n], of v [T, h, p], and of the natural sums [T, h].

    h: from `states`; dh: from `state_gradients`; both float32.
    """
    shared: dict[str, Any] = {
        "q": C[None],
        "k": B[None],
        "g": sums[None],
        "do": dy[None],
        "dh": dh[None],
    }
    shared |= {"scale": 1.0, "chunk_size": CHUNK, **t.places}
    of_the_rest = _load("fla.ops.common.chunk_o", "chunk_bwd_dqkwg")
    d_c, d_b, _, d_sums = of_the_rest(v=v[None], h=h[None], **shared)
    d_v = _load("fla.ops.common.chunk_o", "chunk_bwd_dv")(**shared)
    return d_c[0], d_b[0], d_v[0], d_sums[0]
