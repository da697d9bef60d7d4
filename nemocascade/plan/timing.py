"""Time model of a step: work over ceilings, communication by axis, pipeline bubble, imbalance.

A layer takes the time of its products at the matrix ceiling, of its pointwise traffic at the memory
ceiling, and of its communication. The backward pass is twice the forward; recomputation adds a
forward. Overlapped are the exchanges of experts with the shared expert, the data-parallel reduction
with backward, and by setting the gather of weights with forward, and tensor-parallel communication
with the linear layers. Exchanges of experts and of tensor-parallel ranks have a latency beside
their bytes. If the host takes longer to launch a micro-batch's operators than the device to run
them, the difference is added.
Context parallelism: T / cp tokens a rank; keys and values, states and halo rows are exchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from nemocascade.megatron.context import MOST_GATHERED
from nemocascade.plan.checkpoints import checkpoint_cost
from nemocascade.plan.expert_rows import expert_rows
from nemocascade.plan.generation import NETWORK_LATENCY_S, NODE_LATENCY_S
from nemocascade.plan.host_time import (
    OPERATOR_S,
    SYNCHRONISATION_S,
    SYNCHRONISATIONS,
    exchanges,
    operators,
)
from nemocascade.plan.job import Job
from nemocascade.plan.parameters import RankCoordinates, stage_chunks, stage_kinds
from nemocascade.plan.segments import crossed_segments, scan_rounds
from nemocascade.train.flops import layer_flops

# Assumed share of the matrix ceiling that a layer's products reach: nearly all for large dense
# products, less for the experts' grouped ones, least for the scan's small blocks.
_EFFICIENCY = {"M": 0.55, "*": 0.7, "E": 0.6, "-": 0.85, "head": 0.85}
# Elements that a layer's pointwise operators move for each row of hidden states, in units of H.
_TRAFFIC = {"M": 24.0, "*": 14.0, "E": 20.0, "-": 12.0}
# Elements that a mixer moves more in each pass, for each channel of the convolution: for a row of a
# rank whose segments continue a document, and for one of a document that continues in another
# segment. Torch's operators, counted by hand: the convolution is in float32 there.
_ENTERING_TRAFFIC, _LEAVING_TRAFFIC = 80.0, 70.0
_OVERLAP = 0.8
# FP8 products have twice the matrix ceiling. Shares of it that they reach, estimates: each block of
# 128 of a contraction is scaled and summed outside of the matrix unit.
_FP8_EFFICIENCY = {"experts": 0.45, "linears": 0.65}
# Bytes that quantisation moves in a forward and in a backward: of a parameter (2 read, 1 written),
# of a value of a dispatched row (gathered by columns, twice), and of a value of a token's row.
_FP8_WEIGHT, _FP8_COLUMNS, _FP8_ROW = (3.0, 3.0), (0.0, 6.0), (3.0, 3.0)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step. compute: time of the slowest stage, with recomputation.
    tensor, context, expert, pipeline, data: exposed communication of the axes. bubble: pipeline
    bubble. host: launches that the device waits for.
    imbalance: uneven packs over data-parallel ranks. optimizer: the update itself. checkpoint: wait
    for checkpoints, spread over the steps between them. flops: work of the whole step by the
    trainer's formula, without recomputation.
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
    host: float = 0.0
    checkpoint: float = 0.0

    @property
    def total(self) -> float:
        parts = (self.compute, self.tensor, self.context, self.expert, self.pipeline, self.data)
        rest = (self.bubble, self.imbalance, self.optimizer, self.host, self.checkpoint)
        return sum(parts) + sum(rest)

    def table(self) -> list[tuple[str, float]]:
        """Readable names with their seconds."""
        names = [f.name for f in dataclasses.fields(self) if f.type == "float"]
        return [(name, getattr(self, name)) for name in names if name != "flops"]


class _Cost(NamedTuple):
    """Seconds of computation, of communication on the tensor, context and expert axes, and of
    launches that the device waits for."""

    compute: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    host: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: _Cost, times: int = 1) -> _Cost:
        return _Cost(
            self.compute + times * other.compute,
            self.tensor + times * other.tensor,
            self.context + times * other.context,
            self.expert + times * other.expert,
            self.host + times * other.host,
        )


LayerCosts = dict[tuple[int | str, ...], dict[str, _Cost]]
"""Costs of layers by kind, for each size of micro-batch, layout and recomputation."""


class StepModel:
    """Time model of a job's layers on its layout.

    pack_imbalance: work of the fullest data-parallel rank over the mean; 1 if all packs are equal.
    layers: costs of layers, kept for further models of the same job on other layouts.
    """

    def __init__(
        self, job: Job, pack_imbalance: float = 1.03, layers: LayerCosts | None = None
    ) -> None:
        self.job, self.pack_imbalance = job, pack_imbalance
        p = job.parallel
        # What a layer depends on, among that in which layouts of a search differ.
        key = (job.capacity, job.document_length, p.tp, p.cp, p.ep, p.etp, job.engine.recomputed)
        self._layers = {} if layers is None else layers.setdefault(key, {})
        self.width = 2 if job.engine.precision == "bf16" else 4
        self.stream = job.tokens * job.model.hidden_size * self.width
        self.cut = crossed_segments(job.capacity, job.document_length, p.cp)
        self.tensor_speed = self._speed(p.tp)
        self.context_speed = self._speed(p.tp * p.cp)

    def _speed(self, ranks: int) -> float:
        """Bandwidth in bytes a second within a group of neighbouring ranks."""
        gpu = self.job.gpu
        return (gpu.link_gb_s if ranks <= gpu.per_node else gpu.network_gb_s) * 1e9

    def _latency(self, ranks: int) -> float:
        """Seconds of a small collective over so many neighbouring ranks."""
        return NODE_LATENCY_S if ranks <= self.job.gpu.per_node else NETWORK_LATENCY_S

    def layer(self, symbol: str) -> _Cost:
        """Cost of forward and backward of one layer for one micro-batch."""
        if symbol not in self._layers:
            self._layers[symbol] = self._layer(symbol)
        return self._layers[symbol]

    def _layer(self, symbol: str) -> _Cost:
        job, p = self.job, self.job.parallel
        passes = 4.0 if symbol in job.engine.recomputed else 3.0
        length = job.document_length
        # Causal attention too: a rank's first and last segment balance each other.
        flops = layer_flops(job.model, symbol, length) * job.tokens / length / p.tp
        slow = job.imbalance if symbol == "E" and p.ep > 1 else 1.0
        rate = job.gpu.matmul_tflops * 1e12 * _EFFICIENCY[symbol]
        moved = passes * _TRAFFIC[symbol] * self.stream / p.tp
        if symbol == "M":
            moved += self._border_traffic(passes)
        seconds = flops * slow / rate
        for what, share in self._fp8_shares(symbol).items():
            fast = 2.0 * job.gpu.matmul_tflops * 1e12 * _FP8_EFFICIENCY[what]
            seconds += share * flops * slow * (1.0 / fast - 1.0 / rate)
            if what == "experts":
                moved += self._fp8_experts_traffic(passes)
        # Frozen weights have no gradient; the products of adapters are few.
        products = passes - 1.0 if job.lora.rank else passes
        compute = products * seconds + moved / (job.gpu.memory_gb_s * 1e9)
        gathers = self.stream * (p.tp - 1) / p.tp / self.tensor_speed + self._latency(p.tp)
        shared = symbol != "E" or job.model.shared_expert_width > 0
        # A gather and a scatter in each pass, and one more gather for the weight gradient.
        tensor = gathers * (2 * passes + 1) if p.tp > 1 and shared else 0.0
        if job.engine.overlap_tensor_parallel:
            tensor = _exposed(tensor, passes * self._linears_s(symbol))
        context = self._exchange(symbol, passes) if self.cut.exchanges else 0.0
        return _Cost(compute, tensor, context, self._dispatch(passes) if symbol == "E" else 0.0)

    def _fp8_shares(self, symbol: str) -> dict[str, float]:
        """Shares of a layer's operations that are FP8 products."""
        m, engine = self.job.model, self.job.engine
        length = self.job.document_length
        matrices = 6 if m.activation == "swiglu" else 4
        found = {}
        if engine.linears == "fp8":
            found["linears"] = self._linear_flops(symbol)
        if engine.experts == "fp8" and symbol == "E":
            found["experts"] = float(matrices * m.experts_per_token * m.expert_width)
        whole = layer_flops(m, symbol, length) / length / m.hidden_size
        return {what: each / whole for what, each in found.items()}

    def _fp8_experts_traffic(self, passes: float) -> float:
        """Bytes that quantisation of weights, rows and gradients moves in a layer's experts."""
        m, p, job = self.job.model, self.job.parallel, self.job
        weights = m.num_experts / p.ep * m.hidden_size * m.expert_width / p.etp
        weights *= 3 if m.activation == "swiglu" else 2
        rows = job.tokens / p.tp * m.hidden_size
        arrived = rows * m.experts_per_token * p.etp
        if p.ep * p.etp > 1:
            arrived *= job.imbalance
            rows = arrived
        each = [
            _FP8_WEIGHT[i] * weights + _FP8_COLUMNS[i] * arrived + _FP8_ROW[i] * rows
            for i in (0, 1)
        ]
        # A backward counts as two passes.
        return each[0] * (passes - 2.0) + each[1]

    def _border_traffic(self, passes: float) -> float:
        """Bytes that a Mamba-2 mixer moves for documents that cross segments."""
        job, cut = self.job, self.cut
        elements = _ENTERING_TRAFFIC * passes * cut.entered + _LEAVING_TRAFFIC * passes * cut.left
        moved = elements * job.model.mamba_channels
        # Backward computes the states that leave again, whether the layer is recomputed or not; and
        # the rows of continued documents, unless it is.
        moved += _LEAVING_TRAFFIC * cut.left * job.model.mamba_channels
        if "M" not in job.engine.recomputed:
            own = _TRAFFIC["M"] * job.model.hidden_size
            moved += (_ENTERING_TRAFFIC * job.model.mamba_channels + own) * cut.entered
        return moved / job.parallel.tp * self.width

    def _exchange(self, symbol: str, passes: float) -> float:
        """Seconds in which a context-parallel rank gathers what its rows need of other ranks.

        There is a gather in every forward pass, and a reduce-scatter in backward, which counts as
        two passes.
        """
        m, p = self.job.model, self.job.parallel
        if symbol == "*":
            keys = max(m.num_kv_heads / p.tp, 1.0) * m.head_dim
            gathered = 2.0 * self.job.capacity * keys * self.width
            # The reduce-scatter of their gradients is in float32.
            return self._moved(gathered * (passes - 2.0) + gathered * 4.0 / self.width)
        if symbol == "M":
            # For each segment: its float32 state, and the last rows of the convolution's input.
            halo = (m.mamba_conv - 1) * m.mamba_channels * self.width
            states = 2.0 * p.cp
            if p.cp > MOST_GATHERED:
                states = 2.0 * scan_rounds(self.cut.longest)
            gathered = (states * m.mamba_inner * m.mamba_state * 4 + 2.0 * p.cp * halo) / p.tp
            return self._moved(gathered * (passes - 1.0))
        return 0.0

    def _moved(self, gathered: float) -> float:
        """Seconds of gathers, or of their reduce-scatters, of so many bytes of all ranks."""
        cp = self.job.parallel.cp
        return gathered * (cp - 1) / cp / self.context_speed

    def _dispatch(self, passes: float) -> float:
        job, gpu = self.job, self.job.gpu
        rows = expert_rows(job.model, job.parallel, gpu.per_node, job.engine.expert_exchange)
        each = self.stream / job.parallel.tp
        network, link = (
            each * count / (speed * 1e9)
            for count, speed in ((rows.network, gpu.network_gb_s), (rows.link, gpu.link_gb_s))
        )
        # One all-to-all uses network and links at the same time, and two hops follow each other.
        first, second = (network, link) if rows.two_hops else (max(network, link), 0.0)
        first, second = first * job.imbalance, second * job.imbalance
        # Half of the shared expert runs beside each first hop; in backward it takes twice as long.
        half = self._shared_expert_s() / 2.0
        forward, backward = _exposed(first, half), _exposed(first, 2.0 * half)
        # Dispatch and combine in every pass; the two products of backward share one of each.
        moved = 2.0 * ((passes - 2.0) * (forward + second) + backward + second)
        ranks = job.parallel.ep * job.parallel.etp
        return moved + (self._dispatch_latency(ranks) if ranks > 1 and job.on_gpu else 0.0)

    def _shared_expert_s(self) -> float:
        """Seconds of the shared expert's forward if it runs while rows travel, else 0."""
        overlaps = self.job.engine.overlaps_shared_expert(self.job.parallel, self.job.model)
        return self._linears_s("E") if overlaps else 0.0

    def _linears_s(self, symbol: str) -> float:
        """Seconds of the linear layers in a forward pass of a layer."""
        job = self.job
        rate = job.gpu.matmul_tflops * 1e12 * _EFFICIENCY["-"]
        if job.engine.linears == "fp8":
            rate = 2.0 * job.gpu.matmul_tflops * 1e12 * _FP8_EFFICIENCY["linears"]
        flops = self._linear_flops(symbol) * job.model.hidden_size
        return flops * job.tokens / job.parallel.tp / rate

    def _linear_flops(self, symbol: str) -> float:
        """Operations of a layer's linear layers for a token, in units of H."""
        m = self.job.model
        matrices = 6 if m.activation == "swiglu" else 4
        return {
            "M": 2.0 * (m.mamba_in_proj + m.mamba_inner),
            "*": 4.0 * (m.num_heads + m.num_kv_heads) * m.head_dim,
            "E": float(matrices * m.shared_expert_width),
            "-": float(matrices * m.mlp_width),
        }[symbol]

    def _dispatch_latency(self, ranks: int) -> float:
        """Seconds that a layer's exchanges and synchronisations take for rows of no size."""
        kind: str = self.job.engine.expert_exchange
        if kind == "auto":
            several = self.job.parallel.expert_nodes(self.job.gpu.per_node) > 1
            kind = "hierarchical" if several else "direct"
        count = exchanges(kind, recomputed="E" in self.job.engine.recomputed)
        waits = SYNCHRONISATIONS[kind] * SYNCHRONISATION_S
        return count * self._latency(ranks) + waits

    def head(self) -> _Cost:
        """Cost of LM head and loss: three products, computed in the forward pass; two if the head
        is frozen."""
        m = self.job.model
        each = 4.0 if self.job.lora.rank else 6.0
        flops = each * m.hidden_size * m.vocab_size * self.job.tokens / self.job.parallel.tp
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
        return cost._replace(host=max(0.0, self._launches(layers) - cost.total))

    def _launches(self, layers: str) -> float:
        """Seconds in which the host launches a micro-batch of some layers on a GPU."""
        if not self.job.on_gpu:
            return 0.0
        p, engine = self.job.parallel, self.job.engine
        return OPERATOR_S * sum(
            layers.count(symbol) * operators(symbol, p, engine) for symbol in set(layers)
        )

    @functools.cached_property
    def slowest(self) -> _Cost:
        """Cost of the slowest stage for one micro-batch."""
        p = self.job.parallel
        kinds = stage_kinds(p.layout(self.job.model.pattern), p.pp)
        seconds = {symbol: self.layer(symbol).total for symbol in set(self.job.model.pattern)}
        totals = {
            rank: sum(number * seconds[symbol] for symbol, number in counts)
            for rank, counts in kinds
        }
        totals[p.pp - 1] += self.head().total
        return self.stage(max(totals, key=totals.__getitem__))

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
        transfer = 0.0
        if p.pp > 1:
            edge = self.stream / p.tp / self._speed(p.pp * job.world_size // p.pp)
            transfer = 2.0 * p.vpp * count * edge
        reducing, gathering, update = self._update()
        backward = slowest.total * 2.0 / 3.0
        data = _exposed(reducing + gathering, backward)
        if job.engine.overlap_parameter_gather:
            data = _exposed(reducing, backward) + _exposed(gathering, slowest.total / 3.0)
        working = count * slowest.total
        flops = (
            sum(3.0 * layer_flops(job.model, s, job.document_length) for s in job.model.pattern)
            / job.document_length
            + 6.0 * job.model.hidden_size * job.model.vocab_size
        )
        tokens = job.capacity * job.sequences_per_step
        found = StepTime(
            compute=count * slowest.compute,
            tensor=count * slowest.tensor,
            context=count * slowest.context,
            expert=count * slowest.expert,
            pipeline=transfer,
            data=data,
            bubble=bubble,
            imbalance=working * (self.pack_imbalance - 1.0) if dp > 1 else 0.0,
            optimizer=update,
            tokens=tokens,
            flops=flops * tokens,
            host=count * slowest.host,
        )
        return dataclasses.replace(found, checkpoint=self._checkpoint(found.total))

    def _checkpoint(self, step_s: float) -> float:
        """Seconds of a step of `step_s` in which training waits for checkpoints, on average."""
        job, settings = self.job, self.job.checkpoint
        if not settings.every:
            return 0.0
        # A step with rollouts is longer, and its writes end before the next.
        interval = settings.every * step_s if job.work is None else math.inf
        blocked = checkpoint_cost(job).blocked_s(interval, asynchronous=settings.asynchronous)
        return blocked / settings.every

    def _update(self) -> tuple[float, float, float]:
        """Seconds to reduce gradients, to gather weights, and of the update."""
        job, p = self.job, self.job.parallel
        states = (job.state(RankCoordinates(stage, 0, 0)) for stage in range(p.pp))
        state = max(states, key=lambda s: s.gradients)
        replicas = job.replicas
        each = (replicas - 1) / replicas / self._speed(job.world_size)
        update = 3.0 * state.optimizer / (job.gpu.memory_gb_s * 1e9)
        return state.gradients * each, state.parameters * each, update


def _exposed(seconds: float, beside: float) -> float:
    """Seconds of communication that work of `beside` seconds does not hide."""
    return max(seconds - _OVERLAP * beside, seconds * (1.0 - _OVERLAP))
