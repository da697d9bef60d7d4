"""Held-out loss and metrics over packed batches, reduced over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from nemocascade_kernels import mopd_advantage

from nemocascade.megatron.config import CascadeConfig
from nemocascade.megatron.distillation import StatesOf
from nemocascade.megatron.microbatch import Microbatch
from nemocascade.megatron.schedule import run_schedule
from nemocascade.runtime.world import World
from nemocascade.train.objectives import nll_objective
from nemocascade.types import PackedBatch


def batch_of(packed: Microbatch) -> PackedBatch:
    """The packed batch of a micro-batch."""
    assert packed.batch is not None
    return packed.batch


def sum_of_losses(world: World, outputs: Sequence[Any]) -> torch.Tensor:
    """The losses' sum over micro-batches, data-parallel and context-parallel ranks: scalar float64
    on the device of every rank. outputs: from `run_schedule`."""
    value = torch.zeros((), dtype=torch.float64, device=world.device)
    if outputs:
        value = torch.stack([o.loss.detach().double().reshape(()) for o in outputs]).sum()
    if world.is_last_stage:
        world.sum_over_data_parallel(value)
    last = dist.get_global_rank(world.groups.pp, world.parallel.pp - 1)
    dist.broadcast(value, src=last, group=world.groups.pp)
    return value


def on_host(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of the tensors on the host, in order, by one transfer: the host waits once.

    All tensors are on one device, and float64 holds every value exactly.
    """
    if not tensors:
        return []
    packed = torch.cat([t.detach().double().reshape(-1) for t in tensors]).cpu()
    parts = packed.split([t.numel() for t in tensors])
    return [part.view(t.shape).to(t.dtype) for part, t in zip(parts, tensors, strict=True)]


def outputs_on_host(outputs: Sequence[Any]) -> list[Any]:
    """Outputs of `run_schedule` with their values by row and `metrics` on the host."""
    names = [n for n in ("logprob", "divergence") if any(hasattr(o, n) for o in outputs)]
    tensors = [t for o in outputs for t in (*(getattr(o, n) for n in names), *o.metrics.values())]
    found = iter(on_host(tensors))
    return [
        replace(
            o,
            **{name: next(found) for name in names},
            metrics={name: next(found) for name in o.metrics},
        )
        for o in outputs
    ]


@torch.no_grad()
def policy_metrics(
    world: World, outputs: Sequence[Any], batches: Sequence[PackedBatch]
) -> dict[str, float]:
    """Means over the trained tokens of a step, on every rank: the metrics of the objective, and the
    mismatch between training and rollout.

    outputs: from `run_schedule`. batches: this rank's, on the host. `mismatch_mean` and
    `mismatch_max` are those of |log pi_train - log pi_rollout|, if batches hold the latter.
    """
    sums: dict[str, float] = {}
    largest = 0.0
    first_of_shards = world.tp_rank == 0
    for out, batch in zip(outputs if first_of_shards else [], batches, strict=False):
        tokens = float(out.metrics["tokens"])
        sums["tokens"] = sums.get("tokens", 0.0) + tokens
        for name, value in out.metrics.items():
            if name != "tokens":
                sums[name] = sums.get(name, 0.0) + float(value) * tokens
        trained = batch.token_weight != 0
        if batch.rollout_logprob is not None and bool(trained.any()):
            # A token that training does not keep has probability 0, and does not train.
            kept = trained & (out.logprob.cpu() != -torch.inf)
            gap = (out.logprob.cpu() - batch.rollout_logprob)[kept].abs()
            sums["mismatch_mean"] = sums.get("mismatch_mean", 0.0) + float(gap.sum())
            largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
    total: dict[str, float] = {}
    for found, _ in (gathered := world.all_gather_object((sums, largest))):
        for name, value in found.items():
            total[name] = total.get(name, 0.0) + value
    tokens = max(1.0, total.pop("tokens", 0.0))
    means = {name: value / tokens for name, value in total.items()}
    if "mismatch_mean" in means:
        means["mismatch_max"] = max(most for _, most in gathered)
    return means


@torch.no_grad()
def domain_means(
    world: World,
    outputs: Sequence[Any],
    batches: Sequence[PackedBatch],
    domains: Sequence[str],
    rows: Callable[[Any, PackedBatch], Mapping[str, torch.Tensor]],
) -> dict[str, float]:
    """`name/domain`: means over the trained tokens of each domain, on every rank.

    outputs: from `run_schedule`. batches: this rank's, on the host; their `document_ids` are
    indices into `domains`. rows: computes quantities [R] from the output of the training pass and
    the batch.
    """
    sums: dict[str, list[float]] = {}
    first_of_shards = world.tp_rank == 0
    for out, batch in zip(outputs if first_of_shards else [], batches, strict=False):
        found = rows(out, batch)
        bounds = batch.own_cu_seqlens().tolist()
        for number, start, end in zip(batch.document_ids, bounds[:-1], bounds[1:], strict=False):
            trained = batch.token_weight[start:end] != 0
            for name, values in found.items():
                total = sums.setdefault(f"{name}/{domains[number]}", [0.0, 0.0])
                total[0] += float(values[start:end][trained].double().sum())
                total[1] += float(trained.sum())
    merged: dict[str, list[float]] = {}
    for part in world.all_gather_object(sums):
        for name, (value, count) in part.items():
            total = merged.setdefault(name, [0.0, 0.0])
            total[0] += value
            total[1] += count
    return {name: value / max(1.0, count) for name, (value, count) in sorted(merged.items())}


def mopd_metrics(
    world: World,
    outputs: Sequence[Any],
    batches: Sequence[PackedBatch],
    *,
    domains: Sequence[str],
    ratio_low: float,
    ratio_high: float,
) -> dict[str, float]:
    """`policy_metrics`, and by domain: the teacher's advantage, the estimate of the reverse KL, the
    importance ratio, and the fraction of tokens masked by the gate.

    The reverse-KL estimate is the negative advantage: the mean of log pi - log pi_teacher over the
    student's own tokens. Arguments are those of `domain_means`, and the bounds of the gate.
    """

    def rows(out: Any, batch: PackedBatch) -> dict[str, torch.Tensor]:
        assert batch.teacher_logprob is not None
        assert batch.rollout_logprob is not None
        logprob = out.logprob.float().cpu()
        advantage, importance = mopd_advantage(
            batch.teacher_logprob,
            logprob,
            batch.rollout_logprob,
            ratio_low=ratio_low,
            ratio_high=ratio_high,
            # All tensors are on the host here, whatever the training device.
            backend="reference",
        )
        gated = (importance == 0).to(logprob.dtype)
        return {
            "advantage": advantage,
            "reverse_kl": -advantage,
            "importance": importance,
            "gated": gated,
        }

    overall = policy_metrics(world, outputs, batches)
    return overall | domain_means(world, outputs, batches, domains, rows)


def distill_metrics(
    world: World,
    outputs: Sequence[Any],
    batches: Sequence[PackedBatch],
    *,
    domains: Sequence[str],
    divergence: str,
) -> dict[str, float]:
    """`policy_metrics`, and by domain the divergence, under its name.

    Arguments are those of `domain_means`.
    """

    def rows(out: Any, batch: PackedBatch) -> dict[str, torch.Tensor]:
        return {divergence: out.divergence.float().cpu()}

    overall = policy_metrics(world, outputs, batches)
    return overall | domain_means(world, outputs, batches, domains, rows)


@torch.no_grad()
def token_logprobs(
    world: World,
    config: CascadeConfig,
    chunks: Sequence[Any],
    batches: Sequence[PackedBatch],
    *,
    temperature: float = 1.0,
) -> list[torch.Tensor]:
    """Log-probabilities of the trained rows, [R] float32 on the host, for each of this rank's
    batches; 0 in other rows. Every pipeline rank gets them.

    All data-parallel ranks pass the same number of batches.
    """
    for chunk in chunks:
        chunk.eval()
    micro = [Microbatch.from_batch(b, world.device, temperature=temperature) for b in batches]
    outputs = run_schedule(
        world, config, chunks, micro, lambda m: nll_objective(batch_of(m)), forward_only=True
    )
    shape = (len(batches), batches[0].tokens.numel())
    found = torch.zeros(shape, device=world.device)
    if outputs:
        found = torch.stack([o.logprob.float() for o in outputs]).to(world.device)
    last = dist.get_global_rank(world.groups.pp, world.parallel.pp - 1)
    dist.broadcast(found, src=last, group=world.groups.pp)
    return list(found.cpu())


@torch.no_grad()
def last_states(
    world: World, config: CascadeConfig, chunks: Sequence[Any], batches: Sequence[PackedBatch]
) -> list[torch.Tensor]:
    """Last hidden states of the trained rows of each of this rank's batches, [N, H] on the host, in
    the dtype of activations; [] on all but the last pipeline stage.

    All data-parallel ranks pass the same number of batches.
    """
    for chunk in chunks:
        chunk.eval()
    micro = [Microbatch.from_batch(b, world.device) for b in batches]
    rows = {id(m): b.token_weight.nonzero()[:, 0] for m, b in zip(micro, batches, strict=True)}
    outputs = run_schedule(
        world, config, chunks, micro, lambda m: StatesOf(rows[id(m)]), forward_only=True
    )
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)
    return [o.hidden for o in outputs]


def whole_rows(world: World, rows: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
    """The values of a pack's rows [C], from those of this rank's rows [R] of `batch` on the host.

    Context-parallel ranks call it together.
    """
    whole = rows.new_zeros(batch.capacity)
    parts = rows.split([s.stop - s.start for s in batch.segments])
    for part, segment in zip(parts, batch.segments, strict=True):
        whole[segment] = part
    if batch.cp_size > 1:
        # Every row has one writer.
        dist.all_reduce(whole, group=world.groups.cp)
    return whole


@torch.no_grad()
def heldout_loss(
    world: World,
    config: CascadeConfig,
    chunks: Sequence[Any],
    steps: Iterable[Sequence[PackedBatch]],
) -> tuple[float, int]:
    """Mean negative log-likelihood of the trained tokens and their number, over all ranks.

    chunks: the model, bare or wrapped. steps: this rank's micro-batches, the same number on every
    data-parallel rank.
    """
    for chunk in chunks:
        chunk.eval()
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    counts = torch.zeros(2, dtype=torch.float64)
    for batches in steps:
        micro = [Microbatch.from_batch(b, world.device) for b in batches]
        outputs = run_schedule(
            world, config, chunks, micro, lambda m: nll_objective(batch_of(m)), forward_only=True
        )
        weight = sum(float(b.token_weight.double().sum()) for b in batches)
        rows = sum(b.num_trained() for b in batches)
        local = torch.tensor([weight, rows], dtype=torch.float64)
        counts += world.sum_over_data_parallel(local)
        loss += sum_of_losses(world, outputs)
    return float(loss) / max(1e-20, float(counts[0])), int(counts[1])
