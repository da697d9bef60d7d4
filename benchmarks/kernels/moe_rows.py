"""Benchmark rows that compute a layer's routed experts, with our code and other libraries.

All take x [T, H], the routing (made beforehand), w_up [E, I or 2I, H], w_down [E, H, I] and return
y [T, H]. A training row also computes the gradients of x and of both weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from nemocascade_kernels import Routing, moe_experts, moe_route
from nemocascade_kernels.moe_experts.op import OP
from torch import Tensor

from benchmarks.measure import Prepared, Row, Unavailable, load, probe, with_gradients

#: x, routing, w_up, w_down -> y
Experts = Callable[[Tensor, Routing, Tensor, Tensor], Tensor]
#: Error of FP8's results beside those of bf16.
FP8_AGREE = 0.1


@dataclass(frozen=True)
class Problem:
    """Sizes: T tokens, H hidden, E experts, K per token, I expert width."""

    name: str
    tokens: int
    hidden: int
    experts: int
    top_k: int
    width: int
    activation: str
    dtype: torch.dtype
    device: torch.device
    skewed: bool = False

    @property
    def gates(self) -> int:
        return 2 if self.activation == "swiglu" else 1

    @property
    def forward_flops(self) -> float:
        """FLOPs of both products in a forward; a backward has twice as many."""
        return 2.0 * self.tokens * self.top_k * self.hidden * self.width * (self.gates + 1)

    def settings(self) -> dict[str, object]:
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "T": self.tokens, "H": self.hidden, "E": self.experts, "K": self.top_k,
            "I": self.width, "activation": self.activation, "dtype": dtype, "skewed": self.skewed,
        }  # fmt: skip

    def inputs(self) -> tuple[Tensor, Routing, Tensor, Tensor, Tensor]:
        """Inputs x, routing, w_up and w_down (leaves), and a gradient for y; equal for all rows."""
        generator = torch.Generator(device=self.device).manual_seed(1)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*size, generator=generator, device=self.device)
            return (values * scale).to(self.dtype)

        logits = torch.randn(self.tokens, self.experts, generator=generator, device=self.device)
        if self.skewed:
            logits += torch.linspace(2, -2, self.experts, device=self.device)
        x, upstream = normal(self.tokens, self.hidden), normal(self.tokens, self.hidden)
        w_up = normal(self.experts, self.gates * self.width, self.hidden, scale=self.hidden**-0.5)
        w_down = normal(self.experts, self.hidden, self.width, scale=self.width**-0.5)
        leaves = [tensor.requires_grad_() for tensor in (x, w_up, w_down)]
        return leaves[0], moe_route(logits, self.top_k), leaves[1], leaves[2], upstream

    def output_bytes(self, training: bool) -> int:
        """Bytes of y and the gradients, which are outputs and not extra memory."""
        weights = self.experts * self.width * self.hidden * (self.gates + 1)
        rows = self.tokens * self.hidden
        return (2 * rows + weights if training else rows) * self.dtype.itemsize


def row(
    problem: Problem,
    training: bool,
    name: str,
    kind: str,
    make_experts: Callable[[Problem], Experts],
) -> Row:
    """Row of a forward, or a forward and backward. `make_experts` raises Unavailable if it cannot
    import the library."""

    def make() -> Prepared:
        experts = make_experts(problem)
        x, routing, w_up, w_down, upstream = problem.inputs()

        def compute() -> Tensor:
            with torch.set_grad_enabled(training):
                y = experts(x, routing, w_up, w_down)
            if training:
                y.backward(upstream)
            return y

        return with_gradients(compute, (x, w_up, w_down), probe)

    flops = problem.forward_flops * (3 if training else 1)
    return Row(
        name,
        kind,
        make,
        flops=flops,
        output_bytes=problem.output_bytes(training),
        agree=FP8_AGREE if make_experts is ours_in_fp8 else None,
    )


def activate(h: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return h.relu().square()
    gate, up = h.chunk(2, -1)
    return F.silu(gate) * up


def ours(problem: Problem) -> Experts:
    def experts(x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor) -> Tensor:
        return moe_experts(x, routing, w_up, w_down, activation=problem.activation)

    return experts


def ours_in_fp8(problem: Problem) -> Experts:
    """Our experts with FP8 products: kernels on a Hopper GPU, their definition on a CPU."""

    def experts(x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor) -> Tensor:
        return moe_experts(x, routing, w_up, w_down, activation=problem.activation, fp8=True)

    return experts


def plain_loop(problem: Problem) -> Experts:
    """A loop over experts, each on its own tokens."""

    def experts(x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(problem.experts):
            token, slot = torch.where(routing.experts == expert)
            h = activate(F.linear(x[token], w_up[expert]), problem.activation)
            out = F.linear(h, w_down[expert]) * routing.weights[token, slot, None].to(x.dtype)
            y = y.index_add(0, token, out)
        return y

    return experts


def grouped_mm(problem: Problem) -> Experts:
    """Permuted rows, two grouped products with an activation between them, then a weighted sum."""
    if not hasattr(F, "grouped_mm"):
        raise Unavailable("this torch has no torch.nn.functional.grouped_mm")

    def experts(x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor) -> Tensor:
        order = routing.order.long()
        token, ends = order // routing.top_k, routing.offsets[1:].contiguous()
        h = F.grouped_mm(x[token], w_up.transpose(1, 2), offs=ends)
        out = F.grouped_mm(activate(h, problem.activation), w_down.transpose(1, 2), offs=ends)
        weights = routing.weights.reshape(-1)[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, out * weights)

    return experts


def transformers_block(problem: Problem) -> Experts:
    """The expert module of Hugging Face transformers, with the benchmark's weights."""
    transformers = load("transformers", "transformers")
    nemotron = load("transformers.models.nemotron_h.modeling_nemotron_h", "transformers >= 5")
    qwen = load("transformers.models.qwen3_moe.modeling_qwen3_moe", "transformers >= 5")
    sizes: dict[str, Any] = {
        "hidden_size": problem.hidden, "moe_intermediate_size": problem.width,
    }  # fmt: skip
    with torch.device("meta"):
        if problem.activation == "swiglu":
            config = transformers.Qwen3MoeConfig(num_experts=problem.experts, **sizes)
            block, up = qwen.Qwen3MoeExperts(config), "gate_up_proj"
        else:
            config = transformers.NemotronHConfig(
                n_routed_experts=problem.experts, mlp_hidden_act="relu2", **sizes
            )
            block, up = nemotron.NemotronHExperts(config), "up_proj"

    def experts(x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor) -> Tensor:
        weights = {up: w_up, "down_proj": w_down}
        arguments = (x, routing.experts.long(), routing.weights.to(x.dtype))
        y: Tensor = torch.func.functional_call(block, weights, arguments)
        return y

    return experts


def liger(problem: Problem) -> Experts:
    """Liger-Kernel's fused Triton experts (SwiGLU only)."""
    _needs_gpu_and_swiglu(problem)
    module = load("liger_kernel.ops.fused_moe", "liger-kernel")

    def experts(x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor) -> Tensor:
        function = module.LigerFusedMoEFunction
        y: Tensor = function.apply(x, w_up, w_down, routing.experts, routing.weights.to(x.dtype))
        return y

    return experts


def quack(problem: Problem) -> Experts:
    """Our op on the products of quack-kernels, which gather rows and take turns by warpgroups."""
    sample = torch.empty(1, problem.hidden, dtype=problem.dtype, device=problem.device)
    weight = sample.new_empty(1, problem.width, problem.hidden)
    reason = OP.limitation(sample, weight, backend="quack")
    if reason is not None:
        raise Unavailable(reason)

    def experts(x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor) -> Tensor:
        return moe_experts(x, routing, w_up, w_down, activation=problem.activation, backend="quack")

    return experts


def sonic(problem: Problem) -> Experts:
    """SonicMoE on quack's products (gated activations only)."""
    _needs_gpu_and_swiglu(problem)
    module = load("sonicmoe.functional", "sonic-moe")
    kinds = load("sonicmoe.enums", "sonic-moe").ActivationType

    def experts(x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor) -> Tensor:
        token = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
        stream = torch.cuda.current_stream().cuda_stream
        y: Tensor
        y, _ = module.moe_general_routing_inputs(
            x, routing.weights.reshape(-1), token.repeat_interleave(routing.top_k),
            routing.experts.reshape(-1), w_up.permute(1, 2, 0), None, w_down.permute(1, 2, 0),
            None, problem.experts, stream, kinds.SWIGLU, False, concat_layout=True,
        )  # fmt: skip
        return y

    return experts


def transformer_engine(problem: Problem) -> Experts:
    """Two GroupedLinear of Transformer Engine, which reads the group sizes on the host."""
    if problem.device.type != "cuda":
        raise Unavailable("Transformer Engine needs a GPU")
    te = load("transformer_engine.pytorch", "transformer-engine")
    options = {"bias": False, "params_dtype": problem.dtype, "device": "cuda"}
    up = te.GroupedLinear(problem.experts, problem.hidden, problem.gates * problem.width, **options)
    down = te.GroupedLinear(problem.experts, problem.width, problem.hidden, **options)

    def experts(x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor) -> Tensor:
        for layer, stack in ((up, w_up), (down, w_down)):
            for e in range(problem.experts):
                setattr(layer, f"weight{e}", torch.nn.Parameter(stack[e].detach()))
        order, sizes = routing.order.long(), routing.counts.tolist()
        token = order // routing.top_k
        h = activate(up(x[token], sizes), problem.activation)
        weights = routing.weights.reshape(-1)[order, None].to(x.dtype)
        return torch.zeros_like(x).index_add(0, token, down(h, sizes) * weights)

    return experts


def _needs_gpu_and_swiglu(problem: Problem) -> None:
    if problem.device.type != "cuda":
        raise Unavailable("it needs a GPU")
    if problem.activation != "swiglu":
        raise Unavailable(f"it has no {problem.activation}")
