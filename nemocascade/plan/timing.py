"""Time model of a step: work over ceilings, communication by axis, pipeline bubble, imbalance.

A layer takes the time of its products at the matrix ceiling, of its pointwise traffic at the memory
ceiling, and of its communication, which is counted as not overlapped. The backward pass is twice
the forward; recomputation adds a forward. The data-parallel reduction overlaps with backward.
Context parallelism: T / cp tokens a rank; keys and values, states and halo rows are exchanged.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

from nemocascade.plan.job import Job
from nemocascade.plan.parameters import Place, stage_chunks
from nemocascade.plan.segments import crossed_segments
from nemocascade.train.flops import layer_flops

# Assumed share of the matrix ceiling that a layer's products reach: nearly all for large dense
# products, less for the experts' grouped ones, least for the scan's small blocks.
_EFFICIENCY = {"M": 0.55, "*": 0.7, "E": 0.6, "-": 0.85, "head": 0.85}
# Elements that a layer's pointwise operators move for each row of hidden states, in units of H.
_TRAFFIC = {"M": 24.0, "*": 14.0, "E": 20.0, "-": 12.0}
# Elements that a mixer moves more in each pass, for each channel of the convolution: for a row of a
# rank whose segments continue a document, and for one of a document that goes on in another
# segment. Torch's operators, counted by hand: the convolution is in float32 there.
_ENTERING_TRAFFIC, _LEAVING_TRAFFIC = 80.0, 70.0
_OVERLAP = 0.8


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. compute: time of the slowest stage, with recomputation.
    tensor, context, expert, pipeline, data: exposed communication of the axes. bubble: pipeline
    bubble.
    imbalance: uneven packs over data-parallel ranks. optimizer: the update itself. flops: work
    of the whole step by the trainer's formula, without recomputation.
    """

    compute: float
    tensor: float
    context: float
    expert: float
    pipeline: float
    data: float
    bubble: float
    imbalance: float
    optimizer: float
    tokens: int
    flops: float

    @property
    def total(self) -> float:
        parts = (self.compute, self.tensor, self.context, self.expert, self.pipeline, self.data)
        return sum(parts) + self.bubble + self.imbalance + self.optimizer

    def table(self) -> list[tuple[str, float]]:
        """Readable names with their seconds."""
        names = [f.name for f in dataclasses.fields(self) if f.type == "float"]
        return [(name, getattr(self, name)) for name in names if name != "flops"]


class _Cost(NamedTuple):
    """Seconds of computation, and of communication on the tensor, context and expert axes."""

    compute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: _Cost, times: int = 1) -> _Cost:
        return _Cost(*(a + times * b for a, b in zip(self, other, strict=True)))


class StepModel:
    """Time model of a job's layers on its layout."""

    def __init__(self, job: Job, pack_imbalance: float = 1.03) -> None:
        self.job, self.pack_imbalance = job, pack_imbalance
        p = job.parallel
        self.width = 2 if job.engine.precision == "bf16" else 4
        self.stream = job.tokens * job.model.hidden_size * self.width
        self.cut = crossed_segments(job.capacity, job.document_length, p.cp)
        self.tensor_speed = self._speed(p.tp)
        self.context_speed = self._speed(p.tp * p.cp)
        self.expert_speed = self._speed(p.etp * p.ep)

    def _speed(self, ranks: int) -> float:
        """Bandwidth in bytes a second within a group of neighbouring ranks."""
        gpu = self.job.gpu
        return (gpu.link_gb_s if ranks <= gpu.per_node else gpu.network_gb_s) * 1e9

    def layer(self, symbol: str) -> _Cost:
        """Cost of forward and backward of one layer for one micro-batch."""
        job, p = self.job, self.job.parallel
        passes = 4.0 if job.engine.recompute else 3.0
        length = job.document_length
        # Causal attention too: a rank's first and last segment balance each other.
        flops = layer_flops(job.model, symbol, length) * job.tokens / length / p.tp
        slow = job.imbalance if symbol == "E" and p.ep > 1 else 1.0
        rate = job.gpu.matmul_tflops * 1e12 * _EFFICIENCY[symbol]
        moved = _TRAFFIC[symbol] * self.stream / p.tp
        if symbol == "M":
            moved += self._border_traffic()
        compute = passes * (flops * slow / rate + moved / (job.gpu.memory_gb_s * 1e9))
        gathers = self.stream * (p.tp - 1) / p.tp / self.tensor_speed
        shared = symbol != "E" or job.model.shared_expert_width > 0
        # A gather and a scatter in each pass, and one more gather for the weight gradient.
        tensor = gathers * (2 * passes + 1) if p.tp > 1 and shared else 0.0
        context = self._exchange(symbol, passes) if self.cut.exchanges else 0.0
        return _Cost(compute, tensor, context, self._dispatch(passes) if symbol == "E" else 0.0)

    def _border_traffic(self) -> float:
        """Bytes that a Mamba-2 mixer moves in a pass for documents that cross segments."""
        m, cut = self.job.model, self.cut
        elements = _ENTERING_TRAFFIC * self.job.tokens if cut.entering else 0.0
        elements += _LEAVING_TRAFFIC * cut.left
        return elements * m.mamba_channels / self.job.parallel.tp * self.width

    def _exchange(self, symbol: str, passes: float) -> float:
        """Seconds in which a context-parallel rank gathers what its rows need of other ranks."""
        m, p = self.job.model, self.job.parallel
        if symbol == "*":
            keys = max(m.num_kv_heads / p.tp, 1.0) * m.head_dim
            gathered = 2.0 * self.job.capacity * keys * self.width
        elif symbol == "M":
            # Of each segment: its float32 state, and the last rows of the convolution's input.
            halo = (m.mamba_conv - 1) * m.mamba_channels * self.width
            gathered = 2.0 * p.cp * (m.mamba_inner * m.mamba_state * 4 + halo) / p.tp
        else:
            return 0.0
        # A gather in every forward pass, a reduce-scatter in backward, which counts as two.
        return (passes - 1.0) * gathered * (p.cp - 1) / p.cp / self.context_speed

    def _dispatch(self, passes: float) -> float:
        p, m = self.job.parallel, self.job.model
        group = p.ep * p.etp
        if group == 1:
            return 0.0
        sent = self.stream / p.tp * m.experts_per_token * p.etp * (group - 1) / group
        # Dispatch and combine in every pass; the two products of backward share one of each.
        exchanges = 2.0 * (passes - 1.0)
        return exchanges * sent * self.job.imbalance / self.expert_speed

    def head(self) -> _Cost:
        """Cost of LM head and loss: three products, computed in the forward pass."""
        m = self.job.model
        flops = 6.0 * m.hidden_size * m.vocab_size * self.job.tokens / self.job.parallel.tp
        rate = self.job.gpu.matmul_tflops * 1e12 * _EFFICIENCY["head"]
        return _Cost(flops / rate)

    def stage(self, pp_rank: int) -> _Cost:
        """Cost of forward and backward of a stage for one micro-batch."""
        cost = _Cost()
        layers = "".join(stage_chunks(self.job.model, self.job.parallel, pp_rank))
        for symbol in sorted(set(layers)):
            cost = cost.plus(self.layer(symbol), layers.count(symbol))
        if pp_rank == self.job.parallel.pp - 1:
            cost = cost.plus(self.head())
        return cost

    @functools.cached_property
    def slowest(self) -> _Cost:
        """Cost of the slowest stage for one micro-batch."""
        stages = [self.stage(rank) for rank in range(self.job.parallel.pp)]
        return max(stages, key=lambda c: c.total)

    def bound(self) -> float:
        """Lower bound of a step's seconds, without the optimizer's part: for a search."""
        p = self.job.parallel
        return self.slowest.total * (self.job.microbatches + (p.pp - 1) / p.vpp)

    def step(self) -> StepTime:
        """Time of a whole step."""
        job, p = self.job, self.job.parallel
        dp = p.data_parallel(job.world_size)
        slowest, count = self.slowest, job.microbatches
        bubble = slowest.total * (p.pp - 1) / p.vpp
        hand_over = 0.0
        if p.pp > 1:
            edge = self.stream / p.tp / self._speed(p.pp * job.world_size // p.pp)
            hand_over = 2.0 * p.vpp * count * edge
        data, update = self._update()
        backward = slowest.total * 2.0 / 3.0
        working = count * slowest.total
        flops = (
            sum(3.0 * layer_flops(job.model, s, job.document_length) for s in job.model.pattern)
            / job.document_length
            + 6.0 * job.model.hidden_size * job.model.vocab_size
        )
        tokens = job.capacity * job.sequences_per_step
        return StepTime(
            compute=count * slowest.compute,
            tensor=count * slowest.tensor,
            context=count * slowest.context,
            expert=count * slowest.expert,
            pipeline=hand_over,
            data=max(data - _OVERLAP * backward, data * (1.0 - _OVERLAP)),
            bubble=bubble,
            imbalance=working * (self.pack_imbalance - 1.0) if dp > 1 else 0.0,
            optimizer=update,
            tokens=tokens,
            flops=flops * tokens,
        )

    def _update(self) -> tuple[float, float]:
        """Seconds to reduce gradients and gather weights, and seconds of the update."""
        job, p = self.job, self.job.parallel
        states = (job.state(Place(stage, 0, 0)) for stage in range(p.pp))
        state = max(states, key=lambda s: s.gradients)
        replicas = job.replicas
        moved = (state.gradients + state.parameters) * (replicas - 1) / replicas
        reducing = moved / self._speed(job.world_size) if replicas > 1 else 0.0
        return reducing, 3.0 * state.optimizer / (job.gpu.memory_gb_s * 1e9)
