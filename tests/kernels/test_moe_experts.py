"""moe_experts, grouped_gemm and the permutations, against the definition in float64 and against
Hugging Face transformers' expert blocks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nemocascade_kernels import (
    Routing,
    grouped_gemm,
    make_routing,
    moe_experts,
    moe_permute,
    moe_route,
    moe_unpermute,
)
from nemocascade_kernels.backends import BackendUnavailableError, interpreting
from nemocascade_kernels.common.activations import activate
from nemocascade_kernels.moe_experts.op import OP
from nemocascade_kernels.testing import (
    PoisonedMemory,
    assert_as_accurate,
    assert_same_bits,
    kernel_device,
    random_normal,
    rms_error,
)
from torch import Tensor


@pytest.fixture(params=[name for name in OP.backends if name not in ("reference", "quack")])
def backend(request: pytest.FixtureRequest) -> str:
    """Every implementation that takes float32 but the reference; one that cannot run here is
    skipped, with why."""
    name: str = request.param
    sample = torch.zeros(1, 1, device=device_of(name))
    try:
        OP.chosen(sample, backend=name)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    return name


def skip_unless_served(backend: str, dtype: torch.dtype) -> None:
    sample = torch.zeros(1, 1, dtype=dtype, device=device_of(backend))
    if not OP.serves(sample, backend=backend):
        pytest.skip(OP.unavailable_because(sample))


def device_of(backend: str) -> torch.device:
    return kernel_device() if backend in ("triton", "quack") else torch.device("cpu")


def routing_of(kind: str, tokens: int, experts: int, top_k: int, seed: int) -> Routing:
    """Routings of every kind that a kernel may meet, with random weights. On the CPU."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=generator)
    if kind == "one_expert":
        logits[:, experts - 1] = 50.0
    elif kind == "empty_experts":
        logits[:, ::2] = -50.0
    elif kind == "skewed":
        logits += torch.linspace(3, 0, experts)
    mask = None
    if kind == "masked":
        mask = torch.rand(tokens, generator=generator) > 0.4
    elif kind == "all_masked":
        mask = torch.zeros(tokens, dtype=torch.bool)
    return moe_route(logits, top_k, scale=2.5, token_mask=mask, backend="reference")


def on(routing: Routing, device: torch.device, weights: Tensor) -> Routing:
    moved = {name: value.to(device) for name, value in vars(routing).items()}
    return Routing(**{**moved, "weights": weights})


class Problem:
    """Inputs of one call in any dtype, and what it gives: output and all four gradients."""

    names = ("output", "x", "routing weights", "w_up", "w_down")

    def __init__(
        self, routing: Routing, hidden: int, width: int, activation: str, seed: int = 0
    ) -> None:
        tokens, experts = routing.tokens, routing.num_experts
        gates = 2 if activation == "swiglu" else 1
        self.routing, self.activation = routing, activation
        self.x = random_normal(tokens, hidden, seed=seed)
        self.w_up = random_normal(experts, gates * width, hidden, seed=seed + 1, scale=hidden**-0.5)
        self.w_down = random_normal(experts, hidden, width, seed=seed + 2, scale=width**-0.5)
        self.grad = random_normal(tokens, hidden, seed=seed + 3)

    def solve(
        self, backend: str, dtype: torch.dtype, function: Any = None, device: Any = "cpu"
    ) -> tuple[Any, ...]:
        """Rounded to bfloat16 first, so that every dtype is given the same numbers."""
        leaves = [
            tensor.bfloat16().to(device=device, dtype=dtype, copy=True).requires_grad_()
            for tensor in (self.x, self.w_up, self.w_down)
        ]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        weights = self.routing.weights.to(device=device, dtype=wide, copy=True).requires_grad_()
        routing = on(self.routing, torch.device(device), weights)
        with PoisonedMemory():
            output = (function or moe_experts)(
                leaves[0], routing, *leaves[1:], activation=self.activation, backend=backend
            )
            output.backward(self.grad.bfloat16().to(device=device, dtype=dtype))
        return output.detach(), leaves[0].grad, weights.grad, leaves[1].grad, leaves[2].grad


def error_factor(backend: str, dtype: torch.dtype) -> float:
    """How much larger than torch's own error ours may be."""
    if dtype != torch.bfloat16:
        return 2.5
    # Elementwise products are rounded one by one, torch's in another order. And Triton's
    # interpreter cuts off where hardware rounds, which loses up to twice as much.
    return 7.0 if backend == "triton" and interpreting() else 3.5


def assert_solves(problem: Problem, backend: str, dtype: torch.dtype, function: Any = None) -> None:
    skip_unless_served(backend, dtype)
    ours = problem.solve(backend, dtype, function, device_of(backend))
    torchs = problem.solve("reference", dtype)
    exact = problem.solve("reference", torch.float64)
    for name, mine, plain, true in zip(Problem.names, ours, torchs, exact, strict=True):
        assert mine.dtype == plain.dtype
        if true.numel():
            factor = error_factor(backend, dtype)
            assert_as_accurate(name, mine.cpu(), plain, true, factor=factor, floor=4e-7)


KINDS = ("random", "one_expert", "empty_experts", "skewed", "masked", "all_masked")


@pytest.mark.parametrize(
    ("kind", "dtype", "activation"),
    [
        *((kind, torch.float32, "relu2") for kind in KINDS),
        *((kind, torch.bfloat16, "swiglu") for kind in KINDS),
        ("random", torch.bfloat16, "relu2"),
        ("random", torch.float32, "swiglu"),
        ("random", torch.float16, "relu2"),
    ],
    ids=str,
)
def test_equals_the_definition(
    backend: str, kind: str, dtype: torch.dtype, activation: str
) -> None:
    problem = Problem(routing_of(kind, 67, 6, 2, seed=1), 40, 24, activation)
    assert_solves(problem, backend, dtype)


@pytest.mark.parametrize("activation", ["relu2", "swiglu"])
@pytest.mark.parametrize("kind", KINDS)
def test_quack_equals_the_definition(kind: str, activation: str) -> None:
    problem = Problem(routing_of(kind, 67, 6, 2, seed=1), 40, 24, activation)
    assert_solves(problem, "quack", torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["random", "masked", "all_masked"])
def test_one_choice_a_token(backend: str, kind: str, dtype: torch.dtype) -> None:
    """No sum over choices is left: tokens without an expert still get zeros."""
    problem = Problem(routing_of(kind, 67, 6, 1, seed=2), 40, 24, "relu2")
    assert_solves(problem, backend, dtype)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "width"),
    [
        (1, 1, 1, 1, 1),
        (0, 4, 2, 8, 8),
        (3, 9, 4, 17, 31),
        (40, 3, 1, 65, 127),
        (150, 2, 2, 31, 65),
    ],
)
def test_odd_sizes(
    backend: str, tokens: int, experts: int, top_k: int, hidden: int, width: int
) -> None:
    routing = routing_of("random", tokens, experts, top_k, seed=2)
    for activation in ("relu2", "swiglu"):
        assert_solves(Problem(routing, hidden, width, activation), backend, torch.float32)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(
    ("kind", "activation"), [("skewed", "relu2"), ("masked", "swiglu"), ("one_expert", "relu2")]
)
def test_more_rows_than_a_window_of_the_cpu_path(kind: str, activation: str, cores: int) -> None:
    """Experts of several segments, cut by the backward's windows, on one thread and on two."""
    problem = Problem(routing_of(kind, 2500, 5, 2, seed=19), 20, 12, activation)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        assert_solves(problem, "native", torch.float32)
        runs = [problem.solve("native", torch.float32) for _ in range(2)]
    finally:
        torch.set_num_threads(before)
    for name, first, second in zip(Problem.names, *runs, strict=True):
        assert_same_bits(name, first, second)


@pytest.mark.parametrize(
    ("activation", "dtype"), [("relu2", torch.float32), ("swiglu", torch.bfloat16)], ids=str
)
@pytest.mark.parametrize("kind", ["random", "masked", "one_expert"])
def test_composition_equals_the_fused_op(
    backend: str, kind: str, activation: str, dtype: torch.dtype
) -> None:
    """moe_permute, grouped_gemm and moe_unpermute with autograd between them."""

    def composed(
        x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor, *, activation: str, backend: str
    ) -> Tensor:
        rows = moe_permute(x, routing, backend=backend)
        h = grouped_gemm(rows, w_up, routing.offsets, backend=backend)
        y = grouped_gemm(activate(h, activation), w_down, routing.offsets, backend=backend)
        return moe_unpermute(y, routing, backend=backend)

    problem = Problem(routing_of(kind, 50, 3, 2, seed=3), 33, 20, activation)
    assert_solves(problem, backend, dtype, composed)


def test_rows_of_masked_tokens_may_hold_anything(backend: str) -> None:
    device = device_of(backend)
    routing = routing_of("masked", 50, 4, 2, seed=4)
    absent = (routing.experts == 4).all(dim=1)
    problem = Problem(routing, 16, 24, "relu2")
    clean = problem.solve(backend, torch.float32, device=device)
    problem.x[absent] = torch.nan
    problem.grad[absent] = torch.nan
    for name, dirty, expected in zip(
        Problem.names, problem.solve(backend, torch.float32, device=device), clean, strict=True
    ):
        assert_same_bits(name, dirty, expected)
    rows = torch.full((100, 16), torch.nan, device=device)
    filled = int(routing.offsets[-1])
    rows[:filled] = 1.0
    moved = on(routing, device, routing.weights.to(device))
    summed = moe_unpermute(rows, moved, backend=backend)
    torch.testing.assert_close(summed[:, 0], moved.weights.sum(dim=1))
    y = moe_permute(problem.x.to(device), moved, backend=backend)
    assert (y[filled:] == 0).all()
    w = torch.ones(4, 3, 16, device=device)
    assert (grouped_gemm(rows, w, moved.offsets, backend=backend)[filled:] == 0).all()


@pytest.mark.parametrize("kind", ["random", "masked"])
def test_a_truncated_routing_has_the_filled_rows_only(backend: str, kind: str) -> None:
    """The same bits as with rows for all slots; gradients of weights where there are experts."""
    device, width = device_of(backend), 24
    routing = routing_of(kind, 33, 8, 3, seed=4)
    absent = torch.rand(routing.experts.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    ids = routing.experts.masked_fill(absent, 8).to(device)
    found = []
    for truncate in (False, True):
        weights = routing.weights.to(device).masked_fill(ids == 8, 0.0).requires_grad_()
        own = make_routing(ids, weights, 8)
        filled = int(own.offsets[-1])
        own = own.truncated(filled) if truncate else own
        x = random_normal(33, width, seed=2).to(device).requires_grad_()
        with PoisonedMemory():
            rows = moe_permute(x, own, backend=backend)
            assert rows.shape[0] == (filled + 1 if truncate else 99)
            y = moe_unpermute(rows * 2, own, backend=backend)
            y.backward(random_normal(33, width, seed=3).to(device))
        assert x.grad is not None
        assert weights.grad is not None
        found.append((rows[:filled], y, x.grad, weights.grad.masked_fill(ids == 8, 0.0)))
    for whole, short in zip(*found, strict=True):
        assert_same_bits("a result", short, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_main_gradients_are_added_to(backend: str, dtype: torch.dtype) -> None:
    skip_unless_served(backend, dtype)
    device = device_of(backend)
    problem = Problem(routing_of("empty_experts", 60, 6, 2, seed=5), 32, 16, "relu2")
    _, _, _, *expected = problem.solve(backend, dtype, device=device)
    weights = [
        w.bfloat16().to(device, dtype).requires_grad_() for w in (problem.w_up, problem.w_down)
    ]
    for weight in weights:
        weight.main_grad = torch.full(weight.shape, 3.0, device=device)
        weight.grad_added_to_main_grad = False
    x = problem.x.bfloat16().to(device, dtype)
    routing = on(problem.routing, device, problem.routing.weights.to(device))
    y = moe_experts(x, routing, *weights, accumulate_main_grad=True, backend=backend)
    y.backward(problem.grad.bfloat16().to(device, dtype))
    for weight, grad in zip(weights, expected, strict=True):
        assert weight.grad_added_to_main_grad
        tolerance = {"rtol": 1e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(weight.main_grad - 3.0, grad.float(), **tolerance)
        assert (weight.main_grad[0] == 3.0).all(), "an expert without tokens gets nothing"


def test_grouped_gemm_main_gradient(backend: str) -> None:
    device = device_of(backend)
    x, grad = (random_normal(30, n, seed=6 + n, device=device) for n in (8, 12))
    w = random_normal(3, 12, 8, seed=8, device=device).requires_grad_()
    offsets = torch.tensor([0, 10, 10, 25], dtype=torch.int32, device=device)
    grouped_gemm(x, w, offsets, backend=backend).backward(grad)
    leaf = w.detach().clone().requires_grad_()
    leaf.main_grad = torch.ones_like(w)
    grouped_gemm(x, leaf, offsets, accumulate_main_grad=True, backend=backend).backward(grad)
    torch.testing.assert_close(leaf.main_grad - 1.0, w.grad)


def test_main_gradients_of_bfloat16_are_not_rounded_to_it(backend: str) -> None:
    """A group's sum goes to float32 as it is; rounded to bfloat16 first it is off by 1e-3."""
    skip_unless_served(backend, torch.bfloat16)
    device = device_of(backend)
    x, grad = (random_normal(200, n, seed=n, device=device).bfloat16() for n in (16, 24))
    w = torch.zeros(2, 24, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
    w.main_grad = torch.zeros(w.shape, device=device)
    offsets = torch.tensor([0, 130, 200], dtype=torch.int32, device=device)
    grouped_gemm(x, w, offsets, accumulate_main_grad=True, backend=backend).backward(grad)
    exact = [grad[a:b].double().t() @ x[a:b].double() for a, b in ((0, 130), (130, 200))]
    assert rms_error(w.main_grad, torch.stack(exact)) < 1e-5


def test_gradients_only_where_asked(backend: str) -> None:
    device = device_of(backend)
    problem = Problem(routing_of("random", 40, 4, 2, seed=9), 16, 8, "swiglu")
    full = problem.solve(backend, torch.float32, device=device)
    tensors = [problem.x, problem.routing.weights, problem.w_up, problem.w_down]
    for wanted in range(4):
        leaves = [
            (t if i == 1 else t.bfloat16().float())
            .to(device, copy=True)
            .requires_grad_(i == wanted)
            for i, t in enumerate(tensors)
        ]
        routing = on(problem.routing, device, leaves[1])
        y = moe_experts(leaves[0], routing, *leaves[2:], activation="swiglu", backend=backend)
        y.backward(problem.grad.bfloat16().float().to(device))
        assert_same_bits(Problem.names[wanted + 1], leaves[wanted].grad, full[wanted + 1])
        assert all(leaf.grad is None for i, leaf in enumerate(leaves) if i != wanted)


def test_inference_gives_the_same_output(backend: str) -> None:
    """Without gradients nothing is kept, and the rows of an expert may share one buffer."""
    device = device_of(backend)
    problem = Problem(routing_of("skewed", 60, 5, 2, seed=18), 24, 16, "swiglu")
    expected = problem.solve(backend, torch.float32, device=device)[0]
    x, w_up, w_down = (
        t.bfloat16().float().to(device).requires_grad_()
        for t in (problem.x, problem.w_up, problem.w_down)
    )
    routing = on(problem.routing, device, problem.routing.weights.to(device))
    with torch.no_grad(), PoisonedMemory():
        y = moe_experts(x, routing, w_up, w_down, activation="swiglu", backend=backend)
    assert_same_bits("output", y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_every_run(backend: str, dtype: torch.dtype) -> None:
    skip_unless_served(backend, dtype)
    problem = Problem(routing_of("skewed", 100, 4, 3, seed=10), 64, 48, "swiglu")
    runs = [problem.solve(backend, dtype, device=device_of(backend)) for _ in range(2)]
    for name, first, second in zip(Problem.names, *runs, strict=True):
        assert_same_bits(name, first, second)


def test_router_gradient_flows_through(backend: str) -> None:
    """moe_route and moe_experts as a layer uses them."""
    device = device_of(backend)
    problem = Problem(routing_of("random", 30, 6, 2, seed=11), 16, 12, "relu2")
    grads = []
    for name, kind, place in (
        (backend, torch.float32, device),
        ("reference", torch.float64, "cpu"),
    ):
        logits = random_normal(30, 6, seed=12).to(place, kind).requires_grad_()
        x, w_up, w_down = (t.to(place, kind) for t in (problem.x, problem.w_up, problem.w_down))
        routing = moe_route(logits, 2, scale=2.5, backend="reference")
        y = moe_experts(x, routing, w_up, w_down, backend=name)
        y.backward(problem.grad.to(place, kind))
        grads.append(logits.grad.cpu())
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=1e-4, atol=1e-5)


def test_pre_activation_is_all_that_is_kept() -> None:
    """Activation memory on the CPU: at most half of the plain loop's."""
    problem = Problem(routing_of("random", 2048, 8, 4, seed=13), 128, 64, "relu2")
    kept = []
    for function in (moe_experts, plain_loop):
        tensors: list[Tensor] = []
        leaves = [t.clone().requires_grad_() for t in (problem.x, problem.w_up, problem.w_down)]
        weights = problem.routing.weights.clone().requires_grad_()
        routing = replace(problem.routing, weights=weights)

        def pack(tensor: Tensor, tensors: list[Tensor] = tensors) -> Tensor:
            tensors.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            function(leaves[0], routing, *leaves[1:], activation="relu2")
        inputs = {t.untyped_storage().data_ptr() for t in (*leaves, *vars(routing).values())}
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        kept.append(sum(n for pointer, n in storages.items() if pointer not in inputs))
    assert kept[0] <= 0.5 * kept[1], kept


def plain_loop(
    x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor, *, activation: str
) -> Tensor:
    out = torch.zeros_like(x)
    for e in range(routing.num_experts):
        token, choice = torch.where(routing.experts == e)
        y = F.linear(activate(F.linear(x[token], w_up[e]), activation), w_down[e])
        out = out.index_add(0, token, y * routing.weights[token, choice, None])
    return out


class TestTransformers:
    """The expert blocks of Hugging Face transformers, with the same weights and choices."""

    @pytest.mark.parametrize("family", ["nemotron_h", "qwen3_moe"])
    def test_block(self, backend: str, family: str) -> None:
        device = device_of(backend)
        block, activation = self.block(family)
        generator = torch.Generator().manual_seed(14)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
        experts = torch.rand(60, 8, generator=generator).argsort(dim=-1)[:, :3]
        weights = torch.rand(60, 3, generator=generator)
        x, grad = random_normal(60, 32, seed=15), random_normal(60, 32, seed=16)
        theirs = [x.clone().requires_grad_(), weights.clone().requires_grad_()]
        y = block(theirs[0], experts, theirs[1])
        y.backward(grad)
        names = {"qwen3_moe": "gate_up_proj", "nemotron_h": "up_proj"}
        w_up, w_down = (getattr(block, name) for name in (names[family], "down_proj"))
        ours = [
            t.detach().to(device, copy=True).requires_grad_() for t in (x, weights, w_up, w_down)
        ]
        routing = make_routing(experts.to(device), ours[1], 8, backend="reference")
        result = moe_experts(ours[0], routing, *ours[2:], activation=activation, backend=backend)
        result.backward(grad.to(device))
        torch.testing.assert_close(result.cpu(), y)
        for leaf, other in zip(ours, (*theirs, w_up, w_down), strict=True):
            torch.testing.assert_close(leaf.grad.cpu(), other.grad, rtol=1e-4, atol=1e-5)

    @staticmethod
    def block(family: str) -> tuple[torch.nn.Module, str]:
        transformers = pytest.importorskip("transformers")
        if family == "qwen3_moe":
            module = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
            config = transformers.Qwen3MoeConfig(
                hidden_size=32, moe_intermediate_size=24, num_experts=8, hidden_act="silu"
            )
            return module.Qwen3MoeExperts(config), "swiglu"
        module = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
        config = transformers.NemotronHConfig(
            hidden_size=32, moe_intermediate_size=24, n_routed_experts=8, mlp_hidden_act="relu2"
        )
        return module.NemotronHExperts(config), "relu2"


def test_all_faults_are_named_at_once() -> None:
    routing = routing_of("random", 4, 3, 2, seed=17)
    with pytest.raises(ValueError, match=r"activation='gelu'.*x \[5, 8\].*one dtype"):
        moe_experts(
            torch.zeros(5, 8),
            routing,
            torch.zeros(3, 6, 8).bfloat16(),
            torch.zeros(3, 8, 6),
            activation="gelu",
        )
    with pytest.raises(ValueError, match=r"w_up \[3, 6, 8\] must be \[3, 12, 8\] for swiglu"):
        moe_experts(
            torch.zeros(4, 8),
            routing,
            torch.zeros(3, 6, 8),
            torch.zeros(3, 8, 6),
            activation="swiglu",
        )
    with pytest.raises(ValueError, match="no main_grad"):
        moe_experts(
            torch.zeros(4, 8),
            routing,
            torch.zeros(3, 6, 8, requires_grad=True),
            torch.zeros(3, 8, 6),
            accumulate_main_grad=True,
        )
    with pytest.raises(ValueError, match=r"offsets must be \[4\]"):
        grouped_gemm(torch.zeros(4, 8), torch.zeros(3, 6, 8), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"must be \[4, H\]"):
        moe_permute(torch.zeros(5, 8), routing)
    with pytest.raises(ValueError, match=r"must be \[8, H\]"):
        moe_unpermute(torch.zeros(5, 8), routing)
