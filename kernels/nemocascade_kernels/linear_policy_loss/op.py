"""`linear_policy_loss`: checks, choice of the implementation, the single pass, autograd."""

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
from nemocascade_kernels.common.linear_head.truncation import Truncation, check_truncation
from nemocascade_kernels.common.main_grad import checked_main_grad
from nemocascade_kernels.linear_policy_loss import reference
from nemocascade_kernels.linear_policy_loss.objectives import Objective
from nemocascade_kernels.linear_policy_loss.one_pass import OnePass, one_pass

_OPERATORS = ("logits_statistics", "logits_gradient_", "policy_rows_")
OP = backends.Op("linear_policy_loss")
OP.register("triton", limit=backends.takes(*backends.HALF_AND_SINGLE))
OP.register("native", limit=backends.takes(torch.float32, torch.bfloat16, operators=_OPERATORS))
OP.register("torch", "nemocascade_kernels.common.linear_head.torch")
OP.register("reference")


@dataclass(frozen=True)
class PolicyLoss:
    """Result of `linear_policy_loss`.

    loss: scalar float32; `loss.backward()` returns the gradients, only once.
    logprob: [T] float32, no gradient; 0 where token_weight is 0, and -inf where the target is not
        in the truncated distribution.
    entropy: [T] float32, no gradient, 0 where token_weight is 0; None if not requested.
    metrics: scalars float32 on the device. `tokens` is the number of trained tokens; the others are
        means over them: `logprob`, `entropy` (if requested), and the objective's own. With a
        truncation, `outside` is the fraction of targets that are not kept; they count 0 in the
        other means.
    """

    loss: Tensor
    logprob: Tensor
    entropy: Tensor | None
    metrics: dict[str, Tensor]


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    objective: Objective,
    *,
    temperature: float = 1.0,
    truncation: Truncation | None = None,
    tp_group: dist.ProcessGroup | None = None,
    return_entropy: bool = False,
    active_rows: int | None = None,
    reduce_hidden_grad: bool = True,
    accumulate_main_grad: bool = False,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> PolicyLoss:
    """`loss = sum_t f_t(log pi(target_t | hidden_t))` and its gradients, in one pass.

    `log pi = log softmax(hidden @ weight.T / temperature)[target]`; f is the objective's. A chunk
    of rows goes logits -> log-probability -> f' -> gradient in the logits -> gradients at once:
    three matrix products, and memory for one chunk. The products exclude rows whose token_weight
    is 0; their hidden, target and fields are ignored.

    hidden: [T, H] float32, bfloat16 or float16; T may be 0.
    weight: [V, H] of the same dtype. Under `tp_group`, this rank's shard: rank r holds the ids
        `[r V, (r + 1) V)`, V is the same on every rank, and every rank passes the same hidden and
        objective.
    target: [T] int64, ids of the full vocabulary.
    objective: `Nll`, `Grpo`, `Mopd` or another `Objective`; its fields are [T] float32.
    temperature: divides the logits; > 0.
    truncation: pi is the distribution after top-k and top-p, renormalised. Tokens that are not kept
        have probability 0 and no gradient; a row whose target is one of them does not train.
    active_rows: upper bound on the number of rows whose token_weight is not 0. On a GPU this number
        is not read back, so without the bound the products run over all T slots. A bound that is
        too low makes the loss NaN (on a CPU: ValueError).
    reduce_hidden_grad: sum the gradient in hidden over `tp_group` (the true derivative). False
        leaves this rank's part, for a caller whose own backward reduces it.
    accumulate_main_grad: add the gradient in weight, times grad_scale, to `weight.main_grad`
        (float32 or weight's dtype) *in this call*, set `weight.grad_added_to_main_grad`, and give
        autograd a placeholder: Megatron-Core's convention without a second buffer of [V, H].
    grad_scale: the gradient that `loss` will receive in backward, > 0. It is needed with
        accumulate_main_grad, where the gradient is added before backward, and useful in float16,
        where it prevents underflow. If `loss` receives another gradient, backward corrects the
        gradients; with accumulate_main_grad it raises ValueError (on a GPU: the gradient in hidden
        becomes NaN).
    backend: require an implementation; see `nemocascade_kernels.backends`.

    Raises ValueError for shapes, dtypes or settings that do not fit, and IndexError on a CPU for a
    trained target outside the vocabulary; on a GPU, where the host does not read the target, the
    loss becomes NaN. A second backward raises RuntimeError.
    """
    check_head(hidden, weight, target, temperature)
    if truncation is not None:
        check_truncation(truncation)
    objective.check(hidden.shape[0], hidden.device)
    if not grad_scale > 0:
        raise ValueError(f"grad_scale must be > 0, and is {grad_scale}")
    if active_rows is not None and active_rows < 0:
        raise ValueError(f"active_rows must be >= 0, and is {active_rows}")
    main_grad = checked_main_grad(weight) if accumulate_main_grad else None
    chosen = OP.chosen(hidden, weight, target, backend=backend)
    rows = trained_rows(objective.token_weight, active_rows)
    first_id, vocabulary = check_targets(
        target if rows.index is None else target[rows.index], weight, tp_group
    )
    if chosen == "reference":
        check_reference(OP.name, tp_group, accumulate_main_grad)
        loss, logprob, entropy = reference.linear_policy_loss(
            hidden, weight, target, objective, temperature, truncation
        )
        found = entropy if return_entropy else None
        return _output(loss, logprob, found, objective, rows, truncation)
    settings = OnePass(
        op=OP.name,
        kernels=OP.module(chosen),
        objective=objective,
        rows=rows,
        scale=1.0 / temperature,
        entropy=return_entropy,
        group=tp_group,
        first_id=first_id,
        vocabulary=vocabulary,
        reduce_hidden_grad=reduce_hidden_grad,
        main_grad=main_grad,
        grad_scale=grad_scale,
        truncation=truncation,
    )
    # Within apply the grad mode is off, and needs_input_grad does not reflect the previous mode.
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()
    compute = functools.partial(one_pass, target, settings)
    loss, logprob, found_entropy = HeadLoss.apply(hidden.contiguous(), weight, settings, compute)
    return _output(loss, logprob, found_entropy, objective, rows, truncation)


def _output(
    loss: Tensor,
    logprob: Tensor,
    entropy: Tensor | None,
    objective: Objective,
    rows: Rows,
    truncation: Truncation | None,
) -> PolicyLoss:
    """Make the result, with the means over the trained tokens."""
    with torch.no_grad():
        chosen = slice(0, rows.size) if rows.index is None else rows.index
        at_rows = logprob[chosen]
        outside = None if truncation is None else at_rows == -torch.inf
        if outside is not None:
            at_rows = torch.where(outside, 0.0, at_rows)
        values = {"logprob": at_rows, **objective.at(chosen).metrics(at_rows)}
        if entropy is not None:
            values["entropy"] = entropy[chosen]
        if outside is not None:
            values = {name: torch.where(outside, 0.0, value) for name, value in values.items()}
            values["outside"] = outside.to(at_rows.dtype)
        stacked = torch.stack(list(values.values()))
        active = rows.active(slice(0, rows.size))
        if active is None:
            tokens = stacked.new_full((), float(rows.size))
        else:
            stacked = torch.where(active, stacked, 0.0)
            tokens = active.sum().to(stacked.dtype)
        means = stacked.sum(dim=1) / tokens.clamp(min=1)
        metrics = {"tokens": tokens, **dict(zip(values, means.unbind(), strict=True))}
    return PolicyLoss(loss, logprob, entropy, metrics)
