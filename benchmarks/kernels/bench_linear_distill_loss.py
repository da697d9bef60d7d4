"""Benchmark of linear_distill_loss with gradients, against its bare products and torch.

The products that no implementation can avoid are four: the logits of both heads, and the gradients
of the student's hidden states and head. The teacher has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from nemocascade_kernels import DIVERGENCES, Divergence, backends, linear_distill_loss
from torch import Tensor

from benchmarks.kernels.head_rows import Problem
from benchmarks.measure import Case, Goal, Prepared, Row, Unavailable, with_gradients

Heads = tuple[Tensor, Tensor, Tensor, Tensor]
"""hidden [T, H] and weight [V, H], both leaves, and those of the teacher."""
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

FLOOR = "4 bare products"


def cases(suite: str, device: torch.device, tiny: bool) -> list[Case]:
    """The mean reverse KL of all tokens, forward and gradients; other divergences beside it."""
    if suite == "cpu":
        sizes, dtypes = [(4096, 512, 32768)], [torch.bfloat16, torch.float32]
    else:
        sizes, dtypes = [(8192, 2688, 131072), (8192, 4096, 131072)], [torch.bfloat16]
    if tiny:
        sizes = [(96, 16, 384)]
    limit = 1.15 if suite == "cpu" else 1.10
    return [case(Problem(*size, dtype, device), limit) for size in sizes for dtype in dtypes]


def case(problem: Problem, limit: float) -> Case:
    rows = [
        row(problem, "ours", "ours", lambda: ours(problem)),
        Row(FLOOR, "floor", lambda: products(problem), flops=4 * problem.product_flops),
        row(problem, "ours, a quarter trained", "ours", lambda: ours(problem, trained=0.25)),
        *(
            row(problem, f"ours, {kind}", "ours", functools.partial(ours, problem, kind))
            for kind in DIVERGENCES
            if kind != "reverse_kl"
        ),
        *_other_backends(problem),
        row(problem, "plain torch", "peer", lambda: plain_loss),
        row(problem, "torch.compile", "peer", _compiled),
    ]
    return Case(
        f"forward and gradients {problem.settings()['dtype']} {problem.tokens}",
        problem.settings(),
        rows,
        [
            Goal("beside the bare products", "ours", limit, FLOOR),
            *(Goal(f"{k} beside them", f"ours, {k}", limit, FLOOR) for k in DIVERGENCES[1:]),
            Goal("a quarter of the rows", "ours, a quarter trained", 0.35, "ours"),
            Goal("faster than plain torch", "ours", 1.0, "plain torch"),
            Goal("faster than torch.compile", "ours", 1.0, "torch.compile"),
            Goal("extra memory", "ours", 0.125, "plain torch", "extra_memory"),
        ],
    )


def heads_of(problem: Problem) -> Heads:
    """Random heads; the teacher's logits differ from the student's by a third."""
    hidden, weight, _ = problem.inputs()
    generator = torch.Generator(device=problem.device).manual_seed(2)
    noise = torch.randn(weight.shape, device=problem.device, generator=generator)
    teacher = weight.detach().float() + noise * (0.6 * problem.width**-0.5)
    return hidden, weight, hidden.detach().clone(), teacher.to(problem.dtype)


def row(problem: Problem, name: str, kind: str, make_loss: Callable[[], Loss]) -> Row:
    """A row of a loss with backward."""

    def make() -> Prepared | Callable[[], None]:
        loss_of, heads = make_loss(), heads_of(problem)

        def compute() -> Tensor:
            loss = loss_of(*heads)
            loss.backward()
            return loss

        if name.startswith("ours, ") and "backend" not in name:
            # They compute other losses, which the op's tests compare.
            return lambda: _clear(compute(), heads)
        return with_gradients(compute, heads[:2], lambda loss: loss.detach().cpu()[None])

    flops, output_bytes = 4 * problem.product_flops, problem.gradient_bytes()
    return Row(name, kind, make, flops=flops, output_bytes=output_bytes)


def _clear(loss: Tensor, heads: Heads) -> None:
    heads[0].grad = heads[1].grad = None


def ours(
    problem: Problem,
    divergence: Divergence = "reverse_kl",
    trained: float = 1.0,
    backend: str | None = None,
) -> Loss:
    """The mean over a random fraction of the tokens."""
    count = max(1, round(problem.tokens * trained))
    order = torch.randperm(problem.tokens, generator=torch.Generator().manual_seed(3))
    weight = torch.zeros(problem.tokens)
    weight[order[:count]] = 1.0 / count
    weight = weight.to(problem.device)

    def loss(hidden: Tensor, head: Tensor, states: Tensor, teacher: Tensor) -> Tensor:
        return linear_distill_loss(
            hidden, head, states, teacher, weight, divergence=divergence, active_rows=count,
            backend=backend,
        ).loss  # fmt: skip

    return loss


def _other_backends(problem: Problem) -> list[Row]:
    """The other available implementations, to justify the automatic choice."""
    op = backends.ops()["linear_distill_loss"]
    probe = torch.empty(1, 1, dtype=problem.dtype, device=problem.device)
    chosen = op.chosen(probe)

    def load(backend: str) -> Loss:
        if not op.serves(probe, backend=backend):
            raise Unavailable("see nemocascade_kernels.backends.unavailable_because")
        return ours(problem, backend=backend)

    return [
        row(problem, f"ours, backend {name}", "ours", functools.partial(load, name))
        for name in op.backends
        if name not in (chosen, "reference", "triton") and problem.device.type == "cpu"
    ]


def products(problem: Problem) -> Callable[[], None]:
    """The four products, into memory that is already allocated."""
    hidden, weight, states, teacher = (tensor.detach() for tensor in heads_of(problem))
    logits = torch.empty(
        problem.tokens, problem.vocabulary, dtype=problem.dtype, device=problem.device
    )
    gradient = torch.randn_like(logits)
    hidden_grad, weight_grad = torch.empty_like(hidden), torch.empty_like(weight)

    def call() -> None:
        torch.mm(hidden, weight.t(), out=logits)
        torch.mm(states, teacher.t(), out=logits)
        torch.mm(gradient, weight, out=hidden_grad)
        torch.mm(gradient.t(), hidden, out=weight_grad)

    return call


def plain_loss(hidden: Tensor, weight: Tensor, states: Tensor, teacher: Tensor) -> Tensor:
    """The straightforward version: both logits, then the divergence."""
    log_p = torch.log_softmax((hidden @ weight.t()).float(), -1)
    log_q = torch.log_softmax((states @ teacher.t()).float(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _compiled() -> Loss:
    torch._dynamo.reset()
    return torch.compile(plain_loss)
