"""Benchmark of linear_logprob: forward against one matrix product, with backward against four."""

from __future__ import annotations

from collections.abc import Callable

import torch
from nemocascade_kernels import linear_logprob
from torch import Tensor

from benchmarks.kernels.head_rows import (
    Loss,
    Problem,
    bare_products,
    load_liger_scaled,
    load_verl,
    plain_loss,
    training_row,
)
from benchmarks.measure import Case, Goal, Row


def cases(suite: str, device: torch.device, tiny: bool) -> list[Case]:
    """Forward alone (old or teacher log-probabilities), with entropy, and with backward."""
    sizes = [(8192, 512, 32768)] if suite == "cpu" else [(8192, 4096, 131072), (8192, 2688, 131072)]
    if tiny:
        sizes = [(96, 16, 384)]
    found = []
    for size in sizes:
        problem = Problem(*size, torch.bfloat16, device)
        found += [make_case(problem, training) for training in (False, True)]
    return found


def ours(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -linear_logprob(hidden, weight, target).logprob.mean()


def forward_row(problem: Problem, name: str, kind: str, make_loss: Callable[[], Loss]) -> Row:
    """Row of a loss without gradients."""

    def make() -> Callable[[], Tensor]:
        loss_of = make_loss()
        hidden, weight, target = problem.inputs()

        def call() -> Tensor:
            with torch.no_grad():
                return loss_of(hidden, weight, target)

        return call

    return Row(name, kind, make, flops=problem.product_flops)


def with_entropy(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return -linear_logprob(hidden, weight, target, return_entropy=True).logprob.mean()


def make_case(problem: Problem, training: bool) -> Case:
    """Our rows and one matrix product, or four with the backward."""
    row, products = (training_row, 4) if training else (forward_row, 1)
    rows = [
        row(problem, "ours", "ours", lambda: ours),
        bare_products(problem, products),
        row(problem, "plain torch", "peer", lambda: plain_loss),
        row(problem, "Liger-Kernel, scaled (CuTe on Hopper)", "peer", load_liger_scaled),
        row(problem, "verl", "peer", load_verl),
    ]
    goals = [Goal("faster than plain torch", "ours", 1.0, "plain torch")]
    if training:
        goals.insert(0, Goal("beside four products", "ours", 1.15, "4 bare products"))
    else:
        rows.insert(2, row(problem, "ours, with entropy", "ours", lambda: with_entropy))
        goals.insert(0, Goal("beside one product", "ours", 1.10, "1 bare products"))
        goals.append(Goal("extra memory", "ours", 1 / 8, "plain torch", "extra_memory"))
    what = "forward and backward" if training else "forward"
    return Case(f"{what} {problem.tokens} {problem.width}", problem.settings(), rows, goals)
