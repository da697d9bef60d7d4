"""fla-core's kernels in the mixer: their agreement with ours (on a GPU), and the cut of calls."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.layers import LENGTHS, assert_near, draw, pack, value_and_gradients
from torch import Tensor

from nemocascade.megatron.layers import fla
from nemocascade.megatron.layers.conv import packed_causal_conv1d
from nemocascade.megatron.layers.fla import (
    fla_causal_conv1d,
    fla_ssd_scan,
    parts,
    self_check,
)
from nemocascade.megatron.layers.packing import PackedSeq
from nemocascade.megatron.layers.ssm import packed_ssd_scan


def test_calls_stay_below_two_to_the_31() -> None:
    rows, heads, width = 262_144, 64, 128  # exactly 2^31 elements
    cut = parts(rows, heads, width)
    assert len(cut) == 2
    assert [i for part in cut for i in range(part.start, part.stop)] == list(range(heads))
    assert all(rows * (part.stop - part.start) * width < 2**31 for part in cut)
    assert parts(8192, heads, width) == [slice(0, heads)]
    with pytest.raises(ValueError, match=r"--engine\.fla off"):
        parts(2**20, 1, 2**11)


class FlaDouble:
    """Takes what fla-core's functions take, and computes their definitions with our own code."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def chunk_simple_gla(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, cu_seqlens: Tensor
    ) -> tuple[Tensor, None]:
        """`o_t = q_t S_t`, `S_t = exp(g_t) S_{t-1} + k_t v_t^T`, per head."""
        self.calls.append("scan")
        assert scale == 1.0
        assert cu_seqlens.dtype == torch.int64
        packed = PackedSeq.from_cu_seqlens(cu_seqlens)
        # Our scan with A = -1 and dt = -g has these decays; it multiplies x by dt.
        dt, minus = -g[0].to(v.dtype), -torch.ones(v.shape[2], dtype=v.dtype)
        x = v[0] / dt.unsqueeze(-1)
        return packed_ssd_scan(x, dt, minus, k[0], q[0], 0 * minus, packed)[None], None

    def causal_conv1d(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, activation: str, cu_seqlens: Tensor
    ) -> tuple[Tensor, None]:
        self.calls.append("convolution")
        assert activation == "silu"
        packed = PackedSeq.from_cu_seqlens(cu_seqlens)
        return packed_causal_conv1d(x[0], weight, bias, packed)[None], None


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> FlaDouble:
    found = FlaDouble()
    ops: Any = ModuleType("fla.ops.simple_gla")
    ops.chunk_simple_gla = found.chunk_simple_gla
    conv: Any = ModuleType("fla.modules.causal_conv1d")
    conv.causal_conv1d = found.causal_conv1d
    for module in (ModuleType("fla"), ModuleType("fla.ops"), ModuleType("fla.modules"), ops, conv):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def scan_inputs(rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [
        t.to(dtype)
        for t in (
            draw(rows, 6, 5),
            F.softplus(draw(rows, 6)),
            -draw(6).exp(),
            draw(rows, 3, 7, seed=1),
            draw(rows, 3, 7, seed=2),
            draw(6, seed=1),
        )
    ]


def test_arguments_to_fla_mean_our_scan_and_convolution(
    double: FlaDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(LENGTHS)
    # So small that every call is cut in several.
    monkeypatch.setattr(fla, "_LIMIT", packed.total * 7 * 2 + 1)
    inputs = scan_inputs(packed.total)
    upstream = draw(packed.total, 6, 5, seed=9)
    theirs = value_and_gradients(lambda *i: fla_ssd_scan(*i, packed), inputs, upstream)
    ours = value_and_gradients(lambda *i: packed_ssd_scan(*i, packed), inputs, upstream)
    assert_near(theirs, ours, 1e-6, ["y", "dx", "d_dt", "dA", "dB", "dC", "dD"])
    assert double.calls == ["scan"] * 3

    conv = [draw(packed.total, 40), draw(40, 4), draw(40)]
    torch.testing.assert_close(
        fla_causal_conv1d(*conv, packed), packed_causal_conv1d(*conv, packed)
    )
    assert double.calls[3:] == ["convolution"] * 3


def test_self_check_refuses_a_wrong_kernel(
    double: FlaDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    self_check(torch.device("cpu"))
    right = double.causal_conv1d
    conv: Any = sys.modules["fla.modules.causal_conv1d"]
    conv.causal_conv1d = lambda x, *a, **k: (right(x.roll(1, 1), *a, **k)[0], None)
    with pytest.raises(RuntimeError, match="its convolution differs from ours"):
        self_check(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
def test_fla_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("fla")
    packed = PackedSeq.from_cu_seqlens([0, 1, 70, 200, 203, 700], "cuda")
    inputs = [
        t.to("cuda", dtype if i in (0, 3, 4) else torch.float32)
        for i, t in enumerate(scan_inputs(packed.total))
    ]
    upstream = draw(packed.total, 6, 5, seed=9).cuda()
    theirs = value_and_gradients(lambda *i: fla_ssd_scan(*i, packed), inputs, upstream)
    ours = value_and_gradients(lambda *i: packed_ssd_scan(*i, packed), inputs, upstream)
    assert_near(theirs, ours, tolerance, ["y", "dx", "d_dt", "dA", "dB", "dC", "dD"])
    conv = [t.to("cuda", dtype) for t in (draw(packed.total, 40), draw(40, 4), draw(40))]
    upstream = draw(packed.total, 40, seed=9).cuda()
    theirs = value_and_gradients(lambda *i: fla_causal_conv1d(*i, packed), conv, upstream)
    ours = value_and_gradients(lambda *i: packed_causal_conv1d(*i, packed), conv, upstream)
    assert_near(theirs, ours, tolerance, ["y", "dx", "dw", "db"])
