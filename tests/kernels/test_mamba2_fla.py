"""fla-core's kernels in `mamba2`: our arguments against a double, and their results on a GPU."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.fla import FlaDouble
from helpers.layers import assert_isolated, assert_near, draw, pack, value_and_gradients
from helpers.mamba2 import NAMES, Shape
from nemocascade_kernels import PackedSeq, mamba2
from nemocascade_kernels.mamba2 import check, fla, fla_check, fla_kernels
from nemocascade_kernels.mamba2 import torch as torch_scan
from nemocascade_kernels.mamba2.arguments import Inputs, Sizes, States
from nemocascade_kernels.mamba2.op import Mixer
from nemocascade_kernels.testing import without_interpreter
from torch import Tensor

SHAPE = Shape(6, 5, 3, 7)
SIZES = Sizes(6, 5, 3, 7, SHAPE.dt_limit, 1e-5)
CPU = torch.device("cpu")


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> FlaDouble:
    found = FlaDouble()
    found.install(monkeypatch)
    return found


def mix(*tensors: Tensor, packed: PackedSeq, sizes: Sizes = SIZES) -> Tensor:
    out: Tensor = Mixer.apply(fla, packed, sizes, *tensors)
    return out


def of_nano(heads: int, groups: int) -> Sizes:
    return Sizes(heads, 64, groups, 128, (0.0, float("inf")), 1e-5)


def test_parts_are_equal_and_bound_memory() -> None:
    rows = 262_144
    cut = fla.parts(rows, of_nano(64, 8))
    assert [(p.heads, p.groups, p.opens) for p in cut[:2]] == [
        (slice(0, 16), slice(0, 2), True),
        (slice(16, 32), slice(2, 4), True),
    ]
    assert [i for p in cut for i in range(p.heads.start, p.heads.stop)] == list(range(64))
    assert len(fla.parts(8192, of_nano(64, 8))) == 1
    # A group's heads may be split: the parts after the first add to the gradients of B and C.
    split = fla.parts(rows, of_nano(64, 1))
    assert [p.opens for p in split] == [True, False, False, False]
    assert {p.groups for p in split} == {slice(0, 1)}
    # Eighteen heads of six groups: whole groups only.
    assert [p.heads for p in fla.parts(rows, of_nano(18, 6))][:2] == [slice(0, 9), slice(9, 18)]
    with pytest.raises(ValueError, match="use fewer rows, or another backend than fla"):
        fla.parts(2**25, of_nano(64, 8))


@pytest.mark.parametrize("most", [None, 7 * 2, 7])
def test_arguments_to_fla_mean_our_mixer(
    double: FlaDouble, monkeypatch: pytest.MonkeyPatch, most: int | None
) -> None:
    """At once, in parts of whole groups, and in parts of a group; with gates in several blocks."""
    packed = pack((1, 70, 64))
    if most is not None:
        monkeypatch.setattr(fla, "_PART_ELEMENTS", packed.total * most)
        monkeypatch.setattr(fla, "_LIMIT", packed.total * 7)
        monkeypatch.setattr(fla, "_GATE_ELEMENTS", 100 * SIZES.inner)
    inputs, upstream = SHAPE.inputs(packed.total), SHAPE.upstream(packed.total)
    theirs = value_and_gradients(lambda *i: mix(*i, packed=packed), inputs, upstream)
    ours = value_and_gradients(lambda *i: SHAPE.run(list(i), packed, "torch"), inputs, upstream)
    # Steps and decays are float32 there.
    assert_near(theirs, ours, 1e-5, NAMES)
    assert {6: 1, 2: 3, 1: 6}[double.heads[0]] == double.calls["gradients"]


def test_documents_are_isolated(double: FlaDouble) -> None:
    packed = pack((3, 66))
    rows, *rest = SHAPE.inputs(packed.total, torch.float32)
    assert_isolated(lambda z, packed: mix(z, *rest, packed=packed), [rows], packed)


def test_only_y_is_kept_for_backward(double: FlaDouble) -> None:
    packed = pack((100, 30))
    inputs = [t.requires_grad_() for t in SHAPE.inputs(packed.total, torch.bfloat16)]
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        out = mix(*inputs, packed=packed)
    own = [t for t in kept if not any(t is i for i in inputs)]
    assert [(tuple(t.shape), t.dtype) for t in own] == [((130, 6, 5), torch.bfloat16)]
    assert out.dtype == torch.bfloat16


def test_tables_are_made_once_on_the_host() -> None:
    packed = pack((1, 64, 65, 200))
    t = fla_kernels.tables(packed)
    assert t.cu_seqlens.tolist() == [0, 1, 65, 130, 330]
    assert t.offsets.tolist() == [0, 1, 2, 4, 8]
    assert t.indices.tolist() == [[0, 0], [1, 0], [2, 0], [2, 1], [3, 0], [3, 1], [3, 2], [3, 3]]
    assert fla_kernels.tables(packed) is t
    # Triton compiles other code for addresses that 16 does not divide.
    starts = [x.storage_offset() * x.element_size() for x in (t.cu_seqlens, t.offsets, t.indices)]
    assert [start % 16 for start in starts] == [0, 0, 0]
    assert all(x.is_contiguous() for x in (t.cu_seqlens, t.offsets, t.indices))
    with pytest.raises(ValueError, match=r"65536 chunks of 64 rows.*at most 65535"):
        fla_kernels.tables(pack((1,) * 65_536))


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
    # Steps and decays are float32 there.
    assert_near([out, state], [expected, final[1]], 1e-5, ["out", "ssm"])
    assert double.calls["outputs"]


def test_the_scan_alone_has_its_gradients(double: FlaDouble) -> None:
    """`scan_backward`, by fla's kernels in parts of the heads, and by torch's operators."""
    packed = pack((1, 2, 40, 33))
    mixed = draw(packed.total, SHAPE.channels).double()
    dt = draw(packed.total, SHAPE.heads, seed=1).double().exp()
    A, D = -draw(SHAPE.heads).double().exp(), draw(SHAPE.heads, seed=2).double()
    d_y = draw(packed.total, SHAPE.heads, SHAPE.head_dim, seed=3).double()
    found = []
    for module in (fla, torch_scan):
        y, kept = module.scan_forward(mixed, dt, A, D, packed, SIZES)
        found.append([y, *module.scan_backward(d_y, mixed, dt, A, D, kept, packed, SIZES)])
    assert_near(*found, 1e-5, ["y", "mixed", "dt", "A", "D"])
    assert double.calls["outputs"]


def test_a_version_without_an_argument_is_rejected(double: FlaDouble) -> None:
    fla_check.check_version()
    module: Any = sys.modules["fla.ops.common.chunk_h"]
    module.chunk_fwd_kernel_h.arg_names.remove("split_offsets")
    module = sys.modules["fla.ops.common.chunk_o"]
    del module.chunk_bwd_dv
    del sys.modules["fla.modules.causal_conv1d"]
    with pytest.raises(
        RuntimeError,
        match=r"no fla\.modules\.causal_conv1d, "
        r"split_offsets of fla\.ops\.common\.chunk_h\.chunk_fwd_kernel_h, "
        r"fla\.ops\.common\.chunk_o\.chunk_bwd_dv: install fla-core 0\.6 or newer",
    ):
        fla_check.check_version()


def test_a_wrong_kernel_is_rejected(double: FlaDouble) -> None:
    double.rounded = True

    def compare() -> None:
        check.check_shape("fla", CPU, SIZES, window=4, rows=150, dtype=torch.float32)

    compare()
    right = double.causal_conv1d_fwd
    module: Any = sys.modules["fla.modules.causal_conv1d"]
    module.causal_conv1d_fwd = lambda x, **k: right(x=x.roll(1, 1), **k)
    with pytest.raises(RuntimeError, match="its output differs from torch's"):
        compare()


def test_every_shape_of_a_run_is_checked() -> None:
    whole = of_nano(64, 8)
    assert fla_check.shapes(whole, 8192) == [whole]
    assert fla_check.shapes(whole, 262_144) == [whole, of_nano(16, 2)]
    assert fla_check.shapes(of_nano(64, 1), 262_144) == [of_nano(64, 1), of_nano(16, 1)]


def test_the_installed_fla_core_has_every_argument() -> None:
    """In a process of its own: fla-core cannot be imported where Triton interprets."""
    if importlib.util.find_spec("fla") is None:
        pytest.skip("fla-core is not installed")
    code = "from nemocascade_kernels.mamba2 import fla_check; fla_check.check_version()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=without_interpreter(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
