"""The fused decode operators in Triton against their definitions in float64, in poisoned memory."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.heads import skip_unless_served
from helpers.pairs import pairwise
from nemocascade_kernels import (
    MambaWeights,
    RoutedRows,
    RouterSettings,
    SampleSettings,
    SharedExpert,
    Steps,
    decode_steps,
)
from nemocascade_kernels.decode_step.op import OP
from nemocascade_kernels.testing import (
    PoisonedMemory,
    kernel_device,
    random_integers,
    random_normal,
)
from torch import Tensor

DEVICE = kernel_device()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# float32 is summed in another order, or by three products of tf32; the others are rounded.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
SETTINGS = {
    "sigmoid": RouterSettings(3, "sigmoid", 1, 1, True, 1.7),
    "softmax": RouterSettings(1, "softmax", 1, 1, False, 1.0),
    "groups": RouterSettings(4, "sigmoid", 4, 2, True, 2.5),
}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    skip_unless_served(OP, "triton", request.param)
    found: torch.dtype = request.param
    return found


@pytest.fixture(scope="module")
def steps() -> Steps:
    skip_unless_served(OP, "triton", torch.float32)
    return decode_steps(torch.empty(0, device=DEVICE), backend="triton")


EXACT = decode_steps(torch.empty(0), backend="reference")


def normal(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    return random_normal(*shape, seed=seed, dtype=dtype, device=DEVICE, scale=scale)


def exactly(tensor: Tensor) -> Tensor:
    return tensor.double().cpu()


def assert_close(actual: Tensor, exact: Tensor, tolerance: float) -> None:
    error = float((exactly(actual) - exact).abs().max() / exact.abs().max().clamp(min=1e-9))
    assert error < tolerance, f"off by {error:.1e} of the largest value"


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 37), (5, 128)])
def test_norm_and_linear(steps: Steps, dtype: torch.dtype, rows: int, width: int) -> None:
    """Rows may be apart; a residual's memory holds the sum."""
    x = normal(rows, 2 * width, seed=1, dtype=dtype)[:, :width]
    weight = normal(width, seed=2, dtype=dtype)
    with PoisonedMemory():
        found = steps.norm(x, weight, 1e-3)
    assert_close(found, EXACT.norm(exactly(x), exactly(weight), 1e-3), TOLERANCES[dtype])
    matrix = normal(19, width, seed=3, dtype=dtype)
    residual = normal(rows, 19, seed=4, dtype=dtype)
    exact = EXACT.linear(exactly(x), exactly(matrix), exactly(residual))
    found = steps.linear(x, matrix, residual)
    assert found is residual
    assert_close(found, exact, TOLERANCES[dtype])


@pytest.mark.parametrize(
    ("heads", "head_dim", "groups", "state", "taps"),
    [(6, 12, 2, 10, 4), (3, 5, 3, 17, 2), (4, 1, 1, 3, 3), (8, 32, 2, 32, 4)],
)
def test_mamba(
    steps: Steps, dtype: torch.dtype, heads: int, head_dim: int, groups: int, state: int, taps: int
) -> None:
    """Output and states; slots that no row names keep every bit; a row has its own bits."""
    inner, rows, count = heads * head_dim, 3, 6
    channels = inner + 2 * groups * state
    weights = MambaWeights(
        conv_weight=normal(channels, taps, seed=11, dtype=dtype),
        conv_bias=normal(channels, seed=12, dtype=dtype),
        dt_bias=normal(heads, seed=13, dtype=torch.float32),
        A=-normal(heads, seed=14, dtype=torch.float32).abs(),
        D=normal(heads, seed=15, dtype=torch.float32),
        norm_weight=normal(inner, seed=16, dtype=dtype),
        groups=groups,
        dt_limit=(0.0, 2.0),
        eps=1e-5,
    )
    in_double = {k: exactly(v) if isinstance(v, Tensor) else v for k, v in vars(weights).items()}
    width = inner + channels + heads
    inputs = normal(rows, width + 5, seed=17, dtype=dtype)
    # Far beyond what exponentials of a few bits can hold.
    inputs[0] *= 40
    inputs = inputs[:, :width]
    conv = normal(count, taps - 1, channels, seed=18, dtype=dtype)
    ssm = normal(count, heads, head_dim, state, seed=19, dtype=torch.float32)
    slots = torch.tensor([4, 0, 3], device=DEVICE)
    exact_conv, exact_ssm = exactly(conv), exactly(ssm)
    exact = EXACT.mamba(
        exactly(inputs), exact_conv, exact_ssm, slots.cpu(), MambaWeights(**in_double)
    )
    before = conv.clone(), ssm.clone()
    with PoisonedMemory():
        out = steps.mamba(inputs, conv, ssm, slots, weights)
    assert out.dtype == dtype
    assert_close(out, exact, TOLERANCES[dtype])
    # The convolution's inputs are moved, not computed.
    assert torch.equal(exactly(conv), exact_conv)
    assert_close(ssm, exact_ssm, 1e-6)
    others = [1, 2, 5]
    assert torch.equal(conv[others], before[0][others])
    assert torch.equal(ssm[others], before[1][others])
    for row in range(rows):
        states = before[0].clone(), before[1].clone()
        alone = steps.mamba(inputs[row : row + 1], *states, slots[row : row + 1], weights)
        assert torch.equal(alone[0], out[row])
        assert torch.equal(states[1][slots[row]], ssm[slots[row]])


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (19, 50)])
def test_norm_and_route(steps: Steps, dtype: torch.dtype, name: str, rows: int, width: int) -> None:
    """In one buffer; rows of the spare slot have no expert; any shape of the experts."""
    settings, count = SETTINGS[name], 20
    hidden = normal(rows, width, seed=21, dtype=dtype)
    scale, router = (normal(*s, seed=22, dtype=dtype) for s in ((width,), (count, width)))
    bias = None if name == "softmax" else normal(count, seed=23, dtype=torch.float32)
    slots = torch.arange(rows, device=DEVICE)
    slots[rows // 2 :: 3] = 99
    with PoisonedMemory():
        found = steps.norm_route(hidden, scale, 1e-3, router, bias, slots, 99, settings)
    assert_close(found.x, EXACT.norm(exactly(hidden), exactly(scale), 1e-3), TOLERANCES[dtype])
    # The product's inputs are the rounded rows.
    logits = exactly(found.x) @ exactly(router).t()
    exact_bias = None if bias is None else exactly(bias)
    chosen, weights = EXACT.route(logits, exact_bias, rows, settings)
    spare = slots.cpu() == 99
    assert torch.equal(found.chosen.cpu()[~spare], chosen[~spare])
    torch.testing.assert_close(
        exactly(found.weights)[~spare], weights[~spare], rtol=1e-5, atol=1e-6
    )
    assert (found.chosen.cpu()[spare] == count).all()
    assert (found.weights.cpu()[spare] == 0).all()
    again = steps.norm_route(hidden, scale, 1e-3, router, bias, None, 99, settings)
    assert torch.equal(again.chosen.cpu(), chosen)
    for row in range(0, rows, 7):
        part = hidden[row : row + 1]
        alone = steps.norm_route(part, scale, 1e-3, router, bias, None, 99, settings)
        assert torch.equal(alone.chosen[0], again.chosen[row])
        # The interpreter multiplies by BLAS: last bits may depend on a row's place in a tile.
        limit = 0.0 if DEVICE.type == "cuda" else 1e-6
        torch.testing.assert_close(alone.weights[0], again.weights[row], rtol=limit, atol=limit)


def routed_rows(rows: int, width: int, experts: int, top_k: int, dtype: torch.dtype) -> RoutedRows:
    """Random choices without repeats; some rows have none."""
    routed = RoutedRows.empty(rows, width, dtype, top_k, DEVICE)
    routed.x.copy_(normal(rows, width, seed=31, dtype=dtype))
    order = normal(rows, experts, seed=32, dtype=torch.float32).argsort(1)[:, :top_k]
    order[1::4] = experts
    routed.chosen.copy_(order)
    weights = normal(rows, top_k, seed=33, dtype=torch.float32).abs()
    routed.weights.copy_(weights.masked_fill(order == experts, 0))
    return routed


MIXTURES = [(1, 7, 2), (5, 20, 3), (33, 3, 2), (70, 2, 1)]
"""Rows, experts, and choices of a row."""


@pytest.mark.parametrize(
    ("sizes", "dtype", "swiglu"), pairwise(MIXTURES, DTYPES, (False, True)), ids=str
)
def test_mixture(
    steps: Steps, dtype: torch.dtype, sizes: tuple[int, int, int], swiglu: bool
) -> None:
    """By slot and by expert, with more rows of an expert than a product has, with any part of the
    experts, of the rows, and of the shared expert. Each two of size, dtype and activation meet."""
    skip_unless_served(OP, "triton", dtype)
    rows, experts, top_k = sizes
    width, inner, shared_inner = 48, 20, 70
    routed = routed_rows(rows, width, experts, top_k, dtype)
    up = normal(experts, inner * (1 + swiglu), width, seed=34, dtype=dtype, scale=0.2)
    down = normal(experts, width, inner, seed=35, dtype=dtype, scale=0.2)
    shared = SharedExpert(
        normal(shared_inner * (1 + swiglu), width, seed=36, dtype=dtype, scale=0.2),
        normal(width, shared_inner, seed=37, dtype=dtype, scale=0.2),
        0,
        rows,
    )
    residual = normal(rows, width, seed=38, dtype=dtype)
    half, part = experts // 2, rows // 3
    for call, mine, other, added in (
        (routed, slice(0, experts), shared, residual),
        (routed, slice(0, experts), None, residual),
        (routed, slice(half, experts), shared._replace(first=part, rows=rows - part), None),
        (replace(routed, first=part, count=rows - part), slice(0, max(1, half)), shared, None),
    ):
        with PoisonedMemory():
            found = steps.mixture(call, up[mine], down[mine], mine.start, other, added, swiglu)
        exact = EXACT.mixture(
            in_double(call),
            exactly(up[mine]),
            exactly(down[mine]),
            mine.start,
            other and other._replace(up=exactly(other.up), down=exactly(other.down)),
            None if added is None else exactly(added),
            swiglu,
        )
        assert found.dtype == (torch.float32 if added is None else dtype)
        assert_close(found, exact, TOLERANCES[dtype])
    alone = steps.up(routed.x, shared.up, swiglu)
    exact = EXACT.up(exactly(routed.x), exactly(shared.up), swiglu)
    assert_close(alone, exact, TOLERANCES[dtype])


def in_double(routed: RoutedRows) -> RoutedRows:
    """The same rows in float64 on the host."""
    rows, top_k = routed.chosen.shape
    out = RoutedRows.empty(rows, routed.width, torch.float64, top_k, torch.device("cpu"))
    out.x.copy_(routed.x)
    out.chosen.copy_(routed.chosen)
    out.weights.copy_(routed.weights)
    return replace(out, first=routed.first, count=routed.count)


def test_a_row_of_the_mixture_is_its_own(steps: Steps) -> None:
    """Whatever other rows choose the same expert."""
    routed = routed_rows(9, 48, 4, 2, torch.float32)
    up, down = (normal(4, *s, seed=41, dtype=torch.float32) for s in ((20, 48), (48, 20)))
    residual = normal(9, 48, seed=42, dtype=torch.float32)
    whole = steps.mixture(routed, up, down, 0, None, residual, False)
    for row in range(9):
        one = slice(row, row + 1)
        alone = replace(routed, buffer=routed.buffer[one], count=1)
        found = steps.mixture(alone, up, down, 0, None, residual[one], False)
        assert torch.equal(found[0], whole[row])


TRUNCATIONS: dict[str, dict[str, Any]] = {
    "all": {},
    "greedy": {"temperature": 0.0},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.3},
    "both": {"top_k": 9, "top_p": 0.8, "truncated_logprobs": True},
    "more than all": {"top_k": 10_000, "top_p": 0.999, "truncated_logprobs": True},
}


@pytest.mark.parametrize("name", TRUNCATIONS)
@pytest.mark.parametrize("vocabulary", [1, 151, 4500])
def test_sample(steps: Steps, vocabulary: int, name: str) -> None:
    """The tokens of the reference, at the same random numbers; with equals, the lowest ids."""
    rows = 4 if vocabulary < 1000 else 2
    # Few values, so that many are equal at every threshold.
    logits = (normal(rows, vocabulary, seed=51, dtype=torch.float32) * 2).round() / 2
    logits[::2] = normal(rows, vocabulary, seed=52, dtype=torch.float32, scale=2.0)[::2]
    keys = random_integers(rows, low=-(2**62), high=2**62, seed=53, device=DEVICE)
    positions = random_integers(rows, high=2**20, seed=54, device=DEVICE)
    for limit, dtype in ((vocabulary, torch.float32), (vocabulary // 2 + 1, torch.bfloat16)):
        settings = SampleSettings(**{"temperature": 0.7, "limit": limit, **TRUNCATIONS[name]})
        wide = torch.full((rows, vocabulary + 3), torch.nan, dtype=dtype, device=DEVICE)
        wide[:, :vocabulary] = logits
        given = wide[:, :vocabulary]
        with PoisonedMemory():
            tokens, logprobs = steps.sample(given, keys, positions, settings)
        expected = EXACT.sample(given.cpu(), keys.cpu(), positions.cpu(), settings)
        assert torch.equal(tokens.cpu(), expected[0])
        torch.testing.assert_close(logprobs.cpu(), expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["all", "greedy", "both"])
def test_logits_that_are_not_finite_show(steps: Steps, name: str) -> None:
    logits = normal(3, 40, seed=56, dtype=torch.float32)
    logits[1, 5] = torch.nan
    numbers = torch.arange(3, device=DEVICE)
    settings = SampleSettings(**{"temperature": 1.0, "limit": 40, **TRUNCATIONS[name]})
    tokens, logprobs = steps.sample(logits, numbers, numbers, settings)
    assert ((tokens >= 0) & (tokens < 40)).all()
    assert logprobs.isnan().tolist() == [False, True, False]


class _Traffic:
    """Bytes that interpreted kernels read and write, each address of an access once; of some
    tensors only, if any are named."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *tensors: Tensor) -> None:
        if DEVICE.type == "cuda":
            pytest.skip("the interpreter counts the bytes")
        from triton.runtime import interpreter

        self.bytes = 0
        self.ranges = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        for name in ("create_masked_load", "create_masked_store"):
            access = getattr(interpreter.InterpreterBuilder, name)
            mask = {"create_masked_load": 1, "create_masked_store": 2}[name]
            monkeypatch.setattr(interpreter.InterpreterBuilder, name, self._counted(access, mask))

    def _counted(self, access: Any, mask: int) -> Any:
        def counted(builder: Any, *args: Any) -> Any:
            addresses = np.unique(args[0].data[args[mask].data]).astype(np.int64)
            if self.ranges:
                inside = [(addresses >= a) & (addresses < b) for a, b in self.ranges]
                addresses = addresses[np.logical_or.reduce(inside)]
            self.bytes += addresses.size * args[0].get_element_ty().primitive_bitwidth // 8
            return access(builder, *args)

        return counted


@pytest.mark.parametrize("longest", [4096, pytest.param(32_768, marks=pytest.mark.slow)])
def test_attention_reads_the_live_cache_once(
    steps: Steps, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the widths of Nemotron 3 Nano, 512 bytes of a token and key/value head, and little else:
    a long row, and one whose few tokens the bound of the length must not raise."""
    heads, kv_heads, dim, block = 32, 2, 128, 64
    positions = torch.tensor([longest - 1, 200])
    columns = longest // block
    table = torch.arange(2 * columns, dtype=torch.int32).view(2, columns)
    keys, values = (
        torch.zeros(2 * columns, kv_heads, block, dim, dtype=torch.bfloat16) for _ in range(2)
    )
    qkv = torch.zeros(2, kv_heads, heads // kv_heads + 2, dim, dtype=torch.bfloat16)
    q, k, v = qkv.tensor_split((-2, -1), 2)
    traffic = _Traffic(monkeypatch)
    slots = torch.arange(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        steps.attention(
            q, k.squeeze(2), v.squeeze(2), keys, values, table, slots, positions, longest
        )
    tokens = int((positions + 1).sum())
    assert 512 * kv_heads * tokens <= traffic.bytes <= 1.1 * 512 * kv_heads * tokens


@pytest.mark.parametrize(("rows", "experts"), [(3, 20), (40, 5)])
def test_weights_of_chosen_experts_are_read_once(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, rows: int, experts: int
) -> None:
    """By slot and by expert; those of the others are not read."""
    routed = routed_rows(rows, 32, experts, 2, torch.float32)
    up, down = (normal(experts, *s, seed=61, dtype=torch.float32) for s in ((20, 32), (32, 20)))
    traffic = _Traffic(monkeypatch, up, down)
    steps.mixture(routed, up, down, 0, None, None, False)
    chosen = set(routed.chosen.flatten().tolist()) - {experts}
    assert traffic.bytes == len(chosen) * (up[0].nbytes + down[0].nbytes)
