"""linear_distill_loss against autograd of its definition in float64, and each of its guarantees."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.distill_heads import (
    RANK_SHAPE,
    Distilled,
    distilled,
    make_heads,
)
from helpers.heads import BACKENDS, DTYPES, chunked, device_for, factor_for, skip_unless_served
from helpers.ranks import run_ranks
from nemocascade_kernels import DIVERGENCES, Divergence, linear_distill_loss
from nemocascade_kernels.common.linear_head.chunks import static_slots
from nemocascade_kernels.linear_distill_loss.op import OP
from nemocascade_kernels.testing import assert_as_accurate, assert_same_bits, rms_error
from torch import Tensor

ON_RANKS = [
    backend
    for backend in BACKENDS
    # Two ranks on one GPU would need a collective that takes its tensors; gloo takes the CPU's.
    if device_for(backend).type == "cpu" and OP.serves(torch.zeros(1, 1), backend=backend)
]


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(
    backend: str, dtype: torch.dtype, kind: Divergence, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_unless_served(OP, backend, dtype)
    heads = make_heads(29, 17, 11, 263, dtype, device_for(backend), trained=0.6)
    chunked(monkeypatch, 10)(heads.weight)
    exact = distilled(heads, kind, "reference", torch.float64, temperature=0.8)
    torchs = distilled(heads, kind, "reference", temperature=0.8)
    ours = distilled(heads, kind, backend, temperature=0.8)
    for name, a, b, c in zip(Distilled._fields, ours, torchs, exact, strict=True):
        floor = 1e-5 if dtype == torch.float32 else None
        assert_as_accurate(name, a, b, c, factor=factor_for(backend, dtype), floor=floor)
        if dtype == torch.float32:
            assert rms_error(a, c) < 1e-5, name


@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (1, 3, 5, 2), (3, 65, 8, 31), (33, 8, 9, 5), (2, 257, 130, 9001)]
)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str, kind: Divergence, shape: tuple[int, int, int, int]) -> None:
    skip_unless_served(OP, backend, torch.float32)
    heads = make_heads(*shape, device=device_for(backend))
    exact = distilled(heads, kind, "reference", torch.float64)
    ours = distilled(heads, kind, backend)
    for name, a, b in zip(Distilled._fields, ours, exact, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_the_definition_is_that_of_the_divergences() -> None:
    """Beside torch's own kl_div, whose first argument is the second distribution."""
    heads = make_heads(7, 5, 3, 19)
    log_p = torch.log_softmax(heads.hidden @ heads.weight.T, -1)
    log_q = torch.log_softmax(heads.teacher_hidden @ heads.teacher_weight.T, -1)
    log_m = torch.log((log_p.exp() + log_q.exp()) / 2)

    def kl(first: Tensor, second: Tensor) -> Tensor:
        return F.kl_div(second, first, reduction="none", log_target=True).sum(-1)

    expected = {
        "reverse_kl": kl(log_p, log_q),
        "forward_kl": kl(log_q, log_p),
        "jensen_shannon": (kl(log_p, log_m) + kl(log_q, log_m)) / 2,
    }
    for kind in DIVERGENCES:
        found = distilled(heads, kind, "reference")
        torch.testing.assert_close(found.divergence, expected[kind])
        torch.testing.assert_close(found.loss, (heads.token_weight * expected[kind]).sum())
        at_target = log_p.gather(1, heads.target[:, None])[:, 0]
        torch.testing.assert_close(found.logprob, at_target)


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_distant_logits(backend: str, kind: Divergence) -> None:
    """Logits of hundreds, whose log-probabilities float32 holds to 3e-5, and logits that differ by
    a constant: nothing overflows."""
    skip_unless_served(OP, backend, torch.float32)
    heads = make_heads(9, 6, 6, 131, device=device_for(backend))
    far = replace(heads, weight=heads.weight * 40, teacher_weight=heads.teacher_weight * 40)
    exact = distilled(far, kind, "reference", torch.float64)
    for name, a, b in zip(Distilled._fields, distilled(far, kind, backend), exact, strict=True):
        torch.testing.assert_close(
            a.double(), b, rtol=1e-4, atol=5e-3, msg=lambda text, n=name: f"{n}: {text}"
        )
    same = replace(heads, teacher_hidden=heads.hidden, teacher_weight=heads.weight + 3.0)
    equal = distilled(same, kind, backend)
    assert equal.divergence.abs().max() < 1e-5
    assert equal.hidden_grad.abs().max() < 1e-4


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_weight_zero_may_hold_anything(backend: str, kind: Divergence) -> None:
    """And the teacher's states of the rows that train alone give the same bits."""
    skip_unless_served(OP, backend, torch.float32)
    heads = make_heads(23, 17, 11, 131, device=device_for(backend), trained=0.4)
    clean = distilled(heads, kind, backend)
    silent = heads.token_weight == 0
    assert 0 < int(silent.sum()) < 23
    compact = replace(heads, teacher_hidden=heads.teacher_hidden[~silent])
    for tensor in (heads.hidden, heads.teacher_hidden):
        tensor[silent] = math.nan
    heads.target[silent] = -100
    for found in (distilled(heads, kind, backend), distilled(compact, kind, backend)):
        for name, a, b in zip(Distilled._fields, found, clean, strict=True):
            assert_same_bits(name, a, b)
        assert not found.hidden_grad[silent].any()
        assert not found.divergence[silent].any()


@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_train(backend: str, tokens: int) -> None:
    skip_unless_served(OP, backend, torch.float32)
    heads = make_heads(tokens, 5, 4, 11, device=device_for(backend), trained=0.0)
    heads.hidden.fill_(math.nan)
    found = distilled(heads, "reverse_kl", backend)
    assert found.loss.item() == 0.0
    assert found.divergence.shape == (tokens,)
    assert not found.hidden_grad.any()
    assert not found.weight_grad.any()


@pytest.mark.parametrize("bound", [None, 12, 30])
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_static_slots_give_the_same_result(
    backend: str, kind: Divergence, bound: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU's walk over slots, forced on the CPU."""
    from nemocascade_kernels.linear_distill_loss import op

    skip_unless_served(OP, backend, torch.float32)
    heads = make_heads(30, 17, 11, 131, device=device_for(backend), trained=0.3)
    silent = heads.token_weight == 0
    count = int((~silent).sum())
    assert count <= 12
    plain = distilled(heads, kind, backend)
    compact = heads.teacher_hidden[~silent]
    for tensor in (heads.hidden, heads.teacher_hidden):
        tensor[silent] = math.nan
    monkeypatch.setattr(op, "trained_rows", static_slots)
    for given, most in ((heads, bound), (replace(heads, teacher_hidden=compact), count)):
        static = distilled(given, kind, backend, active_rows=most)
        for name, a, b in zip(Distilled._fields, static, plain, strict=True):
            assert rms_error(a, b) < 1e-6, name
    low = distilled(heads, kind, backend, active_rows=3)
    assert low.loss.isnan(), "a bound that is too low must not look right"


@pytest.mark.parametrize("backend", BACKENDS)
def test_main_grad(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two losses of one head, with a teacher each, add to one float32 sum, over many chunks."""
    dtype = torch.bfloat16
    skip_unless_served(OP, backend, dtype)
    device = device_for(backend)
    heads = make_heads(40, 17, 11, 131, dtype, device, trained=0.8)
    chunked(monkeypatch, 14)(heads.weight)
    plain = distilled(heads, "forward_kl", backend, upstream=4.0)
    hidden = heads.hidden.clone().requires_grad_()
    weight = heads.weight.clone().requires_grad_()
    weight.main_grad = torch.ones_like(weight, dtype=torch.float32)
    first = torch.arange(40, device=device) < 21
    total = torch.zeros((), device=device)
    for mine in (first, ~first):
        out = linear_distill_loss(
            hidden, weight, heads.teacher_hidden, heads.teacher_weight,
            torch.where(mine, heads.token_weight, 0.0), divergence="forward_kl",
            accumulate_main_grad=True, grad_scale=4.0, backend=backend,
        )  # fmt: skip
        assert out.logprob is None
        total = total + out.loss
    (total * 4.0).backward()
    assert weight.grad_added_to_main_grad
    assert weight.main_grad.dtype == torch.float32
    assert rms_error(weight.main_grad - 1, plain.weight_grad) < 0.01
    assert hidden.grad is not None
    assert rms_error(hidden.grad, plain.hidden_grad) < 0.01


def test_the_teacher_has_no_gradient() -> None:
    heads = make_heads(9, 5, 4, 11)
    teacher = [t.requires_grad_() for t in (heads.teacher_hidden, heads.teacher_weight)]
    for backend in ("reference", "torch"):
        weight = heads.weight.clone().requires_grad_()
        linear_distill_loss(
            heads.hidden, weight, *teacher, heads.token_weight, backend=backend
        ).loss.backward()
        assert weight.grad is not None
        assert teacher[0].grad is None
        assert teacher[1].grad is None


def test_metrics_are_means_over_the_trained_tokens() -> None:
    heads = make_heads(31, 17, 11, 131, trained=0.5)
    out = linear_distill_loss(
        heads.hidden, heads.weight, heads.teacher_hidden, heads.teacher_weight,
        heads.token_weight, target=heads.target,
    )  # fmt: skip
    trained = heads.token_weight != 0
    assert out.logprob is not None
    assert out.metrics["tokens"] == trained.sum()
    torch.testing.assert_close(out.metrics["divergence"], out.divergence[trained].mean())
    torch.testing.assert_close(out.metrics["logprob"], out.logprob[trained].mean())


def test_arguments_that_do_not_fit() -> None:
    heads = make_heads(6, 5, 4, 11, trained=0.5)
    given = heads.hidden, heads.weight, heads.teacher_hidden, heads.teacher_weight
    with pytest.raises(ValueError, match=r"divergence must be one of.*is 'kl'"):
        linear_distill_loss(*given, heads.token_weight, divergence="kl")
    with pytest.raises(ValueError, match="same V; student and teacher must share one dtype"):
        linear_distill_loss(*given[:3], given[3][1:].double(), heads.token_weight)
    with pytest.raises(ValueError, match=r"teacher_hidden has 5 rows: .* hidden, 6, or .* train, "):
        linear_distill_loss(*given[:2], given[2][1:], given[3], heads.token_weight)
    heads.target[:] = 11
    with pytest.raises(IndexError, match="outside the vocabulary"):
        linear_distill_loss(*given, heads.token_weight, target=heads.target)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """Results of each rank, of all cases in one process."""
    folder = tmp_path_factory.mktemp("ranks")
    arguments = {"folder": str(folder), "backends": ON_RANKS}
    run_ranks("helpers.distill_heads:run_distill_rank", 2, arguments, timeout_s=500)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("backend", ON_RANKS)
def test_two_ranks_equal_one(
    backend: str, kind: Divergence, ranks: list[dict[str, dict[str, Tensor]]]
) -> None:
    heads = make_heads(*RANK_SHAPE, device=device_for(backend), trained=0.7)
    exact = distilled(heads, kind, "reference", torch.float64, temperature=0.8)
    first, second = (found[f"{backend}-{kind}"] for found in ranks)
    for name, value in exact._asdict().items():
        if name == "weight_grad":
            found = torch.cat([first[name], second[name]])
        else:
            assert_same_bits(f"{name} on both ranks", first[name], second[name])
            found = first[name]
        assert rms_error(found, value) < 1e-5, name
    parts = first["partial_hidden_grad"] + second["partial_hidden_grad"]
    assert rms_error(parts, exact.hidden_grad) < 1e-5
    assert rms_error(first["partial_hidden_grad"], exact.hidden_grad) > 0.1
