"""Triton's kernels of `mamba2`, in the interpreter: chunks of 32 rows in tiles of 16."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.layers import (
    assert_near,
    documents,
    draw,
    kept_for_backward,
    pack,
    value_and_gradients,
)
from helpers.mamba2 import NAMES, Shape
from nemocascade_kernels import PackedSeq, mamba2, mamba2_final_state
from nemocascade_kernels.backends import BackendUnavailableError, interpreting
from nemocascade_kernels.mamba2.op import OP
from nemocascade_kernels.testing import PoisonedMemory
from torch import Tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(not interpreting(), reason="a GPU has chunks of other sizes")

SHAPE = Shape(4, 16, 2, 32, 4, (0.05, 0.9))
#: One token; less than a tile; a tile; one row more than a chunk; several chunks.
LENGTHS = (1, 5, 16, 33, 70)


def of(
    inputs: Sequence[Tensor], upstream: Tensor, packed: PackedSeq, shape: Shape, backend: str
) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    with PoisonedMemory():
        return value_and_gradients(lambda *i: shape.run(list(i), packed, backend), inputs, upstream)


@functools.cache
def exact_of(shape: Shape, lengths: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """The reference in float64, of the numbers that `dtype` holds."""
    packed = pack(lengths)
    inputs = [t.to(dtype).double() for t in shape.inputs(packed.total)]
    return of(inputs, shape.upstream(packed.total), packed, shape, "reference")


@pytest.mark.parametrize(
    ("shape", "lengths", "dtype", "tolerance"),
    [
        (SHAPE, LENGTHS, torch.float32, 1e-5),
        (Shape(2, 32, 1, 16, 1), (18, 40), torch.float32, 1e-5),
        (Shape(3, 16, 3, 16, 7), (9, 35), torch.float32, 1e-5),
        # The interpreter cuts off where hardware rounds.
        (SHAPE, (3, 34), torch.bfloat16, 4e-2),
        (SHAPE, (3, 34), torch.float16, 3e-3),
    ],
)
def test_equals_the_recurrence(
    shape: Shape, lengths: tuple[int, ...], dtype: torch.dtype, tolerance: float
) -> None:
    packed = pack(lengths)
    inputs = shape.inputs(packed.total, dtype)
    ours = of(inputs, shape.upstream(packed.total), packed, shape, "triton")
    assert_near(ours, exact_of(shape, lengths, dtype), tolerance, NAMES)
    assert [t.dtype for t in ours] == [dtype] * len(NAMES)


class _Unprojected(torch.nn.Module):
    """transformers' mixer of Nemotron-H between its projections, in float64 where it allows."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
        from transformers import NemotronHConfig

        config = NemotronHConfig(
            hidden_size=shape.inner, mamba_num_heads=shape.heads, mamba_head_dim=shape.head_dim,
            n_groups=shape.groups, ssm_state_size=shape.state, conv_kernel=shape.window,
            chunk_size=16, layer_norm_epsilon=1e-5, layers_block_type=["mamba"],
        )  # fmt: skip
        self.mixer: Any = modeling.NemotronHMamba2Mixer(config, layer_idx=0).double().eval()
        self.mixer.in_proj = self.mixer.out_proj = torch.nn.Identity()
        self.mixer.time_step_limit = shape.dt_limit

    def run(self, inputs: Sequence[Tensor], packed: PackedSeq) -> Tensor:
        """The output [T, h p] of documents one after the other; arguments of `mamba2`."""
        rows, weight, *rest = inputs
        names = ("conv1d.bias", "dt_bias", "A_log", "D", "norm.weight")
        bias, dt_bias, a, d, norm = rest
        values = (bias, dt_bias, (-a).log(), d, norm)
        own = {"conv1d.weight": weight[:, None], **dict(zip(names, values, strict=True))}
        parts = [
            torch.func.functional_call(self.mixer, own, (rows[document][None],))[0]
            for document in documents(packed)
        ]
        return torch.cat(parts)


def test_equals_the_mixer_of_transformers() -> None:
    """Documents of one token, of odd lengths, and over many chunks."""
    shape, packed = Shape(2, 16, 1, 16, 4, (0.05, math.inf)), pack((1, 21, 99))
    inputs, upstream = shape.inputs(packed.total), shape.upstream(packed.total)
    theirs = _Unprojected(shape)
    expected = value_and_gradients(lambda *i: theirs.run(i, packed), inputs, upstream)
    ours = of([t.float() for t in inputs], upstream, packed, shape, "triton")
    assert_near(ours, expected, 1e-5, NAMES)


@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_keeps_every_decay(scale: float) -> None:
    """From no decay to one that clears the state at once, and both in one chunk; SiLU and softplus
    where they saturate. Parameters of heads with slow decays are compared on their own."""
    packed, shape = pack((50,)), Shape(4, 16, 2, 16)
    inputs = shape.inputs(packed.total)
    inputs[0] = (inputs[0] * scale).float().double()
    inputs[0][:, -shape.heads :] = 1.0
    inputs[0][::3, -shape.heads :] = -8.0
    inputs[4] = torch.tensor([-1e-6, -5.0, -200.0, -1e4]).double()
    upstream = shape.upstream(packed.total)
    ours = of([t.float() for t in inputs], upstream, packed, shape, "triton")
    assert_near(ours, of(inputs, upstream, packed, shape, "reference"), 1e-5, NAMES)


@pytest.mark.parametrize(
    ("chosen", "final"), [(None, True), ((1, 3), True), ((0,), False), ((), True)]
)
def test_states_and_their_gradients(chosen: tuple[int, ...] | None, final: bool) -> None:
    shape, packed = Shape(2, 16, 1, 16, 4, (0.05, 0.9)), pack((2, 67, 1, 33))
    places = range(packed.num_documents) if chosen is None else chosen
    conv = draw(len(places), shape.window - 1, shape.channels).double()
    ssm = draw(len(places), shape.heads, shape.head_dim, shape.state).double()
    states = [conv, ssm] if chosen != () else []
    inputs = [*shape.inputs(packed.total), *states]

    def run(backend: str, *tensors: Tensor) -> Tensor:
        out, found = mamba2(
            *tensors[:7], packed, **shape.settings,
            initial_state=(tensors[7], tensors[8]) if states else None,
            state_documents=chosen if states else None,
            return_final_state=final, backend=backend,
        )  # fmt: skip
        assert (found is not None) == final
        parts = [out, *(found or ())]
        return torch.cat([t.flatten().to(out.dtype) for t in parts])

    expected = value_and_gradients(
        functools.partial(run, "reference"), inputs, upstream := draw(_size(shape, packed, final))
    )
    with PoisonedMemory():
        found = value_and_gradients(
            functools.partial(run, "triton"), [t.float() for t in inputs], upstream
        )
    assert_near(found, expected, 2e-6, [*NAMES, "conv", "ssm"][: len(found)])


def _size(shape: Shape, packed: PackedSeq, final: bool) -> int:
    """Elements of the output and, if `final`, of the final states."""
    state = (shape.window - 1) * shape.channels + shape.inner * shape.state
    return packed.total * shape.inner + (packed.num_documents * state if final else 0)


def test_a_gradient_of_the_final_state_alone() -> None:
    """One that is a view of another order too."""
    shape, packed = Shape(2, 16, 1, 16), pack((20,))
    inputs = shape.inputs(packed.total)

    def run(backend: str, *tensors: Tensor) -> Tensor:
        final = mamba2(
            *tensors, packed, **shape.settings, return_final_state=True, backend=backend
        )[1]
        assert final is not None
        return final[1].transpose(2, 3).flatten() + (tensors[5].sum() + tensors[6].sum()) * 0

    upstream = draw(shape.inner * shape.state)
    expected = value_and_gradients(functools.partial(run, "reference"), inputs, upstream)
    found = value_and_gradients(
        functools.partial(run, "triton"), [t.float() for t in inputs], upstream
    )
    kept = [k for k in range(len(found)) if k not in (6, 7)]
    assert_near(
        [found[k] for k in kept], [expected[k] for k in kept], 2e-6, [NAMES[k] for k in kept]
    )


@pytest.mark.parametrize("continues", [False, True])
def test_the_state_and_its_decay_alone(continues: bool) -> None:
    """The two that context parallelism passes on, with their gradients."""
    shape, packed = Shape(2, 16, 1, 16, 4, (0.05, 0.9)), pack((2, 67, 1))
    inputs = shape.inputs(packed.total)[:5]
    if continues:
        inputs.append(draw(3, shape.window - 1, shape.channels).double())

    def run(backend: str, *tensors: Tensor) -> Tensor:
        state, decay = mamba2_final_state(
            *tensors[:5], packed, **shape.settings, backend=backend,
            initial_conv=tensors[5] if continues else None,
        )  # fmt: skip
        return torch.cat([state.flatten(), decay.flatten()])

    upstream = draw(packed.num_documents * (shape.inner * shape.state + shape.heads))
    expected = value_and_gradients(functools.partial(run, "torch"), inputs, upstream)
    with PoisonedMemory():
        found = value_and_gradients(
            functools.partial(run, "triton"), [t.float() for t in inputs], upstream
        )
    assert_near(found, expected, 2e-6, [*NAMES[:6], "conv"][: len(found)])


def test_documents_are_isolated() -> None:
    """NaN in a document, or infinity at its end, changes no bit of the others."""
    shape, packed = Shape(2, 16, 1, 16), pack((19, 34, 3))
    rows, *rest = shape.inputs(packed.total, torch.float32)
    upstream = shape.upstream(packed.total)

    def run(zxbcdt: Tensor) -> list[Tensor]:
        def mixed(z: Tensor) -> Tensor:
            return shape.run([z, *rest], packed, "triton")

        return value_and_gradients(mixed, [zxbcdt], upstream)

    before, middle = run(rows), documents(packed)[1]
    for row, value in ((middle.start, float("nan")), (middle.stop - 1, float("inf"))):
        changed = rows.clone()
        changed[row] = value
        for a, b in zip(before, run(changed), strict=True):
            assert torch.equal(a[: middle.start], b[: middle.start])
            assert torch.equal(a[middle.stop :], b[middle.stop :])
            assert not torch.equal(a[middle], b[middle])


def test_rows_are_read_where_they_are() -> None:
    """Strided rows, of which the last lie beyond 2^31 elements; results have the same bits."""
    shape, packed = Shape(2, 16, 1, 16), pack((18, 3))
    dense, *rest = shape.inputs(packed.total, torch.float32)
    gap = 2**31 // (packed.total - 2)
    apart = torch.empty(packed.total * gap).as_strided(dense.shape, (gap, 1))
    apart.copy_(dense)
    assert (packed.total - 1) * gap > 2**31
    expected = shape.run([dense, *rest], packed, "triton")
    assert torch.equal(shape.run([apart, *rest], packed, "triton"), expected)


def test_only_the_inputs_are_kept_for_backward() -> None:
    shape, packed = Shape(2, 16, 1, 16), pack((20,))
    inputs = [t.requires_grad_() for t in shape.inputs(packed.total, torch.float32)]
    kept = kept_for_backward(lambda: shape.run(inputs, packed, "triton"))
    assert len(kept) == len(inputs)
    assert all(any(t is i for i in inputs) for t in kept)


def test_sizes_that_are_not_powers_of_two_are_rejected() -> None:
    inputs = (shape := Shape(2, 24, 1, 16)).inputs(3, torch.float32)
    with pytest.raises(
        BackendUnavailableError, match="head_dim 24 and state 16 must be powers of two from 16"
    ):
        shape.run(inputs, pack((3,)), "triton")
    rows = torch.zeros(1, 1)
    assert OP.limitation(rows, torch.zeros(0, 2, 64, 128), backend="triton") is None
    for p, n in ((8, 16), (16, 8), (128, 128), (256, 16), (16, 512)):
        assert OP.limitation(rows, torch.zeros(0, 2, p, n), backend="triton") is not None
    assert "float64" in str(OP.limitation(rows.double(), backend="triton"))


def test_tables_are_made_once_on_the_host() -> None:
    from nemocascade_kernels.mamba2.triton_launch import tables

    packed = pack((1, 40))
    t = tables(packed, 16, 32)
    assert tables(packed, 16, 32) is t
    # Row; chunk's start, end, number; document, its start and end.
    assert t.chunks[:, :7].tolist() == [
        [0, 0, 1, 0, 0, 0, 1], [1, 1, 33, 1, 1, 1, 41], [33, 33, 41, 2, 1, 1, 41]
    ]  # fmt: skip
    assert t.tiles[:, 0].tolist() == [0, 1, 17, 33]
    assert t.tiles[:, 3].tolist() == [0, 1, 1, 2]
    assert t.offsets.tolist() == [0, 1, 3]
    assert {x.dtype for x in t} == {torch.int32}
