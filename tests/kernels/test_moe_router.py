"""moe_route and its losses, against the definition, Megatron-Core and Hugging Face transformers."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from helpers.layers import kept_for_backward
from nemocascade_kernels import (
    Routing,
    load_balance_loss,
    make_routing,
    moe_route,
    update_expert_bias,
    z_loss,
)
from nemocascade_kernels.backends import BackendUnavailableError
from nemocascade_kernels.moe_router.op import OP
from nemocascade_kernels.moe_router.state import zeroed_state
from nemocascade_kernels.testing import (
    PoisonedMemory,
    assert_as_accurate,
    assert_same_bits,
    kernel_device,
    random_normal,
)
from torch import Tensor

INTEGER_FIELDS = ("experts", "counts", "order", "offsets", "positions")


def implementations() -> list[str]:
    return [name for name in OP.backends if name != "reference"]


@pytest.fixture(params=implementations())
def backend(request: pytest.FixtureRequest) -> str:
    """Every implementation but the reference; one that cannot run here is skipped, with why."""
    name: str = request.param
    sample = torch.zeros(1, 2, device=device_of(name))
    try:
        OP.chosen(sample, backend=name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return name


def device_of(backend: str) -> torch.device:
    return kernel_device() if backend in ("triton", "cuda") else torch.device("cpu")


def spaced_logits(tokens: int, experts: int, seed: int, device: torch.device) -> Tensor:
    """Logits whose scores within a token differ by far more than any rounding."""
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(tokens, experts, generator=generator).argsort(dim=-1)
    return ((ranks - experts / 2) * (6.0 / experts)).to(device)


def assert_sorted(routing: Routing) -> None:
    """The integer fields fit each other, whatever the choice was."""
    flat = routing.experts.reshape(-1).long().cpu()
    experts = routing.num_experts
    counts = torch.bincount(flat, minlength=experts + 1)[:experts]
    assert torch.equal(routing.counts.cpu().long(), counts)
    assert torch.equal(
        routing.offsets.cpu().long(), torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    )
    assert torch.equal(routing.order.cpu().long(), torch.argsort(flat, stable=True))
    slots = torch.arange(flat.numel())
    assert torch.equal(
        routing.order.cpu().long()[routing.positions.cpu().reshape(-1).long()], slots
    )
    assert all(getattr(routing, name).dtype == torch.int32 for name in INTEGER_FIELDS)


SETTINGS: list[dict[str, Any]] = [
    {"top_k": 2},
    {"top_k": 6, "scale": 2.5},
    {"top_k": 1, "normalize": False},
    {"top_k": 4, "score": "softmax"},
    {"top_k": 4, "score": "softmax", "normalize": False, "scale": 0.5},
    {"top_k": 3, "num_groups": 4, "top_groups": 2, "scale": 2.5},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "experts"), [(1, 8), (67, 12), (37, 132)])
def test_equals_the_reference(
    backend: str, tokens: int, experts: int, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    device = device_of(backend)
    logits = spaced_logits(tokens, experts, 1, device).to(dtype)
    bias = random_normal(experts, seed=2, scale=1e-3, device=device)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(3)) > 0.3
    grad = random_normal(tokens, settings["top_k"], seed=4, device=device)
    results = {}
    for name, kind, demanded in (
        ("ours", dtype, backend),
        ("torchs", dtype, "reference"),
        ("exact", torch.float64, "reference"),
    ):
        leaf = logits.to(kind, copy=True).requires_grad_()
        with PoisonedMemory():
            routing = moe_route(
                leaf, expert_bias=bias, token_mask=mask.to(device), backend=demanded, **settings
            )
            routing.weights.backward(grad.to(routing.weights.dtype))
        results[name] = routing, leaf.grad
    ours, torchs, exact = (results[name] for name in ("ours", "torchs", "exact"))
    for name in INTEGER_FIELDS:
        assert torch.equal(getattr(ours[0], name), getattr(exact[0], name)), name
    assert_sorted(ours[0])
    assert ours[0].weights.dtype == torch.float32
    assert_as_accurate("weights", ours[0].weights, torchs[0].weights, exact[0].weights, factor=4.0)
    assert_as_accurate("gradient", ours[1], torchs[1], exact[1], factor=4.0)


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_lower_id_wins_a_tie(backend: str, score: str) -> None:
    device = device_of(backend)
    logits = torch.zeros(5, 70, device=device)
    logits[1, 3::2] = 1.0
    logits[2] = torch.tensor([-0.0, 0.0] * 35)
    logits[3, 60:] = 40.0  # sigmoid saturates: all of these score 1
    logits[3, 64:] = 50.0
    experts = moe_route(logits, 4, score=score, backend=backend).experts.cpu().tolist()
    assert experts[0] == [0, 1, 2, 3]
    assert experts[1] == [3, 5, 7, 9]
    assert experts[2] == [0, 1, 2, 3]
    assert experts[3] == ([60, 61, 62, 63] if score == "sigmoid" else [64, 65, 66, 67])
    assert experts[4] == [0, 1, 2, 3]


@pytest.mark.parametrize(("experts", "top_k"), [(12, 12), (70, 8), (260, 10)])
def test_ties_within_and_between_neighbours(backend: str, experts: int, top_k: int) -> None:
    """Few distinct scores: every choice is a tie, often of neighbours, and some experts are out."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(23)
    logits = torch.randint(0, 3, (70, experts), generator=generator).float().to(device)
    logits[5] = torch.arange(experts) // 16 % 2  # all choices are in one run of neighbours
    bias = torch.zeros(experts, device=device)
    bias[3::4] = -torch.inf
    ours, expected = (
        moe_route(logits, top_k, expert_bias=bias, backend=name) for name in (backend, "reference")
    )
    for name in INTEGER_FIELDS:
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name


def test_replayed_experts_may_repeat_across_tiles(backend: str) -> None:
    """Every slot of many tokens has one of two experts, or none: ranks count each repetition."""
    device = device_of(backend)
    recorded = torch.randint(0, 3, (75, 5), generator=torch.Generator().manual_seed(24)).to(device)
    mask = torch.arange(75, device=device) % 4 != 1
    mask[40:] = True
    logits = random_normal(75, 6, seed=25, device=device)
    routing = moe_route(logits, 5, experts=recorded, token_mask=mask, backend=backend)
    assert torch.equal(routing.experts, recorded.masked_fill(~mask[:, None], 6).int())
    assert_sorted(routing)
    assert_sorted(make_routing(recorded, routing.weights, 2, backend=backend))


def test_tied_groups_and_negative_scores(backend: str) -> None:
    device = device_of(backend)
    logits = torch.zeros(2, 16, device=device)
    bias = torch.full((16,), -3.0, device=device)
    bias[12:] = -2.0
    route = moe_route(logits, 3, expert_bias=bias, num_groups=4, top_groups=2, backend=backend)
    assert route.experts.tolist() == [[12, 13, 14]] * 2
    route = moe_route(logits, 6, num_groups=4, top_groups=2, backend=backend)
    assert route.experts.tolist() == [[0, 1, 2, 3, 4, 5]] * 2


def test_bias_selects_and_does_not_weigh(backend: str) -> None:
    device = device_of(backend)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    bias = torch.tensor([-1.0, 0.0, 0.0, 1.0], device=device)
    routing = moe_route(logits, 2, expert_bias=bias, backend=backend)
    assert routing.experts.tolist() == [[3, 1]]
    scores = logits.sigmoid()[0, [3, 1]]
    torch.testing.assert_close(routing.weights[0], scores / scores.sum())


def test_masked_tokens_go_nowhere_whatever_they_hold(backend: str) -> None:
    device = device_of(backend)
    clean = spaced_logits(40, 8, 5, device)
    dirty = clean.clone()
    mask = torch.arange(40, device=device) % 3 != 0
    dirty[~mask] = torch.nan
    grads = []
    for logits in (clean, dirty):
        leaf = logits.clone().requires_grad_()
        routing = moe_route(leaf, 2, token_mask=mask, backend=backend)
        routing.weights.square().sum().backward()
        grads.append((routing, leaf.grad))
    (clean_routing, clean_grad), (routing, grad) = grads
    for field in fields(Routing):
        assert_same_bits(
            field.name, getattr(routing, field.name), getattr(clean_routing, field.name)
        )
    assert_same_bits("gradient", grad, clean_grad)
    assert (routing.experts[~mask] == 8).all()
    assert (routing.weights[~mask] == 0).all()
    assert (grad[~mask] == 0).all()
    assert int(routing.offsets[-1]) == 2 * int(mask.sum())
    assert_sorted(routing)


def test_nan_still_gives_distinct_experts(backend: str) -> None:
    """A broken token must not make a kernel read or write out of bounds."""
    device = device_of(backend)
    logits = spaced_logits(6, 9, 6, device)
    logits[1] = torch.nan
    logits[2, 4] = torch.nan
    logits[3] = -torch.inf
    logits[4, :5] = torch.inf
    for score in ("sigmoid", "softmax"):
        routing = moe_route(logits, 4, score=score, backend=backend)
        assert_sorted(routing)
        assert all(len(set(row)) == 4 and max(row) < 9 for row in routing.experts.tolist())
        assert torch.isfinite(routing.weights[[0, 5]]).all()


@pytest.mark.parametrize("tokens", [0, 1])
def test_hardly_any_tokens(backend: str, tokens: int) -> None:
    logits = torch.zeros(tokens, 4, device=device_of(backend), requires_grad=True)
    routing = moe_route(logits, 2, backend=backend)
    routing.weights.sum().backward()
    assert_sorted(routing)
    assert logits.grad.shape == (tokens, 4)


def test_all_tokens_masked(backend: str) -> None:
    device = device_of(backend)
    logits = torch.zeros(7, 4, device=device, requires_grad=True)
    routing = moe_route(
        logits, 2, token_mask=torch.zeros(7, dtype=torch.bool, device=device), backend=backend
    )
    routing.weights.sum().backward()
    assert routing.counts.tolist() == [0, 0, 0, 0]
    assert_sorted(routing)
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_replay_gives_the_recorded_routing(backend: str, score: str) -> None:
    """Recorded experts with other logits: their scores are weighed, and they get the gradient."""
    device = device_of(backend)
    recorded = moe_route(spaced_logits(50, 12, 7, device), 3, backend=backend).experts
    recorded[10] = 12  # a token that had no expert
    recorded[11, 1] = recorded[11, 0]  # no router writes this; nothing may break on it
    logits = random_normal(50, 12, seed=8, device=device)
    grad = random_normal(50, 3, seed=9, device=device)
    grads, routings = [], []
    for name in (backend, "reference"):
        leaf = logits.clone().requires_grad_()
        routings.append(moe_route(leaf, 3, score=score, experts=recorded, backend=name))
        routings[-1].weights.backward(grad)
        grads.append(leaf.grad)
    for name in INTEGER_FIELDS:
        assert torch.equal(getattr(routings[0], name), getattr(routings[1], name)), name
    assert torch.equal(routings[0].experts, recorded)
    torch.testing.assert_close(routings[0].weights, routings[1].weights)
    torch.testing.assert_close(grads[0], grads[1])
    assert (grads[0][10] == 0).all()


def test_make_routing_sorts_given_experts(backend: str) -> None:
    device = device_of(backend)
    generator = torch.Generator().manual_seed(10)
    experts = torch.randint(0, 8, (300, 1), generator=generator).to(device)
    routing = make_routing(experts, torch.ones(300, 1, device=device), 7, backend=backend)
    assert_sorted(routing)
    assert torch.equal(routing.experts.long(), experts)


def test_ids_out_of_range_count_as_no_expert_on_a_gpu() -> None:
    device = kernel_device()
    ids = torch.tensor([[0, 9], [-3, 1], [2, 2]], device=device)
    routing = make_routing(ids, torch.ones(3, 2, device=device), 3, backend="triton")
    assert routing.counts.tolist() == [1, 1, 2]
    assert routing.order.tolist() == [0, 3, 4, 5, 1, 2]


def test_programs_of_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks go on from tile to tile of a program, and from program to program."""
    triton_module = pytest.importorskip("nemocascade_kernels.moe_router.triton")
    monkeypatch.setattr(triton_module, "_MOST_PROGRAMS", 3)
    device = kernel_device()
    logits = random_normal(700, 16, seed=10, device=device)
    mask = torch.arange(700, device=device) % 5 != 0
    ours, expected = (
        moe_route(logits, 2, token_mask=mask, backend=name) for name in ("triton", "reference")
    )
    for name in INTEGER_FIELDS:
        assert torch.equal(getattr(ours, name), getattr(expected, name)), name


def test_counters_are_zero_after_every_launch() -> None:
    """The next launch counts from them, with any number of programs."""
    from nemocascade_kernels.moe_router.triton_kernels import COUNTERS

    device = kernel_device()
    for tokens, top_k in ((700, 2), (0, 3), (5, 1), (700, 2)):
        logits = random_normal(tokens, 21, seed=30, device=device)
        assert_sorted(moe_route(logits, top_k, backend="triton"))
        state = zeroed_state(device, COUNTERS.value + 21)
        assert state is zeroed_state(device, COUNTERS.value + 21), "launches of a stream share them"
        assert not state.any()


def test_same_bits_on_every_run(backend: str) -> None:
    device = device_of(backend)
    logits = random_normal(300, 24, seed=11, device=device)
    first, second = (moe_route(logits, 4, backend=backend) for _ in range(2))
    for field in fields(Routing):
        assert_same_bits(field.name, getattr(first, field.name), getattr(second, field.name))


def test_gradient_is_the_derivative(backend: str) -> None:
    """Against differences of the reference in float64, on the chosen branch."""
    device = device_of(backend)
    logits = spaced_logits(3, 6, 12, device).requires_grad_()
    weight = random_normal(3, 2, seed=13, device=device)
    (moe_route(logits, 2, scale=2.5, backend=backend).weights * weight).sum().backward()
    exact = logits.detach().double().cpu()
    step = 1e-5
    for t in range(3):
        for e in range(6):
            values = []
            for sign in (1, -1):
                moved = exact.clone()
                moved[t, e] += sign * step
                routing = moe_route(moved, 2, scale=2.5, backend="reference")
                values.append((routing.weights * weight.double().cpu()).sum().item())
            slope = (values[0] - values[1]) / (2 * step)
            assert logits.grad[t, e].item() == pytest.approx(slope, abs=2e-6)


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"top_k=9.*expert_bias.*token_mask"):
        moe_route(
            torch.zeros(3, 8),
            9,
            expert_bias=torch.zeros(7),
            token_mask=torch.ones(3),
        )
    with pytest.raises(ValueError, match=r"4294967296 slots .* below 2\^31"):
        moe_route(torch.zeros(1, 4).expand(2**31, 4), 2)
    with pytest.raises(ValueError, match=r"below 2\^31"):
        make_routing(
            torch.zeros(1, 1, dtype=torch.int32).expand(2**31, 1),
            torch.zeros(1, 1).expand(2**31, 1),
            4,
        )
    with pytest.raises(ValueError, match="num_groups=3 must divide"):
        moe_route(torch.zeros(3, 8), 1, num_groups=3)
    with pytest.raises(ValueError, match="choose one of"):
        moe_route(torch.zeros(3, 8), 1, score="tanh")


def test_experts_out_of_range_are_rejected_on_cpu() -> None:
    with pytest.raises(RuntimeError, match=r"experts hold 9"):
        make_routing(torch.tensor([[9]]), torch.ones(1, 1), 8, backend="native")


class TestOracles:
    """Megatron-Core's and transformers' own routers."""

    @pytest.mark.parametrize("score", ["sigmoid", "softmax"])
    def test_megatron(self, score: str) -> None:
        moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
        logits = spaced_logits(64, 16, 14, torch.device("cpu"))
        bias = random_normal(16, seed=15, scale=1e-3) if score == "sigmoid" else None
        probs, chosen = moe_utils.topk_routing_with_score_function(
            logits, 4, use_pre_softmax=False, scaling_factor=2.5, score_function=score,
            expert_bias=bias,
        )  # fmt: skip
        routing = moe_route(logits, 4, score=score, expert_bias=bias, scale=2.5)
        dense = torch.zeros_like(probs).scatter(1, routing.experts.long(), routing.weights)
        torch.testing.assert_close(dense, probs)
        assert torch.equal(dense > 0, chosen)

    def test_megatron_groups(self) -> None:
        moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
        logits = spaced_logits(64, 32, 16, torch.device("cpu"))
        # Megatron-Core sums top_k / top_groups scores of a group: two here, as we always do.
        probs, _ = moe_utils.topk_routing_with_score_function(
            logits, 4, num_groups=8, group_topk=2, score_function="sigmoid"
        )
        routing = moe_route(logits, 4, num_groups=8, top_groups=2)
        dense = torch.zeros_like(probs).scatter(1, routing.experts.long(), routing.weights)
        torch.testing.assert_close(dense, probs)

    @pytest.mark.parametrize("groups", [(1, 1), (8, 3)])
    def test_transformers_nemotron_h(self, groups: tuple[int, int]) -> None:
        module = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
        config = pytest.importorskip("transformers").NemotronHConfig(
            hidden_size=16, n_routed_experts=32, num_experts_per_tok=4, n_group=groups[0],
            topk_group=groups[1], routed_scaling_factor=2.5, norm_topk_prob=True,
        )  # fmt: skip
        router = module.NemotronHTopkRouter(config)
        torch.nn.init.normal_(router.weight, generator=torch.Generator().manual_seed(17))
        router.e_score_correction_bias.copy_(random_normal(32, seed=18, scale=0.01))
        logits, weights, experts = router(random_normal(50, 16, seed=19))
        routing = moe_route(
            logits, 4, expert_bias=router.e_score_correction_bias, scale=2.5,
            num_groups=groups[0], top_groups=groups[1],
        )  # fmt: skip
        dense = torch.zeros_like(logits).scatter(1, experts, weights)
        ours = torch.zeros_like(logits).scatter(1, routing.experts.long(), routing.weights)
        torch.testing.assert_close(ours, dense)


class TestLosses:
    CU_SEQLENS = (0, 7, 7, 20, 33)  # one empty document; tokens 33.. are padding

    def setup_method(self) -> None:
        self.logits = random_normal(40, 8, seed=20, requires_grad=True)
        self.mask = torch.ones(40, dtype=torch.bool)
        self.mask[[3, 25]] = False
        self.cu = torch.tensor(self.CU_SEQLENS, dtype=torch.int32)
        self.routing = moe_route(self.logits.detach(), 2, token_mask=self.mask)

    def plain(self, keep: list[int], coef: float) -> Tensor:
        """Switch Transformer's loss of some tokens, written as printed."""
        scores = self.logits[keep].sigmoid()
        shares = (scores / scores.sum(-1, keepdim=True)).mean(0)
        chosen = self.routing.experts[keep].long()
        loads = torch.bincount(chosen.reshape(-1), minlength=8) / chosen.numel()
        return coef * 8 * (shares * loads).sum()

    def documents(self) -> list[list[int]]:
        bounds = zip(self.CU_SEQLENS, self.CU_SEQLENS[1:], strict=False)
        kept = [[t for t in range(a, b) if self.mask[t]] for a, b in bounds]
        return [keep for keep in kept if keep]

    def test_sequence_loss_and_gradient(self) -> None:
        loss = load_balance_loss(self.logits, self.routing, self.cu, 0.01, token_mask=self.mask)
        expected = torch.stack([self.plain(keep, 0.01) for keep in self.documents()]).mean()
        torch.testing.assert_close(loss, expected)
        (grad,) = torch.autograd.grad(loss, self.logits)
        torch.testing.assert_close(grad, torch.autograd.grad(expected, self.logits)[0])
        assert (grad[33:] == 0).all()
        assert (grad[~self.mask] == 0).all()

    def test_backward_keeps_no_scores(self) -> None:
        def losses() -> Tensor:
            balance = load_balance_loss(self.logits, self.routing, self.cu, token_mask=self.mask)
            return balance + z_loss(self.logits, token_mask=self.mask)

        own = self.logits.data_ptr()
        kept = [t for t in kept_for_backward(losses) if t.data_ptr() != own]
        assert all(tensor.numel() < self.logits.numel() for tensor in kept)

    def test_global_loss(self) -> None:
        loss = load_balance_loss(
            self.logits, self.routing, self.cu, 0.01, kind="global", token_mask=self.mask
        )
        keep = [t for document in self.documents() for t in document]
        torch.testing.assert_close(loss, self.plain(keep, 0.01))

    def test_even_load_gives_the_coefficient(self) -> None:
        experts = torch.arange(16).view(8, 2) % 8
        routing = make_routing(experts, torch.ones(8, 2), 8)
        loss = load_balance_loss(torch.zeros(8, 8), routing, None, 0.3, kind="global")
        assert loss.item() == pytest.approx(0.3)

    def test_other_documents_and_padding_never_count(self) -> None:
        grads = []
        for noise in (0.0, 5.0):
            logits = self.logits.detach().clone()
            logits[20:33] += noise * random_normal(13, 8, seed=21)
            logits[33:] = torch.nan
            mask = self.mask.clone()
            mask[33:] = False
            leaf = logits.requires_grad_()
            routing = moe_route(leaf, 2, token_mask=mask)
            load_balance_loss(leaf, routing, self.cu, token_mask=mask).backward()
            z_loss(leaf, token_mask=mask).backward()
            grads.append(leaf.grad)
        assert_same_bits("gradient", grads[0][:20], grads[1][:20])
        assert (grads[1][33:] == 0).all()

    def test_megatron_agrees(self) -> None:
        moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
        routing = moe_route(self.logits.detach(), 2)
        scores = self.logits.sigmoid()
        expected = moe_utils.switch_load_balancing_loss_func(
            scores / scores.sum(-1, keepdim=True), routing.counts, 40, 2, 8, 0.01
        )
        loss = load_balance_loss(self.logits, routing, None, 0.01, kind="global")
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(
            z_loss(self.logits, 0.5), moe_utils.z_loss_func(self.logits, 0.5)
        )

    @pytest.mark.parametrize("kind", ["sequence", "global"])
    def test_ranks_add_up(self, kind: str) -> None:
        """Tokens split over two ranks: with `reduce`, losses and gradients are the whole pack's."""
        whole = load_balance_loss(
            self.logits, self.routing, self.cu, kind=kind, token_mask=self.mask
        )
        (grad,) = torch.autograd.grad(whole, self.logits)
        cuts = (slice(0, 18), slice(18, 40))

        def rank(cut: slice, reduce: Any) -> Tensor:
            routing = moe_route(self.logits.detach()[cut], 2, token_mask=self.mask[cut])
            cu = (self.cu - cut.start).clamp(0, cut.stop - cut.start)
            return load_balance_loss(
                self.logits[cut], routing, cu, kind=kind, token_mask=self.mask[cut], reduce=reduce
            )

        sent: list[list[Tensor]] = [[], []]
        for parts, cut in zip(sent, cuts, strict=True):

            def send(counts: Tensor, parts: list[Tensor] = parts) -> Tensor:
                parts.append(counts)
                return counts

            rank(cut, send)
        summed = [sum(parts) for parts in zip(*sent, strict=True)]
        losses = []
        for cut in cuts:
            replies = iter(summed)
            losses.append(rank(cut, lambda counts, replies=replies: next(replies)))
        torch.testing.assert_close(sum(losses), whole)
        torch.testing.assert_close(torch.autograd.grad(sum(losses), self.logits)[0], grad)

    def test_bias_moves_against_the_load(self) -> None:
        bias = torch.tensor([0.5, 0.0, 0.0, -0.5])
        new = update_expert_bias(bias, torch.tensor([10, 4, 6, 4]), 1e-3)
        torch.testing.assert_close(new, torch.tensor([0.499, 1e-3, 0.0, -0.499]))
        assert bias[0] == 0.5

    def test_bias_balances_a_skewed_router(self) -> None:
        logits = random_normal(4096, 8, seed=22) + torch.linspace(-1, 1, 8)
        bias = torch.zeros(8)
        for _ in range(400):
            bias = update_expert_bias(bias, moe_route(logits, 2, expert_bias=bias).counts, 2e-3)
        counts = moe_route(logits, 2, expert_bias=bias).counts
        assert moe_route(logits, 2).counts.max() > 1.5 * 1024
        assert counts.max() < 1.1 * 1024

    def test_faults(self) -> None:
        with pytest.raises(ValueError, match="cu_seqlens"):
            load_balance_loss(self.logits, self.routing)
        with pytest.raises(ValueError, match="choose one of"):
            load_balance_loss(self.logits, self.routing, self.cu, kind="batch")
        with pytest.raises(ValueError, match="one shape"):
            update_expert_bias(torch.zeros(3), torch.zeros(4), 0.1)
