"""Packed documents, inputs and checks shared by the layer tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from nemocascade_kernels import PackedSeq
from torch import Tensor

# Short, around chunk edges, and several chunks long.
LENGTHS = (1, 2, 37, 64, 65, 7, 130, 3, 16, 33)

# A function of row tensors, all with T rows, and their pack, that returns T rows.
Rows = Callable[..., Tensor]


def pack(lengths: Sequence[int]) -> PackedSeq:
    """Documents of these lengths, end to end."""
    return PackedSeq.from_cu_seqlens([0, *torch.tensor(lengths).cumsum(0).tolist()])


def documents(packed: PackedSeq) -> list[slice]:
    """The rows of each document."""
    return [
        slice(s, s + n)
        for s, n in zip(packed.starts.tolist(), packed.lengths.tolist(), strict=True)
    ]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers that depend on shape and seed."""
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def value_and_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor
) -> list[Tensor]:
    """`function(*inputs)` and the gradients of its product with `upstream`, detached."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    value = function(*leaves)
    grads = torch.autograd.grad(value, leaves, upstream.to(value.dtype))
    return [value.detach(), *grads]


def assert_near(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, names: Sequence[str]
) -> None:
    """Every pair differs by less than `tolerance` of the largest expected value."""
    for name, a, b in zip(names, actual, expected, strict=True):
        error = float((a.double() - b.double()).abs().max() / b.double().abs().max())
        assert error < tolerance, f"{name} is off by {error:.1e} of its largest value"


def assert_isolated(function: Rows, rows: Sequence[Tensor], packed: PackedSeq) -> None:
    """Changing a document's last row, to a number, NaN or infinity, changes no bit of the others.

    function(*rows, packed) is a map of row tensors; outputs and the gradients of all `rows` are
    compared, under an upstream gradient that differs in the changed document too.
    """
    upstream = draw(*function(*rows, packed).shape, seed=1)
    before = value_and_gradients(lambda *r: function(*r, packed), rows, upstream)
    for index, document in enumerate(documents(packed)):
        for poison in (1.5, float("nan"), float("inf")):
            changed = [t.detach().clone() for t in rows]
            for t in changed:
                t[document.stop - 1] = poison
            other = upstream.clone()
            other[document] = other[document] * 2 + 1
            after = value_and_gradients(lambda *r: function(*r, packed), changed, other)
            rest = torch.ones(packed.total, dtype=torch.bool)
            rest[document] = False
            for a, b in zip(before, after, strict=True):
                assert torch.equal(a[rest], b[rest]), f"document {index} with {poison} leaks"
            assert not torch.equal(before[0][document], after[0][document]), "nothing changed"


def assert_packed_equals_alone(
    function: Rows, rows: Sequence[Tensor], packed: PackedSeq, tolerance: float
) -> None:
    """Outputs and row gradients of the pack equal those of each document by itself."""
    upstream = draw(*function(*rows, packed).shape, seed=1)
    together = value_and_gradients(lambda *r: function(*r, packed), rows, upstream)
    for document in documents(packed):
        alone = pack([document.stop - document.start])
        mine = value_and_gradients(
            lambda *r, alone=alone: function(*r, alone),
            [t[document] for t in rows],
            upstream[document],
        )
        names = ["value", *(f"gradient {i}" for i in range(len(rows)))]
        scale = [t.abs().max() for t in together]
        for name, a, b, largest in zip(names, together, mine, scale, strict=True):
            error = float((a[document] - b).abs().max() / largest)
            assert error < tolerance, f"{name} of rows {document} is off by {error:.1e}"


def kept_for_backward(function: Callable[[], Tensor]) -> list[Tensor]:
    """The tensors that autograd keeps for the backward of `function()`."""
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        assert function().requires_grad
    return kept
