"""A double of fla-core: its functions' definitions, in float64 and chunk by chunk."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from nemocascade_kernels.mamba2 import fla_kernels, reference
from torch import Tensor

CHUNK = 64


class Kernel:
    """A Triton kernel that is started as `kernel[grid](**arguments)`."""

    def __init__(self, run: Callable[..., None], arguments: str) -> None:
        self.run, self.arg_names = run, arguments.split()

    def __getitem__(self, grid: Callable[[dict[str, int]], tuple[int, ...]]) -> Callable[..., None]:
        return lambda **arguments: self.run(grid({"BK": 16, "BV": 16}), **arguments)


class FlaDouble:
    """Functions and kernels with the names, arguments and layouts of fla-core 0.6.

    Every tensor but the convolution's rows must be contiguous. calls: the number of calls by name.
    keys: those by which fla-core's autotuner tells calls apart. heads: those of each scan.
    rounded: multiplies numbers of TF32's precision, as the kernels do.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.rounded = False
        self.heads: list[int] = []
        self.keys: set[tuple[Any, ...]] = set()

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Let fla-core's modules be this double's functions."""
        top = ModuleType("fla")
        patch.setitem(sys.modules, "fla", top)
        for module, functions in fla_kernels.NEEDED.items():
            found: Any = ModuleType(module)
            for name, arguments in functions.items():
                run = getattr(self, name)
                setattr(found, name, Kernel(run, arguments) if "kernel" in name else run)
            patch.setitem(sys.modules, module, found)
        utils: Any = ModuleType("fla.utils")
        utils.FLA_CACHE_RESULTS = True
        patch.setitem(sys.modules, "fla.utils", utils)

    # The convolution.

    def causal_conv1d_fwd(
        self, x: Tensor, weight: Tensor, bias: Tensor, residual: None, activation: str,
        cu_seqlens: Tensor, chunk_indices: Tensor,
    ) -> tuple[Tensor, None]:  # fmt: skip
        self.calls["convolution"] += 1
        self.keys.add(("convolution", *weight.shape, x.dtype))
        assert activation == "silu"
        assert residual is None
        self._check(cu_seqlens, chunk_indices, (weight, bias), x.shape[1])
        return self._convolve(x, weight, bias, cu_seqlens), None

    def causal_conv1d_bwd(
        self, x: Tensor, dy: Tensor, dht: None, weight: Tensor, bias: Tensor, activation: str,
        cu_seqlens: Tensor, chunk_indices: Tensor,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        self.calls["convolution backward"] += 1
        self.keys.add(("convolution backward", *weight.shape, x.dtype, dy.dtype))
        assert activation == "silu"
        assert dht is None
        self._check(cu_seqlens, chunk_indices, (weight, bias), x.shape[1])
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        with torch.enable_grad():
            y = self._convolve(leaves[0], leaves[1], leaves[2], cu_seqlens)
        return *torch.autograd.grad(y, leaves, dy), None, None

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor, cu_seqlens: Tensor) -> Tensor:
        before = x.new_zeros(weight.shape[1] - 1, x.shape[2])
        ends = cu_seqlens.tolist()
        out = [
            reference.convolution(x[0, a:b], weight, bias, before)
            for a, b in itertools.pairwise(ends)
        ]
        return torch.cat(out)[None]

    # The scan.

    def chunk_local_cumsum(
        self, g: Tensor, chunk_size: int, *, cu_seqlens: Tensor, chunk_indices: Tensor,
        reverse: bool = False, scale: float = 1.0,
    ) -> Tensor:  # fmt: skip
        assert chunk_size == CHUNK
        self.keys.add(("sums", *g.shape[2:], reverse, g.dtype))
        self._check(cu_seqlens, chunk_indices, (g,), g.shape[1])
        out = torch.empty_like(g)
        for _, rows in self._chunks(cu_seqlens, chunk_indices):
            part = g[0, rows]
            sums = part.flip(0).cumsum(0).flip(0) if reverse else part.cumsum(0)
            out[0, rows] = sums * scale
        return out

    def chunk_fwd_kernel_h(self, grid: tuple[int, ...], **a: Any) -> None:
        self.calls["states"] += 1
        self.heads.append(a["H"])
        self.keys.add(("states", a["K"], a["V"], a["k"].dtype, a["h"].dtype))
        assert grid == self._grid(a)
        assert a["h0"] is None
        assert a["ht"] is None
        self._check(a["cu_seqlens"], None, (a["k"], a["v"], a["g"], a["h"]), a["T"])
        k, v, g = self._exact(a["k"], a["v"], a["g"])
        for document, rows in self._documents(a["cu_seqlens"]):
            state = k.new_zeros(a["H"], a["K"], a["V"])
            for i, lo in enumerate(range(rows.start, rows.stop, CHUNK)):
                part = slice(lo, min(lo + CHUNK, rows.stop))
                a["h"][int(a["split_offsets"][document]) + i] = state
                state = self._leaving(k[part], v[part], g[part], state)

    def chunk_bwd_kernel_dh(self, grid: tuple[int, ...], **a: Any) -> None:
        self.calls["state gradients"] += 1
        self.keys.add(("state gradients", a["K"], a["V"], a["q"].dtype, a["do"].dtype))
        assert grid == self._grid(a)
        assert (a["dht"], a["dh0"], a["scale"], a["NG"], a["HQ"]) == (None, None, 1.0, 1, a["H"])
        self._check(a["cu_seqlens"], None, (a["q"], a["do"], a["g"], a["dh"]), a["T"])
        q, do, g = self._exact(a["q"], a["do"], a["g"])
        for document, rows in self._documents(a["cu_seqlens"]):
            d_state = q.new_zeros(a["H"], a["K"], a["V"])
            starts = list(enumerate(range(rows.start, rows.stop, CHUNK)))
            for i, lo in reversed(starts):
                part = slice(lo, min(lo + CHUNK, rows.stop))
                a["dh"][int(a["split_offsets"][document]) + i] = d_state
                kept = g[part][-1].exp()[:, None, None]
                read = torch.einsum("thk,thv,th->hkv", q[part], do[part], g[part].exp())
                d_state = kept * d_state + read

    def chunk_fwd_o(
        self, q: Tensor, k: Tensor, v: Tensor, h: Tensor, g: Tensor, scale: float, chunk_size: int,
        cu_seqlens: Tensor, chunk_indices: Tensor,
    ) -> Tensor:  # fmt: skip
        self.calls["outputs"] += 1
        self.keys.add(("outputs", *q.shape[2:], *v.shape[2:], q.dtype, v.dtype, h.dtype))
        assert (scale, chunk_size) == (1.0, CHUNK)
        self._check(cu_seqlens, chunk_indices, (q, k, v, h, g), q.shape[1])
        out = torch.empty_like(v)
        eq, ek, ev, eg = self._exact(q[0], k[0], v[0], g[0])
        for i, rows in self._chunks(cu_seqlens, chunk_indices):
            out[0, rows] = self._output(eq[rows], ek[rows], ev[rows], eg[rows], h[0, i].double())
        return out

    def chunk_bwd_dqkwg(
        self, q: Tensor, k: Tensor, v: Tensor, h: Tensor, g: Tensor, do: Tensor, dh: Tensor,
        scale: float, chunk_size: int, cu_seqlens: Tensor, chunk_indices: Tensor,
    ) -> tuple[Tensor, Tensor, None, Tensor]:  # fmt: skip
        self.calls["gradients"] += 1
        self.keys.add(("gradients", *q.shape[2:], *v.shape[2:], q.dtype, v.dtype, do.dtype))
        assert (scale, chunk_size) == (1.0, CHUNK)
        self._check(cu_seqlens, chunk_indices, (q, k, v, h, g, do, dh), q.shape[1])
        found = [torch.empty_like(t) for t in (q, k, g)]
        for rows, (dq, dk, _, dg) in self._gradients(
            q, k, v, h, g, do, dh, cu_seqlens, chunk_indices
        ):
            for target, value in zip(found, (dq, dk, dg), strict=True):
                target[0, rows] = value.to(target.dtype)
        return found[0], found[1], None, found[2]

    def chunk_bwd_dv(
        self, q: Tensor, k: Tensor, g: Tensor, do: Tensor, dh: Tensor, scale: float,
        chunk_size: int, cu_seqlens: Tensor, chunk_indices: Tensor,
    ) -> Tensor:  # fmt: skip
        assert (scale, chunk_size) == (1.0, CHUNK)
        self._check(cu_seqlens, chunk_indices, (q, k, g, do, dh), q.shape[1])
        dv, none = torch.empty_like(do), torch.zeros_like(dh)
        # The gradient of v depends neither on v nor on the entering states.
        for rows, found in self._gradients(q, k, do, none, g, do, dh, cu_seqlens, chunk_indices):
            dv[0, rows] = found[2].to(dv.dtype)
        return dv

    def _gradients(
        self, q: Tensor, k: Tensor, v: Tensor, h: Tensor, g: Tensor, do: Tensor, dh: Tensor,
        cu_seqlens: Tensor, chunk_indices: Tensor,
    ) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:  # fmt: skip
        """Gradients of q, k, v and g of every chunk, by its output and the state that leaves it."""
        exact = self._exact(q[0], k[0], v[0], g[0])
        for i, rows in self._chunks(cu_seqlens, chunk_indices):
            leaves = [t[rows].detach().clone().requires_grad_() for t in exact]
            lq, lk, lv, lg = leaves
            with torch.enable_grad():
                out = self._output(lq, lk, lv, lg, h[0, i].double())
                state = self._leaving(self._expand(lk, lv), lv, lg, h[0, i].double())
            upstream = [do[0, rows].double(), dh[0, i].double()]
            yield rows, torch.autograd.grad([out, state], leaves, upstream)

    def _expand(self, b: Tensor, v: Tensor) -> Tensor:
        return b.repeat_interleave(v.shape[1] // b.shape[1], 1)

    def _output(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        q, k = self._expand(q, v), self._expand(k, v)
        decays = (g[:, None] - g[None]).exp() * torch.ones(len(g), len(g)).tril()[..., None]
        inside = torch.einsum("thk,shk,tsh,shv->thv", q, k, decays, v)
        return inside + torch.einsum("thk,hkv,th->thv", q, h, g.exp())

    def _leaving(self, k: Tensor, v: Tensor, g: Tensor, h: Tensor) -> Tensor:
        left = (g[-1] - g).exp()
        return g[-1].exp()[:, None, None] * h + torch.einsum("thk,thv,th->hkv", k, v, left)

    def _exact(self, *tensors: Tensor) -> list[Tensor]:
        """In float64; the last one, the sums of decays, from base 2."""
        found = [t.double() for t in tensors]
        if self.rounded:
            found[:-1] = [t.half().double() for t in found[:-1]]
        found[-1] = found[-1] * math.log(2)
        return found

    def _documents(self, cu_seqlens: Tensor) -> Iterator[tuple[int, slice]]:
        ends = cu_seqlens.tolist()
        for document, (a, b) in enumerate(itertools.pairwise(ends)):
            yield document, slice(a, b)

    def _chunks(self, cu_seqlens: Tensor, indices: Tensor) -> Iterator[tuple[int, slice]]:
        """Index and rows of each chunk, as the kernels find them."""
        documents = dict(self._documents(cu_seqlens))
        for i, (document, chunk) in enumerate(indices.tolist()):
            rows = documents[document]
            lo = rows.start + chunk * CHUNK
            assert lo < rows.stop
            yield i, slice(lo, min(lo + CHUNK, rows.stop))

    def _grid(self, a: dict[str, Any]) -> tuple[int, ...]:
        documents = len(a["cu_seqlens"]) - 1
        return (math.ceil(a["K"] / 16) * math.ceil(a["V"] / 16) * documents * a["H"],)

    def _check(
        self,
        cu_seqlens: Tensor,
        indices: Tensor | None,
        tensors: tuple[Tensor, ...],
        rows: int,
    ) -> None:
        assert all(t.is_contiguous() for t in tensors)
        assert cu_seqlens.dtype == torch.int64
        assert int(cu_seqlens[-1]) == rows
        assert indices is None or indices.shape[1] == 2
