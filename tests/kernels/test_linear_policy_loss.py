"""linear_policy_loss against its definition in float64, and each of its guarantees."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from helpers.heads import (
    BACKENDS,
    DTYPES,
    OBJECTIVES,
    Found,
    Head,
    assert_found,
    chunked,
    device_for,
    evaluate,
    factor_for,
    make_head,
    make_objective,
    skip_unless_served,
)
from nemocascade_kernels import (
    Grpo,
    Mopd,
    Nll,
    Objective,
    backends,
    linear_logprob,
    linear_policy_loss,
    logits_bytes,
)
from nemocascade_kernels.common.linear_head import chunks as chunking
from nemocascade_kernels.common.linear_head.chunks import partition, static_slots
from nemocascade_kernels.linear_policy_loss.objectives import FusedRow
from nemocascade_kernels.linear_policy_loss.op import OP
from nemocascade_kernels.testing import assert_same_bits, rms_error
from torch import Tensor


def compare(
    backend: str,
    dtype: torch.dtype,
    kind: str,
    shape: tuple[int, int, int],
    trained: float = 0.6,
    **settings: object,
) -> None:
    skip_unless_served(OP, backend, dtype)
    device = device_for(backend)
    head = make_head(*shape, dtype=dtype, device=device)
    objective = make_objective(kind, shape[0], device, trained)
    temperature = settings.pop("temperature", 1.0)
    exact = evaluate(head, objective, "reference", torch.float64, temperature=temperature)
    torchs = evaluate(head, objective, "reference", temperature=temperature)
    ours = evaluate(head, objective, backend, temperature=temperature, **settings)
    assert_found(ours, torchs, exact, factor_for(backend, dtype))


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_float64(
    backend: str, dtype: torch.dtype, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (29, 17, 263)
    chunked(monkeypatch, 5)(torch.empty(shape[2], 1, dtype=dtype))
    compare(backend, dtype, kind, shape)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 3, 2), (3, 65, 31), (127, 8, 5), (2, 257, 9001)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_odd_sizes(backend: str, shape: tuple[int, int, int]) -> None:
    compare(backend, torch.float32, "nll", shape, trained=1.0)


@pytest.mark.parametrize("temperature", [0.3, 2.5])
@pytest.mark.parametrize("backend", BACKENDS)
def test_temperature(backend: str, temperature: float) -> None:
    compare(backend, torch.float32, "grpo", (13, 17, 131), temperature=temperature)


@pytest.mark.parametrize("backend", BACKENDS)
def test_grad_scale_and_the_gradient_of_the_loss_are_independent(backend: str) -> None:
    skip_unless_served(OP, backend, torch.float32)
    device = device_for(backend)
    head = make_head(11, 17, 131, device=device)
    objective = make_objective("grpo", 11, device)
    plain = evaluate(head, objective, "reference", upstream=3.0)
    scaled = evaluate(head, objective, backend, upstream=3.0, grad_scale=8.0)
    assert rms_error(scaled.hidden_grad, plain.hidden_grad) < 1e-5
    assert rms_error(scaled.weight_grad, plain.weight_grad) < 1e-5


def with_nan_where_not_trained(objective: Objective) -> Objective:
    silent = objective.token_weight == 0
    fields = {
        name: torch.where(silent, torch.nan, value)
        for name, value in objective.tensors().items()
        if name != "token_weight"
    }
    return replace(objective, **fields)


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_weight_zero_may_hold_anything(backend: str, kind: str) -> None:
    skip_unless_served(OP, backend, torch.float32)
    device = device_for(backend)
    head = make_head(23, 17, 131, device=device)
    objective = make_objective(kind, 23, device, trained=0.4)
    clean = evaluate(head, objective, backend)
    silent = objective.token_weight == 0
    assert 0 < int(silent.sum()) < 23
    head.hidden[silent] = math.nan
    head.target[silent] = -100
    dirty = evaluate(head, with_nan_where_not_trained(objective), backend)
    for name, a, b in zip(Found._fields, dirty, clean, strict=True):
        assert_same_bits(name, a, b)
    assert not dirty.hidden_grad[silent].any()
    assert not dirty.logprob[silent].any()
    assert not dirty.entropy[silent].any()


@pytest.mark.parametrize("tokens", [0, 7])
@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_nothing_to_train(backend: str, tokens: int) -> None:
    skip_unless_served(OP, backend, torch.float32)
    device = device_for(backend)
    head = make_head(tokens, 5, 11, device=device)
    head.hidden.fill_(math.nan)
    found = evaluate(head, Nll(torch.zeros(tokens, device=device)), backend)
    assert found.loss.item() == 0.0
    assert found.loss.dtype == torch.float32
    assert found.logprob.shape == found.entropy.shape == (tokens,)
    assert not found.hidden_grad.any()
    assert not found.weight_grad.any()


def test_metrics_are_means_over_the_trained_tokens() -> None:
    head = make_head(31, 17, 131)
    objective = make_objective("mopd", 31, trained=0.5)
    assert isinstance(objective, Mopd)
    out = linear_policy_loss(
        head.hidden, head.weight, head.target, with_nan_where_not_trained(objective),
        return_entropy=True,
    )  # fmt: skip
    trained = objective.token_weight != 0
    whole = linear_logprob(head.hidden, head.weight, head.target, return_entropy=True)
    logprob = whole.logprob[trained]
    ratio = (logprob - objective.rollout_logprob[trained]).exp()
    advantage = objective.teacher_logprob[trained] - logprob
    assert whole.entropy is not None
    expected = {
        "tokens": trained.sum().float(),
        "logprob": logprob.mean(),
        "entropy": whole.entropy[trained].mean(),
        "advantage": advantage.mean(),
        "advantage_abs": advantage.abs().mean(),
        "ratio": ratio.mean(),
        "gated_low": (ratio < 0.5).float().mean(),
        "gated_high": (ratio > 2.0).float().mean(),
    }
    assert expected["gated_low"] > 0
    assert expected["gated_high"] > 0
    assert set(out.metrics) == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(
            out.metrics[name], value, msg=lambda text, n=name: f"{n}: {text}"
        )


def test_losses_are_those_of_the_paper() -> None:
    """By hand, token by token, beside Eq. 1 and Eq. 2-4."""
    head = make_head(19, 17, 131)
    logprob = linear_logprob(head.hidden, head.weight, head.target).logprob.tolist()
    grpo = make_objective("grpo_kl", 19)
    mopd = make_objective("mopd", 19)
    columns = {name: value.tolist() for name, value in grpo.tensors().items()}
    expected = sum(
        w * (-a * lp + 0.03 * (math.exp(ref - lp) - (ref - lp) - 1))
        for w, a, ref, lp in zip(
            columns["token_weight"], columns["advantage"], columns["ref_logprob"], logprob,
            strict=True,
        )
    )  # fmt: skip
    loss = linear_policy_loss(head.hidden, head.weight, head.target, grpo).loss
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    columns = {name: value.tolist() for name, value in mopd.tensors().items()}
    expected = 0.0
    for w, teacher, rollout, lp in zip(
        columns["token_weight"], columns["teacher_logprob"], columns["rollout_logprob"], logprob,
        strict=True,
    ):  # fmt: skip
        ratio = math.exp(lp - rollout)
        expected -= w * (ratio if 0.5 <= ratio <= 2.0 else 0.0) * (teacher - lp) * lp
    loss = linear_policy_loss(head.hidden, head.weight, head.target, mopd).loss
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # d = ref - logprob is 0.5, -2 and 3. Each pair: the penalty's value, and its slope.
        ({}, [(0.1487, -0.5), (1.1353, 2.0), (16.0855, -3.0)]),
        ({"kl_importance": "none"}, [(0.1487, -0.6487), (1.1353, 0.8647), (16.0855, -19.0855)]),
        # pi / pi_rollout is 2 everywhere.
        (
            {"kl_importance": "rollout"},
            [(0.2974, -1.0), (2.2707, 4.0), (32.1711, -6.0)],
        ),
        ({"kl_input_clamp": 2.5}, [(0.1487, -0.5), (1.1353, 2.0), (8.6825, 0.0)]),
        ({"kl_output_clamp": 10.0}, [(0.1487, -0.5), (1.1353, 2.0), (10.0, 0.0)]),
        (
            {"kl_importance": "none", "kl_input_clamp": 1.0},
            [(0.1487, -0.6487), (0.3679, 0.0), (0.7183, 0.0)],
        ),
    ],
    ids=str,
)
def test_the_penalty_has_the_gradients_of_nemo_rl(
    backend: str, settings: dict[str, Any], expected: list[tuple[float, float]]
) -> None:
    """Values and slopes by hand: `calculate_kl` of NeMo-RL, with and without its weights."""
    skip_unless_served(OP, backend, torch.float32)
    device = device_for(backend)
    head = make_head(3, 17, 131, device=device)
    logprob = linear_logprob(head.hidden, head.weight, head.target).logprob.detach()
    reference = logprob + torch.tensor([0.5, -2.0, 3.0], device=device)
    for row, (value, slope) in enumerate(expected):
        weight = torch.zeros(3, device=device)
        weight[row] = 1.0
        advantage = torch.zeros(3, device=device)
        objective = Grpo(
            weight, advantage, reference, 1.0, rollout_logprob=logprob - math.log(2), **settings
        )
        out = linear_policy_loss(
            head.hidden.requires_grad_(), head.weight, head.target, objective, backend=backend
        )
        assert out.loss.item() == pytest.approx(value, abs=2e-4)
        (found,) = torch.autograd.grad(out.loss, head.hidden)
        nll = linear_policy_loss(
            head.hidden, head.weight, head.target, Nll(weight), backend=backend
        ).loss
        (unit,) = torch.autograd.grad(nll, head.hidden)
        # The loss is a function of the log-probability alone: its gradient is slope times that.
        torch.testing.assert_close(found, -slope * unit, rtol=1e-3, atol=1e-5)


def test_a_penalty_without_its_constants_is_rejected() -> None:
    row = torch.ones(2)
    with pytest.raises(ValueError, match="needs ref_logprob"):
        Grpo(row, row, kl_coef=0.1)
    with pytest.raises(ValueError, match="needs rollout_logprob"):
        Grpo(row, row, row, 0.1, "rollout")


@dataclass(frozen=True)
class Focal(Objective):
    """An objective that no backend knows, as kernels/README.md shows it."""

    gamma: float = 2.0

    def token_loss(self, logprob: Tensor) -> Tensor:
        return -self.token_weight * (1 - logprob.exp()) ** self.gamma * logprob


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_new_objective_is_one_function(backend: str) -> None:
    skip_unless_served(OP, backend, torch.float32)
    device = device_for(backend)
    head = make_head(13, 17, 131, device=device)
    weight = make_objective("nll", 13, device, trained=0.6).token_weight
    exact = evaluate(head, Focal(weight), "reference", torch.float64)
    torchs = evaluate(head, Focal(weight), "reference")
    assert_found(evaluate(head, Focal(weight), backend), torchs, exact, 2.0)


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
@pytest.mark.parametrize("bad", [-1, 131, 2**40])
def test_target_outside_the_vocabulary(backend: str, bad: int) -> None:
    skip_unless_served(OP, backend, torch.float32)
    device = device_for(backend)
    head = make_head(9, 17, 131, device=device)
    head.target[4] = bad
    objective = make_objective("nll", 9, device)
    if device.type == "cpu":
        with pytest.raises(IndexError, match=r"outside the vocabulary \[0, 131\).*row 4"):
            linear_policy_loss(head.hidden, head.weight, head.target, objective, backend=backend)
    else:
        out = linear_policy_loss(head.hidden, head.weight, head.target, objective, backend=backend)
        assert out.loss.isnan()
        assert out.logprob.isnan().nonzero().tolist() == [[4]]


def test_row_kernels_survive_targets_outside_the_vocabulary() -> None:
    """The GPU relies on it: no access outside, NaN for the row, the other rows untouched."""
    from nemocascade_kernels.linear_policy_loss import triton as kernels

    device = device_for("triton")
    logits = torch.randn(4, 70, device=device)
    target = torch.tensor([3, -1, 70, 2**40], device=device)
    filled = torch.tensor(4, device=device)
    weight, row = torch.ones(4, device=device), FusedRow("nll")
    out = kernels.fused_rows(logits, target, 1.0, weight, row, 1.0, filled, 0, True, True)
    assert out[1].isnan().tolist() == [False, True, True, True]
    assert out[0].isnan().tolist() == [False, True, True, True]
    assert not logits[0].isnan().any()


def test_slots_that_are_not_filled_count_nothing() -> None:
    """The GPU's static slots: those behind the last row give zeros."""
    from nemocascade_kernels.linear_policy_loss import triton as kernels

    device = device_for("triton")
    logits = torch.full((4, 70), math.nan, device=device)
    logits[0] = torch.randn(70)
    target = torch.zeros(4, dtype=torch.int64, device=device)
    filled = torch.tensor(6, device=device)
    weight, row = torch.ones(4, device=device), FusedRow("nll")
    out = kernels.fused_rows(logits, target, 1.0, weight, row, 1.0, filled, 5, False, True)
    assert out[0, 0] > 0
    assert not out[:, 1:].any()
    assert not logits[1:].any()
    assert logits[0].any()


def test_compaction_on_the_device_is_stable_and_needs_no_count() -> None:
    """The partition that a GPU makes, against the list of rows that a CPU makes."""
    weight = make_objective("nll", 41, trained=0.3).token_weight
    index, filled = partition(weight != 0)
    count = int(filled)
    assert index[:count].tolist() == weight.nonzero()[:, 0].tolist()
    assert index[count:].tolist() == (weight == 0).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("bound", [None, 12, 30])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_static_slots_give_the_same_result(
    backend: str, bound: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's walk over slots, forced on the CPU: same bits where the rows are the same."""
    from nemocascade_kernels.linear_policy_loss import op

    skip_unless_served(OP, backend, torch.float32)
    device = device_for(backend)
    head = make_head(30, 17, 131, device=device)
    objective = make_objective("mopd", 30, device, trained=0.3)
    assert int((objective.token_weight != 0).sum()) <= 12
    plain = evaluate(head, objective, backend)
    head.hidden[objective.token_weight == 0] = math.nan
    dirty = with_nan_where_not_trained(objective)
    monkeypatch.setattr(op, "trained_rows", static_slots)
    static = evaluate(head, dirty, backend, active_rows=bound)
    for name, a, b in zip(Found._fields, static, plain, strict=True):
        assert rms_error(a, b) < 1e-6, name
    out = linear_policy_loss(
        head.hidden, head.weight, head.target, dirty, backend=backend, active_rows=bound
    )
    assert out.metrics["tokens"] == (objective.token_weight != 0).sum()
    assert not any(value.isnan() for value in out.metrics.values())
    low = linear_policy_loss(
        head.hidden, head.weight, head.target, dirty, backend=backend, active_rows=3
    )
    assert low.loss.isnan(), "a bound that is too low must not look right"


def test_a_bound_that_is_too_low_is_an_error_on_a_cpu() -> None:
    head = make_head(9, 5, 11)
    with pytest.raises(ValueError, match=r"9 rows have a token_weight.*active_rows=4"):
        linear_policy_loss(head.hidden, head.weight, head.target, Nll(torch.ones(9)), active_rows=4)


@pytest.mark.parametrize("main_grad", [False, True])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_weight_gradient_accumulates_in_float32(
    backend: str, main_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over 60 chunks a bfloat16 sum would be several times further off than one product is."""
    skip_unless_served(OP, backend, torch.bfloat16)
    head = make_head(480, 5, 33, torch.bfloat16)
    chunked(monkeypatch, 3)(head.weight)
    weight = torch.ones(480)
    exact = evaluate(head, Nll(weight), "reference", torch.float64).weight_grad
    torchs = evaluate(head, Nll(weight), "reference").weight_grad
    if main_grad:
        hidden, leaf = head.leaves()
        leaf.main_grad = torch.zeros_like(leaf, dtype=torch.float32)
        linear_policy_loss(
            hidden, leaf, head.target, Nll(weight), backend=backend, accumulate_main_grad=True
        ).loss.backward()
        ours = leaf.main_grad
    else:
        ours = evaluate(head, Nll(weight), backend).weight_grad
    assert rms_error(ours, exact) < 1.5 * rms_error(torchs, exact)


@pytest.mark.parametrize("main_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_main_grad(backend: str, main_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = torch.bfloat16
    skip_unless_served(OP, backend, dtype)
    device = device_for(backend)
    head = make_head(40, 17, 131, dtype, device)
    chunked(monkeypatch, 7)(head.weight)
    objective = make_objective("nll", 40, device, trained=0.8)
    plain = evaluate(head, objective, backend, upstream=4.0)
    hidden, weight = head.leaves()
    weight.main_grad = torch.ones_like(weight, dtype=main_dtype)
    seen = []
    weight.register_post_accumulate_grad_hook(lambda parameter: seen.append(parameter.grad.shape))
    out = linear_policy_loss(
        hidden, weight, head.target, objective, backend=backend, accumulate_main_grad=True,
        grad_scale=4.0,
    )  # fmt: skip
    (out.loss * 4.0).backward()
    assert weight.grad_added_to_main_grad
    assert seen == [weight.shape], "Megatron-Core's hook must see a gradient"
    found = weight.main_grad.float() - 1
    assert rms_error(found, plain.weight_grad) < (0.01 if main_dtype == torch.float32 else 0.1)
    assert hidden.grad is not None
    assert_same_bits("hidden", hidden.grad, plain.hidden_grad)


def test_main_grad_rejects_a_scale_that_was_not_promised() -> None:
    head = make_head(9, 5, 11)
    hidden, weight = head.leaves()
    weight.main_grad = torch.zeros_like(weight)
    out = linear_policy_loss(
        hidden, weight, head.target, Nll(torch.ones(9)), accumulate_main_grad=True
    )
    with pytest.raises(ValueError, match=r"gradient 3\.0, and grad_scale=1\.0"):
        (out.loss * 3).backward()


def test_main_grad_is_left_alone_without_autograd() -> None:
    head = make_head(9, 5, 11)
    _, weight = head.leaves()
    weight.main_grad = torch.zeros_like(weight)
    with torch.no_grad():
        linear_policy_loss(
            head.hidden, weight, head.target, Nll(torch.ones(9)), accumulate_main_grad=True
        )
    assert not weight.main_grad.any()


def test_gradients_are_handed_out_once() -> None:
    head = make_head(9, 5, 11)
    hidden, weight = head.leaves()
    loss = linear_policy_loss(hidden, weight, head.target, Nll(torch.ones(9))).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="returned its gradients already"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str, dtype: torch.dtype) -> None:
    """Transposed matrices, a strided target, and one weight that stands for all tokens."""
    skip_unless_served(OP, backend, dtype)
    device = device_for(backend)
    head = make_head(12, 8, 40, dtype, device)
    spread = Head(
        head.hidden.t().contiguous().t(),
        head.weight.t().contiguous().t(),
        head.target.repeat_interleave(2)[::2],
    )
    expanded = Nll(torch.full((1,), 0.25, device=device).expand(12))
    plain = evaluate(head, Nll(torch.full((12,), 0.25, device=device)), backend)
    found = evaluate(spread, expanded, backend)
    for name, a, b in zip(Found._fields, found, plain, strict=True):
        assert rms_error(a, b) < (1e-6 if dtype == torch.float32 else 0.01), name


def test_autocast_changes_nothing() -> None:
    head = make_head(9, 5, 11)
    objective = make_objective("grpo", 9, trained=0.5)
    plain = evaluate(head, objective, "torch")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = evaluate(head, objective, "torch")
    for name, a, b in zip(Found._fields, inside, plain, strict=True):
        assert_same_bits(name, a, b)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_the_gradient_that_is_needed(frozen: str) -> None:
    head = make_head(9, 5, 11)
    both = evaluate(head, Nll(torch.ones(9)), "torch")
    hidden, weight = head.leaves()
    {"hidden": hidden, "weight": weight}[frozen].requires_grad_(False)
    linear_policy_loss(
        hidden, weight, head.target, Nll(torch.ones(9)), backend="torch"
    ).loss.backward()
    if frozen == "hidden":
        assert hidden.grad is None
        assert_same_bits("weight", weight.grad, both.weight_grad)
    else:
        assert weight.grad is None
        assert_same_bits("hidden", hidden.grad, both.hidden_grad)


def test_arguments_are_checked() -> None:
    head = make_head(4, 3, 5)
    good = Nll(torch.ones(4))
    for arguments, message in (
        ((head.hidden[:, :2], head.weight, head.target, good), "same H"),
        ((head.hidden[:2], head.weight, head.target, good), "same T"),
        ((head.hidden.half(), head.weight, head.target, good), "share one dtype"),
        ((head.hidden, head.weight, head.target.int(), good), "int64"),
        ((head.hidden, head.weight, head.target, Nll(torch.ones(3))), r"token_weight is \(3,\)"),
        ((head.hidden, head.weight, head.target, Nll(torch.ones(4).half())), "torch.float16"),
    ):
        with pytest.raises(ValueError, match=message):
            linear_policy_loss(*arguments)
    with pytest.raises(ValueError, match="temperature must be > 0"):
        linear_policy_loss(head.hidden, head.weight, head.target, good, temperature=0.0)
    with pytest.raises(ValueError, match="needs ref_logprob"):
        make_objective("grpo", 4).__class__(torch.ones(4), torch.ones(4), None, 0.1)
    with pytest.raises(ValueError, match="has no backend 'cuda'"):
        linear_policy_loss(head.hidden, head.weight, head.target, good, backend="cuda")
    head.weight.main_grad = torch.zeros_like(head.weight)
    with pytest.raises(backends.BackendUnavailableError, match="accumulate_main_grad"):
        linear_policy_loss(
            head.hidden, head.weight, head.target, good, backend="reference",
            accumulate_main_grad=True,
        )  # fmt: skip


def test_chunks_cover_every_row_once_and_keep_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "LOGITS_BYTES", {"cpu": 64 << 20})
    for rows in (0, 1, 127, 128, 1000, 8192, 8193):
        for vocabulary in (7, 1000, 131072):
            weight = torch.empty(vocabulary, 1, dtype=torch.bfloat16)
            for ranks, heads in ((1, 1), (2, 1), (1, 2), (2, 2)):
                buffers = ranks * heads
                pieces = chunking.chunks(rows, weight, buffers)
                covered = [row for piece in pieces for row in range(piece.start, piece.stop)]
                assert covered == list(range(rows))
                longest = max((piece.stop - piece.start for piece in pieces), default=0)
                held = longest * vocabulary * 2 * buffers
                assert held <= 64 << 20
                assert held == logits_bytes(
                    rows, vocabulary, 2, device="cpu", ranks=ranks, heads=heads
                )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_no_synchronisation_and_cuda_graphs(kind: str) -> None:
    """One capture serves other weights, targets and numbers of trained rows; nothing waits."""
    device = torch.device("cuda")
    head = make_head(300, 64, 1000, torch.bfloat16, device)
    hidden, weight = head.leaves()
    objective = make_objective(kind, 300, device, trained=0.5)

    def step() -> Tensor:
        hidden.grad = weight.grad = None
        out = linear_policy_loss(hidden, weight, head.target, objective, return_entropy=True)
        out.loss.backward()
        return out.loss.detach()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            loss = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    captured = (hidden.grad, weight.grad)
    other = make_objective(kind, 300, device, trained=0.2, seed=99)
    for name, value in other.tensors().items():
        objective.tensors()[name].copy_(value)
    graph.replay()
    expected = evaluate(head, other, "triton")
    assert captured[0] is not None
    assert captured[1] is not None
    assert rms_error(loss, expected.loss) < 1e-5
    assert rms_error(captured[0], expected.hidden_grad) < 1e-2
    assert rms_error(captured[1], expected.weight_grad) < 1e-2
