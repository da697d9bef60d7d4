"""`moe_experts`, `grouped_gemm`, `moe_permute`, `moe_unpermute`: public functions, checks and the
autograd functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemocascade_kernels import native
from nemocascade_kernels.backends import HALF_AND_SINGLE, Op, takes
from nemocascade_kernels.common.activations import ACTIVATIONS
from nemocascade_kernels.common.main_grad import checked_main_grad, placeholder_gradient
from nemocascade_kernels.common.routing import Routing


def cpu_limitation(*tensors: Tensor) -> str | None:
    """Reason why the CPU path is unavailable for a call, or None."""
    if not all(tensor.is_cpu for tensor in tensors):
        return "it reads the group sizes on the host, which would wait for the device"
    return None


def native_limitation(*tensors: Tensor) -> str | None:
    """Reason why the compiled CPU path is unavailable for a call, or None."""
    operators = ("moe_experts_forward", "moe_experts_backward", "moe_experts_product")
    reason = takes(torch.float32, operators=operators)(*tensors)
    if reason is None and not native.op("moe_experts_has_product")():
        return "the BLAS of this torch cannot be called from outside"
    return reason


def _hopper_limitation(tensor: Tensor) -> str | None:
    capability = torch.cuda.get_device_capability(tensor.device)
    if capability < (9, 0):
        return f"it needs compute capability >= 9.0, and the device has {capability}"
    return None


def quack_limitation(*tensors: Tensor) -> str | None:
    """Reason why quack-kernels is unavailable for a call, or None."""
    reason = takes(torch.bfloat16, torch.float16)(*tensors) or _hopper_limitation(tensors[0])
    if reason is not None:
        return reason
    odd = sorted({size for tensor in tensors[1:] for size in tensor.shape[-2:] if size % 8})
    if odd:
        return f"it needs sizes of the weights that are multiples of 8, and got {odd}"
    return None


OP = Op("moe_experts")
OP.register("triton", limit=takes(*HALF_AND_SINGLE))
OP.register("quack", limit=quack_limitation, by_name=True)
OP.register("native", limit=native_limitation)
OP.register("torch", limit=cpu_limitation)
OP.register("reference")


def fp8_limitation(capability: tuple[int, int]) -> str | None:
    """Reason why the FP8 kernels cannot run on a GPU of a compute capability, or None."""
    if capability[0] == 9:
        return None
    return f"the FP8 products are for Hopper (9.0), and the device has {capability}"


def _fp8_limitation_of(*tensors: Tensor) -> str | None:
    reason = takes(*HALF_AND_SINGLE)(*tensors)
    if reason is None and tensors[0].is_cuda:
        reason = fp8_limitation(torch.cuda.get_device_capability(tensors[0].device))
    return reason


FP8 = Op("moe_experts_fp8")
FP8.register("triton", "nemocascade_kernels.moe_experts.fp8_triton", limit=_fp8_limitation_of)
FP8.register("reference", "nemocascade_kernels.moe_experts.fp8", limit=cpu_limitation)


def moe_experts(
    x: Tensor,
    routing: Routing,
    w_up: Tensor,
    w_down: Tensor,
    *,
    activation: str = "relu2",
    fp8: bool = False,
    accumulate_main_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Weighted sum of every token's experts::

        y_t = sum_k routing.weights[t, k] * w_down[e] act(w_up[e] x_t),   e = routing.experts[t, k]

    with act(h) = relu(h)^2, or silu(g) * u with h = [g, u]. Products accumulate in float32. The
    backward saves, besides the arguments, the pre-activation h of every slot. Gradients go to x,
    `routing.weights`, `w_up` and `w_down`. A token's output and its gradient are bit-identical
    for any other tokens that share its experts.

    With `fp8`, the operands of all six products are rounded to e4m3 in blocks with a scale each:
    see `moe_experts/fp8.py`, the definition, which also runs on CPUs and does not promise the same
    bits beside other tokens. Weights, gradients and results keep their dtypes. Any sizes: quantised
    copies, which live as long as the call, are padded to multiples of 128.

    Args:
        x: [T, H] float32, bfloat16 or float16.
        routing: from `moe_route` or `make_routing`, for the same T tokens and E experts.
        w_up: [E, I, H] for "relu2", [E, 2I, H] (gate rows, then up rows) for "swiglu"; x's dtype.
        w_down: [E, H, I]; x's dtype.
        activation: "relu2" or "swiglu".
        fp8: multiply in FP8; on GPUs of compute capability 9.0, and on CPUs.
        accumulate_main_grad: the backward adds each weight's gradient to its `main_grad` (float32
            or the weight's dtype), sets `grad_added_to_main_grad` on the weight and gives autograd
            a placeholder: Megatron-Core's convention.
        backend: require an implementation; see `nemocascade_kernels.backends`.

    Returns:
        [T, H], x's dtype; 0 for a token without experts.

    Raises:
        ValueError: a shape, dtype or setting is wrong; the message names all that are.
        BackendUnavailableError: the required implementation is unavailable for the call.
    """
    _check_experts(x, routing, w_up, w_down, activation)
    implementation = (FP8 if fp8 else OP).choose(x, w_up, w_down, backend=backend)
    main_grads = _main_grads(accumulate_main_grad, w_up, w_down)
    if hasattr(implementation, "experts"):
        result: Tensor
        if fp8:
            result = implementation.experts(x, routing, w_up, w_down, activation, main_grads)
        else:
            _reject_main_grad(accumulate_main_grad)
            result = implementation.experts(x, routing, w_up, w_down, activation)
        return result
    inputs = (x, routing.weights, w_up, w_down)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    output: Tensor = _Experts.apply(
        x,
        routing.weights,
        w_up,
        w_down,
        routing,
        activation,
        main_grads,
        implementation,
        keep,
    )
    return output


def grouped_gemm(
    x: Tensor,
    w: Tensor,
    offsets: Tensor,
    *,
    accumulate_main_grad: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`y[r] = w[e] x[r]` for the rows offsets[e] <= r < offsets[e + 1]; 0 past offsets[E].

    Args:
        x: [R, K] float32, bfloat16 or float16, rows sorted by group.
        w: [E, N, K]; x's dtype.
        offsets: [E + 1] int32 on x's device, increasing, from 0 to at most R.
        accumulate_main_grad: as in `moe_experts`.
        backend: require an implementation.

    Returns:
        [R, N], x's dtype. Gradients go to x and w.

    Raises:
        ValueError: a shape or dtype is wrong.
        BackendUnavailableError: the required implementation is unavailable for the call.
    """
    faults = []
    if x.ndim != 2 or w.ndim != 3 or x.shape[-1] != w.shape[-1]:
        faults.append(f"x {list(x.shape)} and w {list(w.shape)} must be [R, K] and [E, N, K]")
    if x.dtype != w.dtype:
        faults.append(f"x is {x.dtype} and w {w.dtype}: they must have one dtype")
    if w.ndim == 3 and offsets.shape != (w.shape[0] + 1,):
        faults.append(f"offsets must be [{w.shape[0] + 1}], and have shape {list(offsets.shape)}")
    if offsets.is_floating_point() or offsets.device != x.device:
        faults.append(f"offsets must be integers on {x.device}: {offsets.dtype}, {offsets.device}")
    if faults:
        raise ValueError("grouped_gemm: " + "; ".join(faults))
    implementation = OP.choose(x, w, backend=backend)
    if not hasattr(implementation, "grouped_gemm_backward_x"):
        _reject_main_grad(accumulate_main_grad)
        result: Tensor = implementation.grouped_gemm(x, w, offsets)
        return result
    output: Tensor = _GroupedGemm.apply(
        x, w, offsets, _main_grads(accumulate_main_grad, w)[0], implementation
    )
    return output


def moe_permute(x: Tensor, routing: Routing, *, backend: str | None = None) -> Tensor:
    """Rows of x in the order of `routing.order`: `y[i] = x[routing.order[i] // K]`.

    Args:
        x: [T, H] floating point.
        routing: for the same T tokens.
        backend: require an implementation.

    Returns:
        [T * K, H], or fewer rows if the routing is `truncated`; 0 from row `routing.offsets[E]` on.
        The gradient goes to x.

    Raises:
        ValueError: x does not have T rows.
    """
    if x.ndim != 2 or x.shape[0] != routing.tokens:
        raise ValueError(f"moe_permute: x {list(x.shape)} must be [{routing.tokens}, H]")
    implementation = OP.choose(x, backend=backend)
    if not hasattr(implementation, "permute_backward"):
        result: Tensor = implementation.permute(x, routing)
        return result
    output: Tensor = _Permute.apply(x, routing, implementation)
    return output


def moe_unpermute(y: Tensor, routing: Routing, *, backend: str | None = None) -> Tensor:
    """Weighted sum of each token's rows, the inverse of `moe_permute`::

        out[t] = sum_k routing.weights[t, k] * y[routing.positions[t, k]]

    Slots without an expert are excluded; y may hold NaN there.

    Args:
        y: [T * K, H] floating point, in the order of `routing.order`, or fewer rows if the routing
            is `truncated`.
        routing: the one passed to `moe_permute`.
        backend: require an implementation.

    Returns:
        [T, H]. Gradients go to y and `routing.weights`.

    Raises:
        ValueError: y does not have as many rows as `routing.order`.
    """
    slots = routing.order.numel()
    if y.ndim != 2 or y.shape[0] != slots:
        raise ValueError(f"moe_unpermute: y {list(y.shape)} must be [{slots}, H]")
    implementation = OP.choose(y, backend=backend)
    if not hasattr(implementation, "unpermute_backward"):
        result: Tensor = implementation.unpermute(y, routing)
        return result
    output: Tensor = _Unpermute.apply(y, routing.weights, routing, implementation)
    return output


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        w_up: Tensor,
        w_down: Tensor,
        routing: Routing,
        activation: str,
        main_grads: tuple[Tensor | None, ...],
        implementation: Any,
        keep: bool,
    ) -> Tensor:
        y, h = implementation.experts_forward(x, routing, w_up, w_down, activation, keep)
        ctx.save_for_backward(x, w_up, w_down, h, *_tensors(routing))
        ctx.activation, ctx.main_grads = activation, main_grads
        # Under activation checkpointing saved tensors are other objects in backward, and
        # `grad_added_to_main_grad` must be set on the parameter itself.
        ctx.weights = w_up, w_down
        ctx.implementation = implementation
        output: Tensor = y
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w_up, w_down, h, *routing = ctx.saved_tensors
        grad_x, grad_weights, grad_up, grad_down = ctx.implementation.experts_backward(
            grads[0].contiguous(),
            x,
            h,
            Routing(*routing),
            w_up,
            w_down,
            ctx.activation,
            ctx.needs_input_grad[:4],
            ctx.main_grads,
        )
        if ctx.main_grads[0] is not None:
            grad_up = placeholder_gradient(ctx.weights[0])
        if ctx.main_grads[1] is not None:
            grad_down = placeholder_gradient(ctx.weights[1])
        return grad_x, grad_weights, grad_up, grad_down, None, None, None, None, None


class _GroupedGemm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        offsets: Tensor,
        main_grad: Tensor | None,
        implementation: Any,
    ) -> Tensor:
        ctx.save_for_backward(x, w, offsets)
        ctx.main_grad, ctx.implementation = main_grad, implementation
        ctx.weight = w
        output: Tensor = implementation.grouped_gemm(x, w, offsets)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, offsets = ctx.saved_tensors
        grad = grads[0].contiguous()
        needs_x, needs_w = ctx.needs_input_grad[:2]
        implementation, grad_x, grad_w = ctx.implementation, None, None
        if needs_x:
            grad_x = implementation.grouped_gemm_backward_x(grad, w, offsets)
        if needs_w:
            grad_w = implementation.grouped_gemm_backward_w(grad, x, w, offsets, ctx.main_grad)
            if ctx.main_grad is not None:
                grad_w = placeholder_gradient(ctx.weight)
        return grad_x, grad_w, None, None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, routing: Routing, implementation: Any) -> Tensor:
        ctx.save_for_backward(*_tensors(routing))
        ctx.implementation = implementation
        output: Tensor = implementation.permute(x, routing)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        routing = Routing(*ctx.saved_tensors)
        return ctx.implementation.permute_backward(grads[0].contiguous(), routing), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, weights: Tensor, routing: Routing, implementation: Any
    ) -> Tensor:
        ctx.save_for_backward(y, *_tensors(routing))
        ctx.implementation = implementation
        output: Tensor = implementation.unpermute(y, routing)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y, *routing = ctx.saved_tensors
        grad_y, grad_weights = ctx.implementation.unpermute_backward(
            grads[0].contiguous(), y, Routing(*routing), *ctx.needs_input_grad[:2]
        )
        return grad_y, grad_weights, None, None


def _tensors(routing: Routing) -> tuple[Tensor, ...]:
    return (
        routing.weights,
        routing.experts,
        routing.counts,
        routing.order,
        routing.offsets,
        routing.positions,
    )


def _main_grads(accumulate: bool, *weights: Tensor) -> tuple[Tensor | None, ...]:
    """The main gradients of the weights; None for a weight that needs none."""
    return tuple(
        checked_main_grad(weight) if accumulate and weight.requires_grad else None
        for weight in weights
    )


def _reject_main_grad(accumulate: bool) -> None:
    if accumulate:
        raise ValueError(
            "the reference implementation leaves gradients to autograd and has no "
            "accumulate_main_grad: use another"
        )


def _check_experts(
    x: Tensor, routing: Routing, w_up: Tensor, w_down: Tensor, activation: str
) -> None:
    faults = []
    if activation not in ACTIVATIONS:
        faults.append(f"activation={activation!r}: choose one of {ACTIVATIONS}")
    if x.ndim != 2 or x.shape[0] != routing.tokens:
        faults.append(f"x {list(x.shape)} must be [{routing.tokens}, H]")
    if w_down.ndim != 3 or w_down.shape[0] != routing.num_experts or w_down.shape[1] != x.shape[-1]:
        faults.append(
            f"w_down {list(w_down.shape)} must be [{routing.num_experts}, {x.shape[-1]}, I]"
        )
    else:
        width = w_down.shape[2] * (2 if activation == "swiglu" else 1)
        expected = (routing.num_experts, width, x.shape[-1])
        if w_up.shape != expected:
            faults.append(f"w_up {list(w_up.shape)} must be {list(expected)} for {activation}")
    if not x.dtype == w_up.dtype == w_down.dtype:
        faults.append(
            f"x, w_up and w_down must have one dtype: {x.dtype}, {w_up.dtype}, {w_down.dtype}"
        )
    if not x.device == w_up.device == w_down.device == routing.order.device:
        faults.append("x, routing, w_up and w_down must be on one device")
    if faults:
        raise ValueError("moe_experts: " + "; ".join(faults))
