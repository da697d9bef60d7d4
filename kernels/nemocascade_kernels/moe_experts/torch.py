"""The expert GEMMs on CPU: expert by expert, in buffers that stay in the cache.

No permuted copy of x or of the gradient is saved. Only the pre-activation is saved; backward
recomputes the activation. Gradients of the combine weights come from the activation instead of the
experts' output. The sum over a token's K rows is one `embedding_bag`, in the order of the choices.
Products use `batch_invariant` and exponentials use `_sigmoid`, so the result is batch-invariant.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from nemocascade_kernels.common.products import accumulate_product
from nemocascade_kernels.common.routing import Routing
from nemocascade_kernels.moe_experts.batch_invariant import SLACK, mm_rows, mm_rows_apart

#: torch runs elementwise calls of up to this many elements on one thread, in whole vectors.
_SERIAL_ELEMENTS = 32768
#: A multiple of every vector loop's step, in elements.
_VECTOR_ELEMENTS = 64


def grouped_gemm(x: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of group e by w[e] transposed, [R, N]; 0 past the last group."""
    out = x.new_empty(x.shape[0], w.shape[1])
    bounds = offsets.tolist()
    for e, weight in enumerate(w):
        mm_rows_apart(x, weight.t(), out, bounds[e], bounds[e + 1] - bounds[e])
    out[bounds[-1] :] = 0
    return out


def grouped_gemm_backward_x(grad: Tensor, w: Tensor, offsets: Tensor) -> Tensor:
    """Multiply the rows of group e by w[e], [R, K]; 0 past the last group."""
    return grouped_gemm(grad, w.transpose(1, 2), offsets)


def grouped_gemm_backward_w(
    grad: Tensor, x: Tensor, w: Tensor, offsets: Tensor, main_grad: Tensor | None
) -> Tensor | None:
    """Return grad^T x of each group, [E, N, K]; with `main_grad`, add to it and return None."""
    out = torch.empty_like(w) if main_grad is None else None
    bounds = offsets.tolist()
    for e in range(w.shape[0]):
        rows = slice(bounds[e], bounds[e + 1])
        _weight_gradient(grad[rows], x[rows], e, out, main_grad)
    return out


def _weight_gradient(
    grad: Tensor, x: Tensor, e: int, out: Tensor | None, main_grad: Tensor | None
) -> None:
    if out is not None:
        torch.mm(grad.t(), x, out=out[e])
    elif main_grad is not None and x.shape[0]:
        accumulate_product(main_grad[e], grad, x)


def permute(x: Tensor, routing: Routing) -> Tensor:
    """Rows of x in the order of the slots, [T * K, H]; 0 for slots without an expert."""
    rows = torch.index_select(x, 0, routing.order // routing.top_k)
    rows[int(routing.offsets[-1]) :] = 0
    return rows


def permute_backward(grad: Tensor, routing: Routing) -> Tensor:
    """Sum of each token's rows in the order of its choices, [T, H]."""
    return _combine(_without_absent(grad, routing), routing.positions, None)


def unpermute(y: Tensor, routing: Routing) -> Tensor:
    """Weighted sum of each token's rows in the order of its choices, [T, H]."""
    return _combine(_without_absent(y, routing), routing.positions, routing.weights)


def unpermute_backward(
    grad: Tensor, y: Tensor, routing: Routing, needs_y: bool, needs_weights: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows y [T * K, H] and of the weights [T, K]."""
    order, filled = routing.order, int(routing.offsets[-1])
    rows = torch.index_select(grad, 0, order // routing.top_k)
    grad_weights = None
    if needs_weights:
        dots = (rows * y).sum(dim=-1, dtype=torch.float32)
        dots[filled:] = 0
        grad_weights = dots[routing.positions]
    if not needs_y:
        return None, grad_weights
    rows *= routing.weights.reshape(-1)[order].unsqueeze(1).to(rows.dtype)
    rows[filled:] = 0
    return rows, grad_weights


def _without_absent(rows: Tensor, routing: Routing) -> Tensor:
    """The rows, with zeros for slots without an expert, which may hold any value, even NaN."""
    filled = int(routing.offsets[-1])
    if filled == rows.shape[0]:
        return rows
    rows = rows.clone()
    rows[filled:] = 0
    return rows


def _combine(rows: Tensor, positions: Tensor, weights: Tensor | None) -> Tensor:
    """Sum over k of weights[t, k] * rows[positions[t, k]], in the order of k: [T, H]."""
    if positions.shape[0] == 0:
        return rows.new_empty(0, rows.shape[1])
    factors = None if weights is None else weights.to(rows.dtype)
    return F.embedding_bag(positions, rows, mode="sum", per_sample_weights=factors)


def experts_forward(
    x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor, activation: str, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """Output [T, H], and the pre-activations [>= R, I or 2I] for the backward if `keep`."""
    bounds = routing.offsets.tolist()
    tokens = routing.order // routing.top_k
    buffers = _longest(bounds) + SLACK
    h = x.new_empty((bounds[-1] if keep else _longest(bounds)) + SLACK, w_up.shape[1])
    slots = routing.order.numel()
    y = x.new_empty(slots + SLACK, x.shape[1])
    rows = x.new_empty(buffers, x.shape[1])
    active = x.new_empty(buffers, w_down.shape[2])
    for e in range(routing.num_experts):
        start, count = bounds[e], bounds[e + 1] - bounds[e]
        if count == 0:
            continue
        torch.index_select(x, 0, tokens[start : start + count], out=rows[:count])
        h_rows = h[start:] if keep else h
        mm_rows(rows, w_up[e].t(), h_rows, count)
        _activate(h_rows[:count], active[:count], activation)
        mm_rows(active, w_down[e].t(), y[start:], count)
    y[bounds[-1] : slots] = 0
    return _combine(y, routing.positions, routing.weights), h if keep else None


def experts_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    routing: Routing,
    w_up: Tensor,
    w_down: Tensor,
    activation: str,
    needs: tuple[bool, bool, bool, bool],
    main_grads: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, the routing weights, w_up and w_down, where `needs` requests them."""
    needs_x, needs_weights, needs_up, needs_down = needs
    bounds = routing.offsets.tolist()
    tokens = routing.order // routing.top_k
    weights = routing.weights.reshape(-1)[routing.order].to(x.dtype).unsqueeze(1)
    buffers = _longest(bounds) + SLACK
    rows, grad_rows = (x.new_empty(buffers, x.shape[1]) for _ in range(2))
    grad_active, active = (x.new_empty(buffers, w_down.shape[2]) for _ in range(2))
    grad_h = x.new_empty(buffers, w_up.shape[1])
    slots = routing.order.numel()
    grad_x_rows = x.new_empty(slots + SLACK, x.shape[1]) if needs_x else None
    dots = x.new_zeros(slots, dtype=torch.float32) if needs_weights else None
    grad_up = torch.empty_like(w_up) if needs_up and main_grads[0] is None else None
    grad_down = torch.empty_like(w_down) if needs_down and main_grads[1] is None else None
    for e in range(routing.num_experts):
        start, count = bounds[e], bounds[e + 1] - bounds[e]
        segment = slice(start, start + count)
        if count:
            torch.index_select(grad, 0, tokens[segment], out=grad_rows[:count])
            mm_rows(grad_rows, w_down[e], grad_active, count)
            _activation_backward(
                h[segment],
                grad_active[:count],
                weights[segment],
                active[:count],
                grad_h[:count],
                None if dots is None else dots[segment],
                activation,
            )
            if grad_x_rows is not None:
                mm_rows(grad_h, w_up[e], grad_x_rows[start:], count)
        if needs_down:
            _weight_gradient(grad_rows[:count], active[:count], e, grad_down, main_grads[1])
        if needs_up:
            if count:
                torch.index_select(x, 0, tokens[segment], out=rows[:count])
            _weight_gradient(grad_h[:count], rows[:count], e, grad_up, main_grads[0])
    grad_x = None
    if grad_x_rows is not None:
        grad_x_rows[bounds[-1] : slots] = 0
        grad_x = _combine(grad_x_rows, routing.positions, None)
    grad_weights = None if dots is None else dots[routing.positions]
    return grad_x, grad_weights, grad_up, grad_down


def _longest(bounds: list[int]) -> int:
    return max(end - start for start, end in itertools.pairwise(bounds))


def _activate(h: Tensor, out: Tensor, activation: str) -> None:
    """Compute `out = act(h)`."""
    if activation == "relu2":
        torch.clamp_min(h, 0, out=out).square_()
        return
    gate, up = h.chunk(2, dim=-1)
    torch.mul(gate, _sigmoid(gate), out=out).mul_(up)


def _activation_backward(
    h: Tensor,
    grad_active: Tensor,
    weights: Tensor,
    active: Tensor,
    grad_h: Tensor,
    dots: Tensor | None,
    activation: str,
) -> None:
    """Activation and its backward, from the gradient of the unweighted activation.

    Computes `active = w * act(h)`, `dots = act(h) . grad_active` (the gradient of w) and
    `grad_h = w * act'(h) * grad_active`. `grad_active` is overwritten.
    """
    if activation == "relu2":
        torch.clamp_min(h, 0, out=grad_h)
        torch.mul(grad_h, grad_h, out=active)
        _dots(active, grad_active, dots)
        active.mul_(weights)
        grad_h.mul_(grad_active).mul_(weights * 2)
        return
    gate, up = h.chunk(2, dim=-1)
    grad_gate, grad_up = grad_h.chunk(2, dim=-1)
    sigmoid = _sigmoid(gate)
    torch.mul(gate, sigmoid, out=grad_up)
    torch.mul(grad_up, up, out=active)
    _dots(active, grad_active, dots)
    active.mul_(weights)
    grad_active.mul_(weights)
    # silu'(g) = s + silu(g) * (1 - s)
    torch.mul(grad_up, 1 - sigmoid, out=grad_gate)
    grad_gate.add_(sigmoid).mul_(up).mul_(grad_active)
    grad_up.mul_(grad_active)


def _dots(a: Tensor, b: Tensor, out: Tensor | None) -> None:
    if out is not None:
        torch.sum(a * b, dim=-1, dtype=torch.float32, out=out)


def _sigmoid(x: Tensor) -> Tensor:
    """Sigmoid of [n, I], bit-identical at any position of an element.

    torch computes the last elements of a thread's share, those that do not fill a vector, with a
    different exponential. Short calls over whole vectors have no such elements.
    """
    numel = x.numel()
    padded = x.new_zeros(-(-numel // _VECTOR_ELEMENTS) * _VECTOR_ELEMENTS)
    result = padded[:numel].view(x.shape)
    result.copy_(x)
    for start in range(0, padded.numel(), _SERIAL_ELEMENTS):
        padded[start : start + _SERIAL_ELEMENTS].sigmoid_()
    return result
