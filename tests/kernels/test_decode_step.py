"""The decode operators against their definitions in float64, and their batch invariance."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from helpers.heads import skip_unless_served
from nemocascade_kernels import (
    MambaWeights,
    RouterSettings,
    make_routing,
    moe_experts,
    moe_route,
    step_attention,
    step_draw,
    step_experts,
    step_linear,
    step_mamba,
    step_norm,
    step_route,
)
from nemocascade_kernels.decode_step.op import OP
from nemocascade_kernels.testing import PoisonedMemory, kernel_device, random_normal
from torch import Tensor

BACKENDS = ("reference", "native")
ROWS = (1, 2, 3, 5, 16, 33)
DEVICE = torch.device("cpu")


class Mixer(NamedTuple):
    """heads, head_dim, groups, state, and the convolution's taps."""

    heads: int
    head_dim: int
    groups: int
    state: int
    taps: int


MIXERS = (
    Mixer(6, 12, 2, 10, 4),
    Mixer(8, 32, 2, 32, 4),
    Mixer(3, 5, 3, 17, 2),
    Mixer(4, 1, 1, 3, 3),
)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    skip_unless_served(OP, request.param, torch.float32)
    return str(request.param)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return random_normal(*shape, seed=seed, device=DEVICE, scale=scale)


def assert_close(actual: Tensor, exact: Tensor, tolerance: float = 2e-6) -> None:
    assert actual.dtype == torch.float32
    error = float((actual.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-9))
    assert error < tolerance, f"off by {error:.1e} of the largest value"


def assert_rows_are_their_own(call: Callable[[Tensor], Tensor], rows: int) -> None:
    """call(index) computes some rows: alone, reversed and in small numbers, which blocks of rows
    leave different remainders of, they have the same bits."""
    whole = call(torch.arange(rows))
    for index in (
        torch.arange(rows).flip(0),
        *(part for size in (1, 3, 5, 6) for part in torch.arange(rows).split(size)),
    ):
        assert torch.equal(call(index), whole[index])


@pytest.mark.parametrize("width", [1, 4, 16, 50, 67])
@pytest.mark.parametrize("depth", [1, 16, 37, 128])
def test_norm_and_linear(backend: str, depth: int, width: int) -> None:
    for rows in ROWS:
        x, weight = normal(rows, depth, seed=1), normal(width, depth, seed=2)
        residual, scale = normal(rows, width, seed=3), normal(depth, seed=4)
        exact = x.double() @ weight.double().t()
        assert_close(step_linear(x, weight, backend=backend), exact, 1e-5)
        added = step_linear(x, weight, residual, backend=backend)
        assert_close(added, exact + residual.double(), 1e-5)
        exact = torch.nn.functional.rms_norm(x.double(), (depth,), scale.double(), 1e-3)
        assert_close(step_norm(x, scale, 1e-3, backend=backend), exact)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [1, 4])
def test_route_is_the_routers(backend: str, score: str, groups: int) -> None:
    settings = RouterSettings(3, score, groups, max(1, groups // 2), True, 1.7)
    logits, bias = normal(33, 20, seed=5, scale=3.0), normal(20, seed=6)
    for real in (33, 7, 0):
        logits[real:] = math.nan
        chosen, weights = step_route(logits, settings, bias, real=real, backend=backend)
        expected = moe_route(
            logits.double(),
            3,
            score=score,
            expert_bias=bias,
            num_groups=groups,
            top_groups=max(1, groups // 2),
            scale=1.7,
            token_mask=torch.arange(33) < real,
            backend="reference",
        )
        assert torch.equal(chosen, expected.experts)
        torch.testing.assert_close(weights.double(), expected.weights, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("sizes", [(5, 48, 20), (8, 64, 32), (3, 17, 7)])
def test_experts_are_those_of_training(
    backend: str, activation: str, sizes: tuple[int, int, int]
) -> None:
    count, hidden, width = sizes
    w_up = normal(count, width * (1 + (activation == "swiglu")), hidden, seed=7)
    w_down = normal(count, hidden, width, seed=8)
    for rows in ROWS:
        x, weights = normal(rows, hidden, seed=9), normal(rows, 2, seed=10).abs()
        chosen = torch.stack(
            [torch.arange(rows) % count, (torch.arange(rows) + 1) % (count + 1)], 1
        )
        weights[chosen == count] = 0
        found = step_experts(
            x, chosen.int(), weights, w_up, w_down, activation=activation, backend=backend
        )
        expected = moe_experts(
            x.double(),
            make_routing(chosen, weights, count),
            w_up.double(),
            w_down.double(),
            activation=activation,
            backend="reference",
        )
        assert_close(found, expected, 1e-5)


def mamba_case(m: Mixer, rows: int, slots: int) -> tuple[Tensor, Tensor, Tensor, MambaWeights]:
    """zxbcdt, states and weights."""
    inner, shared = m.heads * m.head_dim, m.groups * m.state
    channels = inner + 2 * shared
    weights = MambaWeights(
        conv_weight=normal(channels, m.taps, seed=11),
        conv_bias=normal(channels, seed=12),
        dt_bias=normal(m.heads, seed=13),
        A=-normal(m.heads, seed=14).abs(),
        D=normal(m.heads, seed=15),
        norm_weight=normal(inner, seed=16),
        groups=m.groups,
        dt_limit=(0.01, 2.0),
        eps=1e-5,
    )
    zxbcdt = normal(rows, inner + channels + m.heads, seed=17)
    # Far beyond what exponentials of a few bits can hold.
    zxbcdt[0] *= 40
    return (
        zxbcdt,
        normal(slots, m.taps - 1, channels, seed=18),
        normal(slots, m.heads, m.head_dim, m.state, seed=19),
        weights,
    )


def in_double(w: MambaWeights) -> MambaWeights:
    return MambaWeights(
        **{k: v.double() if isinstance(v, Tensor) else v for k, v in vars(w).items()}
    )


@pytest.mark.parametrize("mixer", MIXERS)
def test_mamba(backend: str, mixer: Mixer) -> None:
    """Output and states; slots that no row names keep every bit."""
    for rows in ROWS:
        zxbcdt, conv, ssm, weights = mamba_case(mixer, rows, rows + 3)
        slots = torch.randperm(rows + 3, generator=torch.Generator().manual_seed(1))[:rows]
        exact_conv, exact_ssm = conv.double(), ssm.double()
        exact = step_mamba(
            zxbcdt.double(), exact_conv, exact_ssm, slots, in_double(weights), backend="reference"
        )
        before = conv.clone(), ssm.clone()
        out = step_mamba(zxbcdt, conv, ssm, slots, weights, backend=backend)
        assert_close(out, exact, 1e-5)
        assert_close(conv, exact_conv)
        assert_close(ssm, exact_ssm)
        others = torch.ones(rows + 3, dtype=torch.bool)
        others[slots] = False
        assert torch.equal(conv[others], before[0][others])
        assert torch.equal(ssm[others], before[1][others])


class Cached(NamedTuple):
    """A call of `step_attention`, whose tokens are scattered over blocks."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    slots: Tensor
    positions: Tensor

    def changed(self, change: Callable[[Tensor], Tensor]) -> Cached:
        """The same call with other floating-point tensors."""
        return Cached(*(change(t) for t in self[:5]), *self[5:])

    def token(self, cache: Tensor) -> Tensor:
        """The rows [n, g, d] of a cache at the positions."""
        size = cache.shape[2]
        blocks = self.table[self.slots].long().gather(1, (self.positions // size)[:, None])
        return cache[blocks[:, 0], :, self.positions % size]


def cached_case(
    sizes: tuple[int, int, int], positions: list[int], block: int, seed: int = 20
) -> Cached:
    """Unwritten memory of the caches is NaN, and unused entries of the table name no block that a
    row may read. The last two rows share the blocks of their common tokens, if there are several.
    """
    heads, kv_heads, dim = sizes
    rows, columns = len(positions), -(-(max(positions) + 1) // block) + 2
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns + 3
    order = torch.randperm(count, generator=generator).int()
    table = torch.full((rows + 2, columns), count - 1, dtype=torch.int32)
    slots = torch.arange(rows).flip(0) + 1
    keys, values = (torch.full((count, kv_heads, block, dim), math.nan) for _ in range(2))
    used = 0
    for row, (slot, position) in enumerate(zip(slots.tolist(), positions, strict=True)):
        needed = position // block + 1
        mine = order[used : used + needed].clone()
        used += needed
        if row == rows - 1 > 0:
            shared = min(position, positions[row - 1]) // block
            mine[:shared] = table[slots[row - 1], :shared]
        table[slot, :needed] = mine
        for cache, at in ((keys, 1), (values, 2)):
            past = normal(needed * block, kv_heads, dim, seed=seed + 3 * row + at)
            past[position:] = math.nan
            cache[mine.long()] = past.unflatten(0, (needed, block)).transpose(1, 2)
    if rows > 1:
        shared = min(positions[-2:]) // block
        first, last = table[slots[-2], :shared].long(), table[slots[-1], :shared].long()
        assert torch.equal(first, last)
    q = normal(rows, heads, dim, seed=seed, scale=3.0)
    k, v = (normal(rows, kv_heads, dim, seed=seed + 100 + i) for i in range(2))
    return Cached(q, k, v, keys, values, table, slots, torch.tensor(positions))


def attend(case: Cached, backend: str, longest: int = 0) -> tuple[Tensor, Cached]:
    """The result, and the call with the caches as it left them."""
    case = case.changed(torch.clone)
    longest = longest or int(case.positions.max()) + 1
    return step_attention(*case, longest, backend=backend), case


@pytest.mark.parametrize("sizes", [(6, 2, 20), (4, 4, 32), (8, 1, 7)])
def test_attention(backend: str, sizes: tuple[int, int, int]) -> None:
    """Past lengths of all kinds over scattered blocks; what stands beyond them may be NaN."""
    for rows in ROWS:
        case = cached_case(sizes, [(7 * i * i) % 50 for i in range(rows)], 4 if rows % 2 else 8)
        exact, _ = attend(case.changed(Tensor.double), "reference")
        out, after = attend(case, backend)
        assert_close(out, exact, 1e-5)
        assert torch.equal(after.token(after.keys), case.k)
        assert torch.equal(after.token(after.values), case.v)


def test_attention_by_hand() -> None:
    """The definition against a softmax over the tokens of each row, gathered one by one."""
    case = cached_case((6, 2, 20), [0, 3, 4, 17, 29], 4)
    out, after = attend(case.changed(Tensor.double), "reference")
    for row, (slot, position) in enumerate(
        zip(case.slots.tolist(), case.positions.tolist(), strict=True)
    ):
        at = [(int(case.table[slot, t // 4]), t % 4) for t in range(position + 1)]
        keys, values = (
            torch.stack([cache[b, :, t] for b, t in at]).repeat_interleave(3, 1)
            for cache in (after.keys, after.values)
        )
        scores = torch.einsum("hd,thd->ht", after.q[row], keys) / math.sqrt(20)
        expected = torch.einsum("ht,thd->hd", scores.softmax(1), values)
        torch.testing.assert_close(out[row], expected, rtol=1e-12, atol=1e-12)


TRITON_CASES = {
    "odd": ((6, 2, 20), [0, 1, 15, 16, 40], 4),
    "as many key heads": ((3, 3, 7), [63, 64, 65], 16),
    "several parts": ((4, 1, 16), [1023, 1024, 2500, 1], 64),
    "many queries a head": ((34, 2, 24), [130, 7], 256),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", TRITON_CASES)
def test_attention_in_triton(name: str, dtype: torch.dtype) -> None:
    """In parts that are merged, in poisoned memory, whatever bound of the length."""
    skip_unless_served(OP, "triton", dtype)
    sizes, positions, block = TRITON_CASES[name]
    case = cached_case(sizes, positions, block).changed(lambda t: t.to(dtype))
    exact, _ = attend(case.changed(Tensor.double), "reference")
    device = kernel_device()
    moved = Cached(*(t.to(device) for t in case))
    with PoisonedMemory():
        out, after = attend(moved, "triton")
    assert out.dtype == dtype
    assert_close(out.float().cpu(), exact, 1e-5 if dtype == torch.float32 else 2e-2)
    assert torch.equal(after.token(after.keys).cpu(), case.k)
    assert torch.equal(after.token(after.values).cpu(), case.v)
    # Nothing but the new tokens is written.
    torch.testing.assert_close(
        unwritten(after, after.keys), unwritten(moved, moved.keys), rtol=0, atol=0, equal_nan=True
    )


def test_rows_in_triton_are_their_own() -> None:
    """Whatever other rows and whatever bound of the length."""
    skip_unless_served(OP, "triton", torch.float32)
    positions = [40, 1024, 3]
    moved = Cached(*(t.to(kernel_device()) for t in cached_case((4, 2, 16), positions, 64)))
    out, _ = attend(moved, "triton")
    bounded, _ = attend(moved, "triton", moved.table.shape[1] * 64)
    assert torch.equal(bounded, out)
    for row in range(3):
        single, _ = attend(moved._replace(**rows_of(moved, row)), "triton")
        assert torch.equal(single[0], out[row])


def rows_of(case: Cached, row: int) -> dict[str, Tensor]:
    """The fields of one row of a call."""
    names = ("q", "k", "v", "slots", "positions")
    return {name: getattr(case, name)[row : row + 1] for name in names}


def unwritten(case: Cached, cache: Tensor) -> Tensor:
    """The cache without the tokens at the positions."""
    cache, size = cache.clone(), cache.shape[2]
    blocks = case.table[case.slots].long().gather(1, (case.positions // size)[:, None])
    cache[blocks[:, 0], :, case.positions % size] = 0
    return cache


def test_a_rows_bits_are_its_own() -> None:
    """In the compiled library, whatever the number of rows and the place among them."""
    skip_unless_served(OP, "native", torch.float32)
    rows = 33
    x, weight, scale = normal(rows, 77, seed=1), normal(53, 77, seed=2), normal(77, seed=3)
    residual = normal(rows, 53, seed=4)
    assert_rows_are_their_own(lambda i: step_linear(x[i], weight, residual[i]), rows)
    assert_rows_are_their_own(lambda i: step_norm(x[i], scale, 1e-5), rows)
    logits = normal(rows, 13, seed=5)
    for score in ("sigmoid", "softmax"):
        settings = RouterSettings(4, score, 1, 1, True, 2.5)
        assert_rows_are_their_own(lambda i, s=settings: step_route(logits[i], s)[1], rows)
    chosen, weights = step_route(logits, settings)
    w_up, w_down = normal(13, 40, 77, seed=6), normal(13, 77, 20, seed=7)
    assert_rows_are_their_own(
        lambda i: step_experts(x[i], chosen[i], weights[i], w_up, w_down, activation="swiglu"),
        rows,
    )
    zxbcdt, conv, ssm, mamba_weights = mamba_case(MIXERS[0], rows, rows)
    assert_rows_are_their_own(
        lambda i: step_mamba(zxbcdt[i], conv.clone(), ssm.clone(), i, mamba_weights), rows
    )
    case = cached_case((6, 2, 20), [i + 3 for i in range(rows)], 8)
    q, k, v, keys, values, table, slots, held = case
    assert_rows_are_their_own(
        lambda i: step_attention(
            q[i], k[i], v[i], keys.clone(), values.clone(), table, slots[i], held[i], 40
        ),
        rows,
    )


def test_broken_calls() -> None:
    x = normal(2, 4)
    with pytest.raises(ValueError, match="must fit"):
        step_linear(x, normal(3, 5))
    with pytest.raises(ValueError, match="must fit"):
        step_norm(x, normal(5), 1e-5)
    with pytest.raises(ValueError, match=r"top_k\(9\)"):
        step_route(x, RouterSettings(9, "sigmoid", 1, 1, True, 1.0))
    with pytest.raises(ValueError, match="gelu"):
        step_experts(
            x,
            torch.zeros(2, 1).int(),
            normal(2, 1),
            normal(1, 3, 4),
            normal(1, 4, 3),
            activation="gelu",
        )
    zxbcdt, conv, ssm, weights = mamba_case(MIXERS[0], 2, 3)
    with pytest.raises(ValueError, match=r"slots is \[3\], not \[2\].*torch.float32"):
        step_mamba(zxbcdt, conv, ssm, normal(3), weights)
    q, cache = normal(2, 1, 4), normal(2, 1, 4, 4)
    one, table = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"longest\(9\) in 1\.\.8"):
        step_attention(q, q, q, cache, cache, table, one, one, 9)
    with pytest.raises(ValueError, match="blocks of 3 tokens"):
        step_attention(q, q, q, cache[:, :, :3], cache[:, :, :3], table, one, one, 6)
    with pytest.raises(ValueError, match=r"table is torch\.int64"):
        step_attention(q, q, q, cache, cache, table.long(), one, one, 8)


def test_the_compiled_steps_reject_foreign_slots() -> None:
    """Slots and positions are addresses: none may lie outside."""
    skip_unless_served(OP, "native", torch.float32)
    zxbcdt, conv, ssm, weights = mamba_case(MIXERS[0], 1, 2)
    with pytest.raises(RuntimeError, match="slots hold 2"):
        step_mamba(zxbcdt, conv, ssm, torch.tensor([2]), weights)
    q, cache = normal(1, 1, 4), normal(2, 1, 4, 4)
    one, table = torch.zeros(1, dtype=torch.int64), torch.tensor([[0, 2]]).int()
    with pytest.raises(RuntimeError, match="positions hold 8"):
        step_attention(q, q, q, cache, cache.clone(), table, one, one + 8, 8)
    with pytest.raises(RuntimeError, match="table hold 2"):
        step_attention(q, q, q, cache, cache.clone(), table, one, one + 4, 8)
    step_attention(q, q, q, cache, cache.clone(), table, one, one + 3, 8)
    with pytest.raises(RuntimeError, match="experts hold 3"):
        step_experts(
            normal(1, 4), torch.tensor([[3]]).int(), normal(1, 1), normal(2, 3, 4), normal(2, 4, 3)
        )


@pytest.mark.parametrize("vocabulary", [1, 7, 64, 151, 1000])
def test_draw_inverts_the_distribution(backend: str, vocabulary: int) -> None:
    """Every id in its share of [0, 1), in order; nothing that is excluded; log-probabilities of
    the whole distribution."""
    logits = normal(4, vocabulary, seed=30, scale=2.0)
    allowed = normal(4, vocabulary, seed=31) > -0.5
    allowed[:, 0] = True
    for temperature, limit, mask in (
        (1.0, 0, None),
        (0.7, vocabulary // 2 + 1, None),
        (1.3, 0, allowed),
    ):
        exact = (logits.double() / temperature).log_softmax(1)
        shares = exact.exp()
        if mask is not None:
            shares = shares * mask
        shares[:, limit or vocabulary :] = 0
        bounds = torch.cat([torch.zeros(4, 1), shares.cumsum(1)], 1) / shares.sum(1, keepdim=True)
        for number in (0.0, 0.1, 0.37, 0.5, 0.93, 1 - 2**-53):
            u = torch.full((4,), number, dtype=torch.float64)
            tokens, logprobs = step_draw(
                logits, u, temperature=temperature, limit=limit, allowed=mask, backend=backend
            )
            at = tokens[:, None]
            assert (shares.gather(1, at) > 0).all()
            assert (bounds.gather(1, at).squeeze(1) <= u + 1e-6).all()
            assert (u <= bounds.gather(1, at + 1).squeeze(1) + 1e-6).all()
            torch.testing.assert_close(
                logprobs.double(), exact.gather(1, at).squeeze(1), rtol=1e-5, atol=1e-5
            )
        greedy, _ = step_draw(logits, None, limit=limit, allowed=mask, backend=backend)
        assert torch.equal(greedy, shares.argmax(1))


def test_draws_follow_the_distribution(backend: str) -> None:
    """20,000 draws of six ids: frequencies within four standard deviations."""
    logits = normal(1, 6, seed=32, scale=1.5)
    count = 20_000
    u = (torch.arange(count, dtype=torch.float64) * 0.6180339887498949) % 1
    tokens, _ = step_draw(logits.expand(count, 6), u, backend=backend)
    shares = logits.double().softmax(1)[0]
    found = torch.bincount(tokens, minlength=6) / count
    assert ((found - shares).abs() < 4 * (shares / count).sqrt()).all()


def test_numbers_that_are_not_finite_show(backend: str) -> None:
    logits = normal(3, 40, seed=33)
    logits[1, 5] = math.nan
    u = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    for numbers in (u, None):
        tokens, logprobs = step_draw(logits, numbers, backend=backend)
        assert ((tokens >= 0) & (tokens < 40)).all()
        assert logprobs.isnan().tolist() == [False, True, False]
