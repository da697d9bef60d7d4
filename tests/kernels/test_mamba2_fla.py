"""fla-core's kernels in `mamba2`: their agreement with ours (on a GPU), and the split of calls."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.layers import LENGTHS, assert_near, pack, value_and_gradients
from helpers.mamba2 import NAMES, Shape
from nemocascade_kernels import PackedSeq, mamba2
from nemocascade_kernels.mamba2 import fla, reference
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States
from torch import Tensor

SHAPE = Shape(6, 5, 3, 7)
SIZES = Sizes(6, 5, 3, 7, SHAPE.dt_limit, 1e-5)


def test_calls_stay_below_two_to_the_31() -> None:
    rows, heads, width = 262_144, 64, 128  # exactly 2^31 elements
    cut = fla.parts(rows, heads, width)
    assert len(cut) == 2
    assert [i for part in cut for i in range(part.start, part.stop)] == list(range(heads))
    assert all(rows * (part.stop - part.start) * width < 2**31 for part in cut)
    assert fla.parts(8192, heads, width) == [slice(0, heads)]
    with pytest.raises(ValueError, match="use fewer rows, or another backend than fla"):
        fla.parts(2**20, 1, 2**11)


class FlaDouble:
    """Takes what fla-core's functions take, and computes their definitions with our reference.

    rounded: multiplies numbers of TF32's precision, as the kernels do.
    """

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.rounded = False

    def chunk_simple_gla(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, *, scale: float, cu_seqlens: Tensor
    ) -> tuple[Tensor, None]:
        """`o_t = q_t S_t`, `S_t = exp(g_t) S_{t-1} + k_t v_t^T`, per head."""
        self.calls.append("scan")
        assert scale == 1.0
        assert cu_seqlens.dtype == torch.int64
        q, k, v, g = (t[0].to(torch.float64) for t in (q, k, v, g))
        if self.rounded:
            q, k, v = (t + (t.half().double() - t).detach() for t in (q, k, v))
        out = []
        for rows in PackedSeq.from_cu_seqlens(cu_seqlens).documents():
            state = v.new_zeros(v.shape[1], v.shape[2], k.shape[2])
            for t in range(rows.start, rows.stop):
                state = g[t].exp()[:, None, None] * state + v[t, :, :, None] * k[t, :, None, :]
                out.append((state * q[t, :, None, :]).sum(2))
        return torch.stack(out)[None].to(v.dtype), None

    def causal_conv1d(
        self, x: Tensor, weight: Tensor, bias: Tensor, *, activation: str, cu_seqlens: Tensor
    ) -> tuple[Tensor, None]:
        self.calls.append("convolution")
        assert activation == "silu"
        before = x.new_zeros(weight.shape[1] - 1, x.shape[2])
        rows = PackedSeq.from_cu_seqlens(cu_seqlens).documents()
        out = [reference.convolution(x[0, here], weight, bias, before) for here in rows]
        return torch.cat(out)[None], None


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> FlaDouble:
    found = FlaDouble()
    ops: Any = ModuleType("fla.ops.simple_gla")
    ops.chunk_simple_gla = lambda q, *a, **k: (
        found.chunk_simple_gla(q, *a, **k)[0].to(q.dtype),
        None,
    )
    conv: Any = ModuleType("fla.modules.causal_conv1d")
    conv.causal_conv1d = found.causal_conv1d
    for module in (ModuleType("fla"), ModuleType("fla.ops"), ModuleType("fla.modules"), ops, conv):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return found


def test_arguments_to_fla_mean_our_mixer(
    double: FlaDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = pack(LENGTHS)
    # So small that every call is cut in several.
    monkeypatch.setattr(fla, "_LIMIT", packed.total * 7 * 2 + 1)
    inputs, upstream = SHAPE.inputs(packed.total), SHAPE.upstream(packed.total)
    theirs = value_and_gradients(
        lambda *i: fla.forward(Inputs(*i), packed, SIZES), inputs, upstream
    )
    ours = value_and_gradients(lambda *i: SHAPE.run(list(i), packed, "torch"), inputs, upstream)
    # Steps and decays are float32 there.
    assert_near(theirs, ours, 1e-5, NAMES)
    assert double.calls == ["convolution"] * 6 + ["scan"] * 3


@pytest.mark.parametrize("continues", [False, True])
def test_states_beside_fla(double: FlaDouble, continues: bool) -> None:
    packed = pack((1, 2, 40, 33))
    inputs = Inputs(*SHAPE.inputs(packed.total))
    initial = None
    if continues:
        generator = torch.Generator().manual_seed(1)
        conv = torch.randn(4, 3, SHAPE.channels, generator=generator, dtype=torch.float64)
        ssm = torch.randn(4, 6, 5, 7, generator=generator, dtype=torch.float64)
        initial = States(conv, ssm)
    expected, final = mamba2(
        *inputs, packed, **SHAPE.settings,
        initial_state=initial, return_final_state=True, backend="reference",
    )  # fmt: skip
    assert final is not None
    out, state = fla.forward_with_states(inputs, packed, SIZES, initial)
    assert_near([out, state], [expected, final[1]], 1e-6, ["out", "ssm"])
    assert "scan" in double.calls


def test_self_check_refuses_a_wrong_kernel(double: FlaDouble) -> None:
    double.rounded = True
    fla.self_check(torch.device("cpu"))
    right = double.causal_conv1d
    conv: Any = sys.modules["fla.modules.causal_conv1d"]
    conv.causal_conv1d = lambda x, *a, **k: (right(x.roll(1, 1), *a, **k)[0], None)
    with pytest.raises(RuntimeError, match="its output differs from torch's"):
        fla.self_check(torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-2), (torch.bfloat16, 3e-2)])
def test_fla_on_a_gpu(dtype: torch.dtype, tolerance: float) -> None:
    pytest.importorskip("fla")
    packed = PackedSeq.from_cu_seqlens([0, 1, 70, 200, 203, 700], "cuda")
    inputs = [
        t.to("cuda", dtype if i in (0, 1, 2, 6) else torch.float32)
        for i, t in enumerate(SHAPE.inputs(packed.total))
    ]
    upstream = SHAPE.upstream(packed.total).cuda()
    theirs, ours = (
        value_and_gradients(lambda *i, b=b: SHAPE.run(list(i), packed, b), inputs, upstream)
        for b in ("fla", "torch")
    )
    # In bfloat16 fla rounds between its steps: in emulation the gradient of A errs by 7.5e-2.
    looser = 0.15 if dtype == torch.bfloat16 else tolerance
    for name, a, b in zip(NAMES, theirs, ours, strict=True):
        rounded = name in ("conv_weight", "dt_bias", "A")
        assert_near([a], [b], looser if rounded else tolerance, [name])
