"""`mopd_advantage` and its metrics in one launch.

Each program writes the sums of its tokens to memory. The program that finishes last adds them in a
fixed order, so the result is deterministic.
"""
# The arguments of a jit function have no Python types.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemocascade_kernels.common.mopd_triton import mopd_terms
from nemocascade_kernels.mopd_advantage.reference import METRICS

BLOCK = 1024
NUM_WARPS = 4
#: At most this many programs: about two for each multiprocessor of a large GPU.
PROGRAMS = 256
#: Rows of a program's sums: METRICS, rounded up to a power of two.
SLOTS = 8


@triton.jit
def mopd_kernel(
    teacher_ptr,
    train_ptr,
    rollout_ptr,
    weight_ptr,
    advantage_ptr,
    importance_ptr,
    sums_ptr,
    ticket_ptr,
    metrics_ptr,
    size,
    ratio_low,
    ratio_high,
    METRICS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute both. Scratch: sums [PROGRAMS, SLOTS] and ticket [1] int32, which starts at 0."""
    program = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    sums = tl.zeros([SLOTS], tl.float32)
    for start in range(program * BLOCK, size, PROGRAMS * BLOCK):
        at = start + tl.arange(0, BLOCK)
        counted = at < size
        if METRICS:
            weight = tl.load(weight_ptr + at, mask=counted, other=0.0)
            counted = counted & (weight != 0)
        # Excluded tokens are not read: they may be NaN.
        teacher = tl.load(teacher_ptr + at, mask=counted, other=0.0)
        train = tl.load(train_ptr + at, mask=counted, other=0.0)
        rollout = tl.load(rollout_ptr + at, mask=counted, other=0.0)
        advantage, ratio, importance = mopd_terms(teacher, train, rollout, ratio_low, ratio_high)
        importance = tl.where(counted, importance, 0.0)
        tl.store(advantage_ptr + at, advantage, mask=at < size)
        tl.store(importance_ptr + at, importance, mask=at < size)
        if METRICS:
            one = counted.to(tl.float32)
            sums += tl.where(slot == 0, tl.sum(-weight * importance * advantage * train, axis=0), 0)
            sums += tl.where(slot == 1, tl.sum(one, axis=0), 0)
            sums += tl.where(slot == 2, tl.sum(advantage, axis=0), 0)
            sums += tl.where(slot == 3, tl.sum(tl.abs(advantage), axis=0), 0)
            sums += tl.where(slot == 4, tl.sum(tl.where(counted, ratio, 0.0), axis=0), 0)
            low = tl.where((ratio < ratio_low) & counted, 1.0, 0.0)
            high = tl.where((ratio > ratio_high) & counted, 1.0, 0.0)
            sums += tl.where(slot == 5, tl.sum(low, axis=0), 0)
            sums += tl.where(slot == 6, tl.sum(high, axis=0), 0)
    if METRICS:
        tl.store(sums_ptr + program * SLOTS + slot, sums)
        # Every thread's sums are written before one thread takes a ticket.
        tl.debug_barrier()
        if tl.atomic_add(ticket_ptr, 1, sem="acq_rel") == PROGRAMS - 1:
            everyone = tl.arange(0, PROGRAMS)[:, None] * SLOTS + slot[None, :]
            total = tl.sum(tl.load(sums_ptr + everyone, cache_modifier=".cg"), axis=0)
            tokens = tl.sum(tl.where(slot == 1, total, 0.0), axis=0)
            mean = total / tl.maximum(tokens, 1.0)
            tl.store(metrics_ptr + slot, tl.where(slot < 2, total, mean), mask=slot < 7)


def mopd_advantage(
    teacher_logprob: Tensor,
    train_logprob: Tensor,
    rollout_logprob: Tensor,
    ratio_low: float = 0.5,
    ratio_high: float = 2.0,
) -> tuple[Tensor, Tensor]:
    """See `reference.mopd_advantage`."""
    tensors = (teacher_logprob, train_logprob, rollout_logprob)
    advantage, importance, _ = _launch(tensors, None, ratio_low, ratio_high)
    return advantage, importance


def mopd_advantage_metrics(
    teacher_logprob: Tensor,
    train_logprob: Tensor,
    rollout_logprob: Tensor,
    token_weight: Tensor,
    ratio_low: float = 0.5,
    ratio_high: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.mopd_advantage_metrics`."""
    tensors = (teacher_logprob, train_logprob, rollout_logprob)
    return _launch(tensors, token_weight, ratio_low, ratio_high)


def _launch(
    tensors: tuple[Tensor, Tensor, Tensor],
    token_weight: Tensor | None,
    ratio_low: float,
    ratio_high: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Advantage, importance, and metrics [7], which are uninitialised without token_weight."""
    train = tensors[1]
    size, device = train.shape[0], train.device
    advantage, importance = torch.empty_like(train), torch.empty_like(train)
    if not size:
        return advantage, importance, torch.zeros(len(METRICS), device=device)
    programs = min(PROGRAMS, triton.next_power_of_2(triton.cdiv(size, BLOCK)))
    metrics = torch.empty(len(METRICS), device=device)
    with_metrics = token_weight is not None
    sums = torch.empty(programs, SLOTS, device=device) if with_metrics else metrics
    ticket = torch.zeros(1, dtype=torch.int32, device=device) if with_metrics else metrics
    mopd_kernel[(programs,)](
        *(tensor.contiguous() for tensor in tensors),
        train if token_weight is None else token_weight.contiguous(),
        advantage,
        importance,
        sums,
        ticket,
        metrics,
        size,
        ratio_low,
        ratio_high,
        METRICS=with_metrics,
        PROGRAMS=programs,
        SLOTS=SLOTS,
        BLOCK=BLOCK,
        num_warps=NUM_WARPS,
    )
    return advantage, importance, metrics
