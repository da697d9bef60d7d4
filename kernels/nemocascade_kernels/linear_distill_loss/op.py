"""`linear_distill_loss`: checks, choice of the implementation, the single pass, autograd."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from nemocascade_kernels import backends
from nemocascade_kernels.common.linear_head.checks import check_head, check_reference, check_targets
from nemocascade_kernels.common.linear_head.chunks import Rows, trained_rows
from nemocascade_kernels.common.linear_head.gradients import HeadLoss
from nemocascade_kernels.common.main_grad import checked_main_grad
from nemocascade_kernels.linear_distill_loss import reference
from nemocascade_kernels.linear_distill_loss.one_pass import OnePass, TeacherHead, one_pass
from nemocascade_kernels.linear_distill_loss.reference import DIVERGENCES, Divergence

OP = backends.Op("linear_distill_loss")
OP.register("triton", limit=backends.takes(*backends.HALF_AND_SINGLE))
OP.register(
    "native",
    limit=backends.takes(torch.float32, torch.bfloat16, operators=("divergence_rows_",)),
)
OP.register("torch")
OP.register("reference")


@dataclass(frozen=True)
class DistillLoss:
    """Result of `linear_distill_loss`.

    loss: scalar float32; `loss.backward()` returns the gradients, only once.
    divergence: [T] float32, no gradient; 0 where token_weight is 0.
    logprob: [T] float32, no gradient: the student's log-probability of target, 0 where
        token_weight is 0; None without target.
    metrics: scalars float32 on the device. `tokens` is the number of trained tokens; the others are
        means over them: `divergence`, and `logprob` if there is a target.
    """

    loss: Tensor
    divergence: Tensor
    logprob: Tensor | None
    metrics: dict[str, Tensor]


def linear_distill_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weight: Tensor,
    *,
    divergence: Divergence = "reverse_kl",
    target: Tensor | None = None,
    temperature: float = 1.0,
    tp_group: dist.ProcessGroup | None = None,
    active_rows: int | None = None,
    reduce_hidden_grad: bool = True,
    accumulate_main_grad: bool = False,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> DistillLoss:
    """`loss = sum_t w_t D(p_t, q_t)` over the whole vocabulary, and its gradients, in one pass.

    `p = softmax(hidden @ weight.T / temperature)` is the student's distribution and
    `q = softmax(teacher_hidden @ teacher_weight.T / temperature)` the teacher's, which has no
    gradient. `reverse_kl`: D = KL(p || q); `forward_kl`: KL(q || p); `jensen_shannon`: the mean of
    KL(p || m) and KL(q || m) with m = (p + q) / 2. A chunk of rows goes logits of both heads ->
    divergence -> gradient in the student's logits -> gradients at once: four matrix products, and
    memory for one chunk. The products exclude rows whose token_weight is 0; their hidden states
    and target are ignored.

    hidden: [T, H] float32, bfloat16 or float16; T may be 0.
    weight: [V, H] of the same dtype. Under `tp_group`, this rank's shard: rank r holds the ids
        `[r V, (r + 1) V)`, V is the same on every rank, and every rank passes the same hidden
        states and token_weight.
    teacher_hidden: [T, G] of the same dtype, or [R, G] for the R rows whose token_weight is not 0,
        in order. On a GPU the latter needs `active_rows=R`.
    teacher_weight: [V, G] of the same dtype, this rank's shard under `tp_group`.
    token_weight: [T] float32; mask and normaliser in one.
    target: [T] int64, ids of the full vocabulary whose log-probability is returned.
    temperature: divides the logits of both; > 0.
    active_rows, reduce_hidden_grad, accumulate_main_grad, grad_scale, backend: see
        `linear_policy_loss`.

    Raises ValueError for shapes, dtypes or settings that do not fit, and IndexError on a CPU for a
    trained target outside the vocabulary; on a GPU its log-probability becomes NaN. A second
    backward raises RuntimeError.
    """
    _check(hidden, weight, teacher_hidden, teacher_weight, token_weight, divergence)
    if not grad_scale > 0:
        raise ValueError(f"grad_scale must be > 0, and is {grad_scale}")
    ids = torch.zeros_like(token_weight, dtype=torch.int64) if target is None else target
    check_head(hidden, weight, ids, temperature)
    main_grad = checked_main_grad(weight) if accumulate_main_grad else None
    chosen = OP.chosen(hidden, weight, teacher_hidden, teacher_weight, backend=backend)
    rows = trained_rows(token_weight, active_rows)
    if teacher_hidden.shape[0] not in (hidden.shape[0], rows.size):
        raise ValueError(
            f"teacher_hidden has {teacher_hidden.shape[0]} rows: it must have those of hidden, "
            f"{hidden.shape[0]}, or of the rows that train, {rows.size}"
        )
    everything = slice(0, rows.size)
    first_id, vocabulary = check_targets(rows.take(ids, everything), weight, tp_group)
    if chosen == "reference":
        check_reference(OP.name, tp_group, accumulate_main_grad)
        return _by_definition(
            hidden,
            weight,
            TeacherHead(teacher_hidden, teacher_weight),
            token_weight,
            divergence,
            target,
            temperature,
            rows,
        )
    settings = OnePass(
        op=OP.name,
        kernels=OP.module(chosen),
        divergence=divergence,
        rows=rows,
        token_weight=rows.take(token_weight, everything),
        target=None if target is None else rows.take(target, everything),
        scale=1.0 / temperature,
        group=tp_group,
        first_id=first_id,
        vocabulary=vocabulary,
        reduce_hidden_grad=reduce_hidden_grad,
        main_grad=main_grad,
        grad_scale=grad_scale,
    )
    # Within apply the grad mode is off, and needs_input_grad does not reflect the previous mode.
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    teacher = TeacherHead(teacher_hidden.detach(), teacher_weight.detach())
    compute = functools.partial(one_pass, teacher, settings)
    loss, found, logprob = HeadLoss.apply(hidden.contiguous(), weight, settings, compute)
    return _output(loss, found, logprob, rows)


def _by_definition(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherHead,
    token_weight: Tensor,
    divergence: Divergence,
    target: Tensor | None,
    temperature: float,
    rows: Rows,
) -> DistillLoss:
    """The reference's result, from the teacher's states of all rows or of those that train."""
    states = teacher.hidden
    if states.shape[0] != hidden.shape[0]:
        whole = states.new_zeros(hidden.shape[0], states.shape[1])
        states = whole if rows.index is None else whole.index_copy(0, rows.index, states)
    loss, found, log_p = reference.linear_distill_loss(
        hidden, weight, states, teacher.weight, token_weight, divergence, temperature
    )
    logprob = None
    if target is not None:
        trained = token_weight.nonzero()[:, 0]
        at_target = log_p.detach().gather(1, target[trained, None])[:, 0]
        logprob = found.new_zeros(found.shape).index_copy(0, trained, at_target)
    return _output(loss, found, logprob, rows)


def _check(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    token_weight: Tensor,
    divergence: str,
) -> None:
    """Raise ValueError, naming every fault, if the teacher does not fit the student."""
    faults = []
    if divergence not in DIVERGENCES:
        faults.append(f"divergence must be one of {DIVERGENCES}, and is {divergence!r}")
    if teacher_hidden.dim() != 2 or teacher_weight.dim() != 2:
        faults.append("shapes must be teacher_hidden [T, G], teacher_weight [V, G]")
    elif teacher_hidden.shape[1] != teacher_weight.shape[1] or not teacher_hidden.shape[1]:
        faults.append("teacher_hidden and teacher_weight must have the same G, at least 1")
    elif weight.dim() == 2 and teacher_weight.shape[0] != weight.shape[0]:
        faults.append("weight and teacher_weight must have the same V")
    if {teacher_hidden.dtype, teacher_weight.dtype} != {hidden.dtype}:
        faults.append("student and teacher must share one dtype")
    if not hidden.device == teacher_hidden.device == teacher_weight.device == token_weight.device:
        faults.append("all tensors must be on one device")
    if token_weight.shape != hidden.shape[:1] or token_weight.dtype != torch.float32:
        faults.append("token_weight must be [T] float32")
    if faults:
        given = ", ".join(
            f"{name} {tuple(tensor.shape)} {tensor.dtype} {tensor.device}"
            for name, tensor in (
                ("hidden", hidden),
                ("weight", weight),
                ("teacher_hidden", teacher_hidden),
                ("teacher_weight", teacher_weight),
                ("token_weight", token_weight),
            )
        )
        raise ValueError(f"{'; '.join(faults)}. Got {given}")


def _output(loss: Tensor, divergence: Tensor, logprob: Tensor | None, rows: Rows) -> DistillLoss:
    """Make the result, with the means over the trained tokens."""
    with torch.no_grad():
        values = {"divergence": divergence}
        if logprob is not None:
            values["logprob"] = logprob
        if rows.filled is None:
            tokens = divergence.new_full((), float(rows.size))
        else:
            tokens = rows.filled.to(divergence.dtype)
        means = {name: value.sum() / tokens.clamp(min=1) for name, value in values.items()}
    return DistillLoss(loss, divergence, logprob, {"tokens": tokens, **means})
