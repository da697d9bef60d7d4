"""linear_logprob against its definition in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.heads import (
    BACKENDS,
    DTYPES,
    Head,
    chunked,
    device_for,
    factor_for,
    make_head,
    skip_unless_served,
)
from nemocascade_kernels import linear_logprob
from nemocascade_kernels.common.linear_head import torch as torch_rows
from nemocascade_kernels.linear_logprob.op import OP
from nemocascade_kernels.testing import (
    PoisonedMemory,
    assert_as_accurate,
    random_normal,
    rms_error,
)
from torch import Tensor

NAMES = ("logprob", "entropy", "hidden_grad", "weight_grad")


def evaluate(
    head: Head,
    backend: str,
    dtype: torch.dtype | None = None,
    temperature: float = 1.0,
    entropy_weight: float = 0.7,
) -> tuple[Tensor, ...]:
    """Both outputs, and the gradients of a random combination of them."""
    hidden, weight = head.leaves(dtype)
    tokens, device = head.target.shape[0], head.target.device
    with PoisonedMemory():
        out = linear_logprob(
            hidden,
            weight,
            head.target,
            temperature=temperature,
            return_entropy=True,
            backend=backend,
        )
        assert out.entropy is not None
        mix = random_normal(tokens, seed=5, device=device) * out.logprob
        mix = mix + entropy_weight * random_normal(tokens, seed=6, device=device) * out.entropy
        mix.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return out.logprob.detach(), out.entropy.detach(), hidden.grad, weight.grad


def compare(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    temperature: float = 1.0,
    entropy_weight: float = 0.7,
) -> None:
    skip_unless_served(OP, backend, dtype)
    head = make_head(*shape, dtype=dtype, device=device_for(backend))
    exact = evaluate(head, "reference", torch.float64, temperature, entropy_weight)
    torchs = evaluate(head, "reference", None, temperature, entropy_weight)
    ours = evaluate(head, backend, None, temperature, entropy_weight)
    for name, a, b, c in zip(NAMES, ours, torchs, exact, strict=True):
        if a.dtype == torch.float32 and c.abs().max() < 1e-6:
            assert a.abs().max() < 1e-5, f"{name}: the exact value is 0"
            continue
        floor = 16 * torch.finfo(torch.float32).eps if a.dtype == torch.float32 else None
        assert_as_accurate(name, a, b, c, factor=factor_for(backend, dtype), floor=floor)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(
    backend: str, dtype: torch.dtype, entropy_weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunked(monkeypatch, 5)(torch.empty(263, 1, dtype=dtype))
    compare(backend, dtype, (29, 17, 263), entropy_weight=entropy_weight)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (3, 65, 31), (127, 8, 5), (2, 257, 9001)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str, shape: tuple[int, int, int]) -> None:
    compare(backend, torch.float32, shape)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature(backend: str, temperature: float) -> None:
    compare(backend, torch.float32, (13, 17, 131), temperature=temperature)


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_no_tokens(backend: str) -> None:
    skip_unless_served(OP, backend, torch.float32)
    head = make_head(0, 5, 11, device=device_for(backend))
    logprob, entropy, hidden_grad, weight_grad = evaluate(head, backend)
    assert logprob.shape == entropy.shape == (0,)
    assert hidden_grad.shape == (0, 5)
    assert not weight_grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_extreme_logits(backend: str) -> None:
    """No overflow where exp(logit) has none of float32's range left."""
    skip_unless_served(OP, backend, torch.float32)
    head = make_head(7, 17, 131, device=device_for(backend))
    head.hidden.mul_(300)
    exact = evaluate(head, "reference", torch.float64)
    ours = evaluate(head, backend)
    assert exact[0].min() < -500
    for name, a, c in zip(NAMES, ours, exact, strict=True):
        # The entropy is almost 0 here.
        assert (a - c).abs().max() <= 1e-4 * max(float(c.abs().max()), 1e-2), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_target_outside_the_vocabulary(backend: str) -> None:
    skip_unless_served(OP, backend, torch.float32)
    head = make_head(5, 3, 11, device=device_for(backend))
    head.target[2] = 11
    if head.target.is_cuda:
        out = linear_logprob(head.hidden, head.weight, head.target, backend=backend)
        assert out.logprob.isnan().nonzero().tolist() == [[2]]
    else:
        with pytest.raises(IndexError, match=r"\[0, 11\); the first is 11, in row 2"):
            linear_logprob(head.hidden, head.weight, head.target, backend=backend)


def test_main_grad() -> None:
    head = make_head(9, 5, 11)
    plain = evaluate(head, "torch", entropy_weight=0.0)
    hidden, weight = head.leaves()
    weight.main_grad = torch.ones_like(weight)
    out = linear_logprob(
        hidden, weight, head.target, accumulate_main_grad=True, backend="torch"
    ).logprob
    (random_normal(9, seed=5) * out).sum().backward()
    assert weight.grad_added_to_main_grad
    assert rms_error(weight.main_grad - 1, plain[3]) < 1e-6


def test_gradient_with_respect_to_the_entropy_alone() -> None:
    head = make_head(6, 5, 11)
    hidden, weight = head.leaves(torch.float64)

    def entropy(hidden: Tensor, weight: Tensor) -> Tensor:
        found = linear_logprob(hidden, weight, head.target, return_entropy=True, backend="torch")
        assert found.entropy is not None
        return found.entropy

    assert torch.autograd.gradcheck(entropy, (hidden, weight))


@pytest.mark.parametrize("stride", [70, 71, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_row_kernels_leave_their_neighbours_alone(
    backend: str, dtype: torch.dtype, stride: int
) -> None:
    """Memory behind a row may hold anything; without a gap the next row begins there."""
    skip_unless_served(OP, backend, dtype)
    kernels, device = OP.module(backend), device_for(backend)
    rows, vocabulary = 4, 70
    memory = torch.full((rows * stride + 16,), torch.nan, dtype=dtype, device=device)
    logits = memory.as_strided((rows, vocabulary), (stride, 1))
    logits.copy_(random_normal(rows, vocabulary, seed=1, scale=3.0))
    logits[1] = torch.nan  # a row that does not count, of slope 0
    copy = logits.double().cpu()
    copy[1] = 0
    target = torch.tensor([0, 5, 69, 33])
    slope = torch.tensor([1.0, 0.0, 3.0, 0.5])
    expected = torch_rows.statistics(copy, target, 1.3, True)
    found = kernels.statistics(logits, target.to(device), 1.3, True)
    counted = torch.tensor([0, 2, 3])
    for name, a, b in zip(found._fields, found, expected, strict=True):
        assert rms_error(a.cpu()[counted], b[counted]) < 1e-5, name
    lse = expected.maximum + expected.total.log()
    entropy = expected.total.log() - expected.weighted / expected.total
    torch_rows.gradient_(copy, target, 1.3, lse, slope.double(), entropy, 0.5 * slope.double())
    kernels.gradient_(
        logits,
        *(x.to(device) for x in (target,)),
        1.3,
        *(x.float().to(device) for x in (lse, slope, entropy, 0.5 * slope)),
    )
    assert not logits[1].any()
    assert rms_error(logits, copy) < (1e-5 if dtype == torch.float32 else 0.01)
    if stride == 71:  # no whole vector fits behind a row
        assert memory[70 : 4 * 71 : 71].isnan().all()
    assert memory[-16:].isnan().all()


class TestOffsetsBeyond32Bits:
    """Rows of logits that lie more than 2^31 elements apart from the first."""

    STRIDE = 2**30
    ROWS = 4  # the last row starts at 3 * 2^30 elements

    def logits(self, dtype: torch.dtype, vocabulary: int = 70) -> Tensor:
        # Only the pages that are touched take memory.
        memory = torch.empty((self.ROWS - 1) * self.STRIDE + 128, dtype=dtype)
        view = memory.as_strided((self.ROWS, vocabulary), (self.STRIDE, 1))
        view.copy_(random_normal(self.ROWS, vocabulary, seed=1, scale=3.0))
        return view

    @pytest.mark.parametrize("backend", ["native", "triton"])
    def test_row_kernels(self, backend: str) -> None:
        dtype = torch.bfloat16
        skip_unless_served(OP, backend, dtype)
        logits = self.logits(dtype).to(device_for(backend))
        if logits.is_cuda:
            moved = torch.empty((self.ROWS - 1) * self.STRIDE + 128, dtype=dtype, device="cuda")
            logits = moved.as_strided(logits.shape, (self.STRIDE, 1)).copy_(logits)
        copy = logits.double().cpu()
        target = torch.tensor([0, 5, 69, 33])
        kernels = OP.module(backend)
        found = kernels.statistics(logits, target.to(logits.device), 1.0, True)
        expected = torch_rows.statistics(copy, target, 1.0, True)
        for name, a, b in zip(found._fields, found, expected, strict=True):
            assert rms_error(a, b) < 1e-5, name
        lse = expected.maximum + expected.total.log()
        slope = torch.tensor([1.0, -2.0, 3.0, 0.5])
        torch_rows.gradient_(copy, target, 1.0, lse, slope.double())
        kernels.gradient_(
            logits, *(x.to(logits.device) for x in (target,)), 1.0,
            lse.float().to(logits.device), slope.to(logits.device),
        )  # fmt: skip
        assert rms_error(logits, copy) < 0.01

    def test_tokens_times_vocabulary(self) -> None:
        """A whole call with more than 2^31 logits; its last rows are right."""
        tokens, vocabulary = 65_600, 32_768
        assert tokens * vocabulary > 2**31
        head = make_head(tokens, 4, vocabulary)
        found = linear_logprob(head.hidden, head.weight, head.target).logprob
        last = slice(tokens - 5, tokens)
        expected = linear_logprob(
            head.hidden[last].double(), head.weight.double(), head.target[last], backend="reference"
        ).logprob
        assert rms_error(found[last], expected) < 1e-5
        assert bool((found < 0).all())
