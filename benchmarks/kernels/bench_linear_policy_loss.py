"""Benchmark of linear_policy_loss with gradients, against bare products and other libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from nemocascade_kernels import Nll, backends, linear_policy_loss
from torch import Tensor

from benchmarks.kernels.head_rows import Loss, Problem, bare_products, peer_rows, training_row
from benchmarks.measure import Case, Goal, Prepared, Row, Unavailable

FLOOR = "3 bare products"


def cases(suite: str, device: torch.device, tiny: bool) -> list[Case]:
    """Speed at the shapes of the goals, then memory over T for a large vocabulary."""
    if suite == "cpu":
        sizes = [(8192, 512, 32768)]
        dtypes = [torch.bfloat16, torch.float32]
        limits = Limits(floor=1.15, quarter=0.35, memory=1 / 8)
    else:
        sizes = [
            (8192, 4096, 131072),
            (8192, 2688, 131072),
            (8192, 4096, 151936),
            (32768, 2688, 131072),
        ]
        dtypes = [torch.bfloat16]
        limits = Limits(floor=1.10, quarter=0.30, memory=1 / 8)
    if tiny:
        sizes = [(96, 16, 384)]
    return [
        *(speed_case(Problem(*size, dtype, device), limits) for size in sizes for dtype in dtypes),
        memory_case(suite, device, tiny),
    ]


class Limits(NamedTuple):
    """Goals as ratios: to the bare products, to the full time, to plain torch's extra memory."""

    floor: float
    quarter: float
    memory: float


def ours(backend: str | None = None, trained: float = 1.0, main_grad: bool = False) -> Loss:
    """Our mean negative log-likelihood over a fraction of the tokens."""

    def loss(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        key = (target.data_ptr(), trained)
        if key not in weights:
            weights.clear()
            weights[key] = token_weights(target, trained)
        token_weight, active_rows = weights[key]
        if main_grad and not hasattr(weight, "main_grad"):
            setattr(weight, "main_grad", torch.zeros_like(weight, dtype=torch.float32))  # noqa: B010
        return linear_policy_loss(
            hidden,
            weight,
            target,
            Nll(token_weight),
            active_rows=active_rows,
            accumulate_main_grad=main_grad,
            backend=backend,
        ).loss

    weights: dict[tuple[int, float], tuple[Tensor, int]] = {}
    return loss


def token_weights(target: Tensor, trained: float) -> tuple[Tensor, int]:
    """Weights of a mean over a random fraction of the tokens, and the number of these tokens. A
    data loader knows both before the step.
    """
    tokens = target.shape[0]
    count = max(1, round(tokens * trained))
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(3))
    weight = torch.zeros(tokens)
    weight[order[:count]] = 1.0 / count
    return weight.to(target.device), count


def speed_case(problem: Problem, limits: Limits) -> Case:
    name = "ours"
    rows = [
        training_row(problem, name, "ours", ours),
        bare_products(problem, 3),
        training_row(
            problem, "ours, a quarter trained", "ours", functools.partial(ours, trained=0.25)
        ),
        training_row(
            problem, "ours, into main_grad", "ours", functools.partial(ours, main_grad=True)
        ),
        *_other_backends(problem),
        *peer_rows(problem),
    ]
    # These average over other tokens, or pass autograd a placeholder; tests check them instead.
    rows = [_unchecked(row) if "quarter" in row.name or "main" in row.name else row for row in rows]
    peers = [row.name for row in rows if row.kind == "peer"]
    return Case(
        f"forward and gradients {problem.settings()['dtype']} {problem.tokens}",
        problem.settings(),
        rows,
        [
            Goal("beside the bare products", name, limits.floor, FLOOR),
            Goal("a quarter of the rows", "ours, a quarter trained", limits.quarter, name),
            Goal("extra memory", name, limits.memory, "plain torch", "extra_memory"),
            *(Goal(f"faster than {peer}", name, 1.0, peer) for peer in peers),
        ],
    )


def _other_backends(problem: Problem) -> list[Row]:
    """The other available implementations, to justify the automatic choice."""
    op = backends.ops()["linear_policy_loss"]
    probe = torch.empty(1, 1, dtype=problem.dtype, device=problem.device)
    chosen = op.chosen(probe)

    def load(backend: str) -> Callable[[], Loss]:
        def make() -> Loss:
            if not op.serves(probe, backend=backend):
                raise Unavailable("see nemocascade_kernels.backends.unavailable_because")
            return ours(backend)

        return make

    return [
        training_row(problem, f"ours, backend {name}", "ours", load(name))
        for name in op.backends
        if name not in (chosen, "reference", "triton") and problem.device.type == "cpu"
    ]


def _unchecked(row: Row) -> Row:
    def make() -> Callable[[], None]:
        made = row.make()
        call = made.call if isinstance(made, Prepared) else made
        return lambda: (call(), None)[1]

    return Row(row.name, row.kind, make, row.flops, row.bytes, row.output_bytes)


def memory_case(suite: str, device: torch.device, tiny: bool) -> Case:
    """Extra memory over T for a vocabulary of 131,072, without inputs and outputs: must be flat."""
    if suite == "cpu":
        width, lengths, vocabulary = 64, (2048, 8192, 32768), 131072
    else:
        width, lengths, vocabulary = 2688, (8192, 65536, 262144), 131072
    if tiny:
        width, lengths, vocabulary = 8, (64, 128, 256), 512
    rows = []
    for tokens in lengths:
        problem = Problem(tokens, width, vocabulary, torch.bfloat16, device)
        rows.append(
            _unchecked(
                training_row(
                    problem, f"T={tokens}", "ours", functools.partial(ours, main_grad=True)
                )
            )
        )
    first, last = (f"T={tokens}" for tokens in (lengths[0], lengths[-1]))
    goals = [Goal("extra memory is flat in T", last, 1.1, first, "extra_memory")]
    if suite == "gpu":
        limit = 1.5 * 2**30
        goals.append(Goal("extra memory in bytes", last, limit, None, "extra_memory"))
    settings = {"T": list(lengths), "H": width, "V": vocabulary, "dtype": "bfloat16"}
    return Case("memory over T", settings, rows, goals, repeats=3)
