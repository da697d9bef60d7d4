"""Benchmark rows that compute the loss of a linear head, with our code and other libraries.

All compute the mean negative log-likelihood of the same tokens, and the gradients of hidden and
weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from nemocascade_kernels.common.products import multiply
from torch import Tensor

from benchmarks.measure import Prepared, Row, Unavailable, load, with_gradients

#: hidden, weight, target -> scalar loss
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Sizes of a linear head. Random inputs are regenerated for each row, always the same."""

    tokens: int
    width: int
    vocabulary: int
    dtype: torch.dtype
    device: torch.device

    @property
    def product_flops(self) -> float:
        """Floating-point operations of one product: logits, or either gradient."""
        return 2.0 * self.tokens * self.width * self.vocabulary

    def settings(self) -> dict[str, object]:
        return {
            "T": self.tokens,
            "H": self.width,
            "V": self.vocabulary,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states and weight, both leaves, and target. Logits have a standard deviation of
        about 2."""
        generator = torch.Generator(device=self.device).manual_seed(1)
        make = functools.partial(torch.randn, device=self.device, generator=generator)
        hidden = make(self.tokens, self.width).to(self.dtype)
        weight = (make(self.vocabulary, self.width) * (2 * self.width**-0.5)).to(self.dtype)
        target = torch.randint(
            self.vocabulary, (self.tokens,), device=self.device, generator=generator
        )
        return hidden.requires_grad_(), weight.requires_grad_(), target

    def gradient_bytes(self) -> int:
        """Bytes of both gradients, which are outputs and not extra memory."""
        return (self.tokens + self.vocabulary) * self.width * self.dtype.itemsize


def training_row(problem: Problem, name: str, kind: str, make_loss: Callable[[], Loss]) -> Row:
    """Row of a loss with backward. `make_loss` imports it, or raises Unavailable."""

    def make() -> Prepared:
        loss_of = make_loss()
        hidden, weight, target = problem.inputs()

        def compute() -> Tensor:
            loss = loss_of(hidden, weight, target)
            loss.backward()
            return loss

        return with_gradients(compute, (hidden, weight), lambda loss: loss.detach().cpu()[None])

    flops, output_bytes = 3 * problem.product_flops, problem.gradient_bytes()
    return Row(name, kind, make, flops=flops, output_bytes=output_bytes)


def bare_products(problem: Problem, count: int) -> Row:
    """Row of the first `count` products of: logits, gradient of hidden, gradient of weight, logits
    again; into memory that is already allocated, by the fastest way of the machine.
    """

    def make() -> Callable[[], None]:
        hidden, weight, _ = (tensor.detach() for tensor in problem.inputs())
        logits = torch.empty(
            problem.tokens, problem.vocabulary, dtype=problem.dtype, device=problem.device
        )
        gradient = torch.randn_like(logits)
        hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)
        products = [
            lambda: multiply(hidden, weight.t(), logits),
            lambda: multiply(gradient, weight, hidden_grad),
            lambda: multiply(gradient.t(), hidden, weight_grad),
            lambda: multiply(hidden, weight.t(), logits),
        ][:count]

        def call() -> None:
            for product in products:
                product()

        return call

    return Row(f"{count} bare products", "floor", make, flops=count * problem.product_flops)


def plain_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The straightforward version: a product, then cross entropy."""
    return F.cross_entropy((hidden @ weight.t()).float(), target)


def load_compiled() -> Loss:
    torch._dynamo.reset()
    return torch.compile(plain_loss)


def load_torch_chunked() -> Loss:
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if options is None:
        raise Unavailable(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    return functools.partial(F.linear_cross_entropy, options=options())


def load_liger() -> Loss:
    """Liger-Kernel's Triton kernel, with float32 accumulation as in ours."""
    module = load("liger_kernel.transformers.functional", "liger-kernel")
    _needs_gpu()
    return functools.partial(module.liger_fused_linear_cross_entropy, accum_dtype=torch.float32)


def load_liger_scaled() -> Loss:
    """Liger-Kernel's per-token kernel with temperature: CuTe on Hopper, chunked torch elsewhere."""
    module = load("liger_kernel.ops.fused_linear_scaled_cross_entropy", "liger-kernel")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0):
        load("cutlass", "nvidia-cutlass-dsl, for Liger-Kernel's Hopper kernels,")
    function = module.LigerFusedLinearScaledCrossEntropyFunction

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        nll = function.apply(hidden, weight, target)
        mean: Tensor = (nll[0] if isinstance(nll, tuple) else nll).mean()
        return mean

    return loss


def load_cut_cross_entropy() -> Loss:
    module = load("cut_cross_entropy", "cut-cross-entropy")
    _needs_gpu()
    # By default it skips gradients that it considers small.
    return functools.partial(module.linear_cross_entropy, filter_eps=None)


def load_quack() -> Loss:
    module = load("quack.linear_cross_entropy", "quack-kernels")
    _needs_hopper()
    loss: Loss = module.chunked_linear_cross_entropy
    return loss


def load_verl() -> Loss:
    module = load("verl.utils.kernel.linear_cross_entropy", "verl")
    _needs_gpu()

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        found = module.linear_cross_entropy(hidden, weight, target, 1.0, "none", None)
        mean: Tensor = -found[0].mean()
        return mean

    return loss


#: Every peer, by the name of its row.
PEERS: dict[str, Callable[[], Loss]] = {
    "plain torch": lambda: plain_loss,
    "torch.compile": load_compiled,
    "F.linear_cross_entropy, chunked": load_torch_chunked,
    "Liger-Kernel, cross-entropy (Triton)": load_liger,
    "Liger-Kernel, scaled (CuTe on Hopper)": load_liger_scaled,
    "cut-cross-entropy": load_cut_cross_entropy,
    "quack": load_quack,
    "verl": load_verl,
}


def peer_rows(problem: Problem) -> list[Row]:
    return [training_row(problem, name, "peer", make) for name, make in PEERS.items()]


def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        raise Unavailable("its kernels need a GPU")


def _needs_hopper() -> None:
    _needs_gpu()
    if torch.cuda.get_device_capability() < (9, 0):
        raise Unavailable("its kernels need compute capability 9.0")
