"""Memory and time of generation: KV cache and states, decode steps, prefill.

A decode step reads the weights that its rows touch, the cached keys and values of every sequence,
and its states, and multiplies; whichever of reading and multiplying takes longer. Launches,
the host's work and collectives come on top. Ranks that share experts decode in step: an expert's
weights are read once for the rows of all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from nemocascade.megatron.generation.kv_cache import state_bytes
from nemocascade.plan.job import Job
from nemocascade.plan.parameters import stage_chunks, stage_parameters
from nemocascade.recipe import ModelConfig, ParallelConfig
from nemocascade.train.flops import layer_flops

# Assumed unless a source is named; none was measured on a GPU.
GRAPH_KERNELS = {"M": 4, "*": 5, "E": 4, "-": 3}
"""Kernels of a layer in a captured decode step on one rank, counted by the dry run
(`tests/gpu_dry`, `rollout`)."""
END_KERNELS, VOCABULARY_KERNELS = 4, 9
"""Kernels outside of the layers: the embedding, the last norm, the LM head and the copy of its
output; and further ones if tensor-parallel ranks share the vocabulary (`nano-rollout-tp8`)."""
SUM_KERNELS = 1
"""Further kernels of a layer that ranks share: the sum with the residual after the exchange."""
LAYER_COLLECTIVES = 2
"""Collectives of a layer that ranks share: rows are gathered, and their sums scattered. A mixture
of experts has one exchange, over the larger of its two groups of ranks."""
EMBEDDING_COLLECTIVES, HEAD_COLLECTIVES = 1, 2
"""Those of tensor-parallel ranks before the first layer and after the last one."""
GRAPH_KERNEL_S = 2e-6
"""Seconds that a kernel of a CUDA graph costs beside its reads: a gap of 0.5 us, as published in
NVIDIA's "Getting Started with CUDA Graphs" (3.4 us for kernels of 2.9 us), and its start."""
EAGER_LAYER_S = 25e-3 / 52
"""Seconds in which the host launches a layer without a graph: 25 ms a step of 52 layers."""
HOST_STEP_S, HOST_ROW_S = 1.5e-3, 5e-6
"""Seconds of the host for each step, from one step's tokens to the next replay, and a row of it."""
EFFICIENCY = 0.4
"""Share of the matrix ceiling that products of generation reach."""
NODE_LATENCY_S, NETWORK_LATENCY_S = 12e-6, 30e-6
"""Seconds of a small collective within a node, and over nodes."""


class StepTerms(NamedTuple):
    """Seconds of a decode step, or of many. host: the host's own work. launches: of kernels.
    weights, cache, states: reads of memory. compute: what products take longer than these reads.
    collectives: of tensor- and expert-parallel ranks, and of pipeline stages."""

    host: float = 0.0
    launches: float = 0.0
    weights: float = 0.0
    cache: float = 0.0
    states: float = 0.0
    compute: float = 0.0
    collectives: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: StepTerms, times: float = 1.0) -> StepTerms:
        """The sum with `times` the other's terms."""
        # Written out: a simulation calls it for every event.
        return StepTerms(
            self.host + times * other.host,
            self.launches + times * other.launches,
            self.weights + times * other.weights,
            self.cache + times * other.cache,
            self.states + times * other.states,
            self.compute + times * other.compute,
            self.collectives + times * other.collectives,
        )


def cache_bytes(
    model: ModelConfig, layers: str, tp: int, width: int, *, sequences: float, tokens: float
) -> float:
    """Bytes of the KV cache and of the states of `layers` on one of `tp` ranks.

    sequences: slots, each with the states of the Mamba-2 layers: the convolution's last inputs, and
    float32. tokens: cached tokens of all sequences, rounded up to blocks. width: bytes of an
    element.
    """
    each = state_bytes(model, layers, tp, width)
    return each.token * tokens + each.slot * sequences


@dataclass(frozen=True)
class _Stage:
    """A pipeline stage on one rank. dense, expert: bytes of weights that every row reads, and of
    one expert in all layers. token, state: bytes of a cached token and of a sequence's states.
    dense_flops, routed_flops: of a row, on this rank. fixed: seconds of launches and collectives.
    row_bytes: of a row in collectives."""

    dense: float
    expert: float
    token: float
    state: float
    dense_flops: float
    routed_flops: float
    launches: float
    collectives: float
    row_bytes: float


class DecodeTimeModel:
    """Time of decode steps and prefills in a generation layout of the job's model.

    members: replicas that share experts and so decode in step. graphs: a step is a CUDA graph.
    """

    def __init__(self, job: Job, parallel: ParallelConfig) -> None:
        self.job, self.parallel, self.model = job, parallel, job.model
        self.width = 2 if job.engine.precision == "bf16" else 4
        group = parallel.ep * parallel.etp
        self.members = max(1, group // parallel.tp) if "E" in job.model.pattern else 1
        self.graphs = job.on_gpu and parallel.vpp == 1
        self.bandwidth = job.gpu.memory_gb_s * 1e9
        of_node = group <= job.gpu.per_node
        self.link = (job.gpu.link_gb_s if of_node else job.gpu.network_gb_s) * 1e9
        # Experts of a rank, and the probability that a row does not choose a given one.
        self.local = job.model.num_experts // parallel.ep
        self.missed = 1.0 - job.model.experts_per_token / job.model.num_experts
        self.rate = job.gpu.matmul_tflops * 1e12 * EFFICIENCY
        self._prefills: dict[float, float] = {}
        self.stages = [self._stage(rank) for rank in range(parallel.pp)]

    def _stage(self, rank: int) -> _Stage:
        m, p = self.model, self.parallel
        layers = "".join(stage_chunks(m, p, rank))
        chunks = stage_parameters(m, p, self.job.moe, rank)
        weights = [q for chunk in chunks for q in chunk if "word_embeddings" not in q.name]
        experts = sum(q.numel for q in weights if q.expert)
        dense = sum(q.numel for q in weights if not q.expert)
        routed = 4 if m.activation == "relu2" else 6
        routed_flops = float(routed) * m.hidden_size * m.experts_per_token * m.expert_width
        routed_flops *= layers.count("E") / (p.ep * p.etp)
        return _Stage(
            dense=dense * self.width,
            expert=experts / self.local * self.width,
            token=cache_bytes(m, layers, p.tp, self.width, sequences=0, tokens=1),
            # They are read and written.
            state=2 * cache_bytes(m, layers, p.tp, self.width, sequences=1, tokens=0),
            dense_flops=2.0 * dense,
            routed_flops=routed_flops,
            launches=self._launches(layers, last=rank == p.pp - 1),
            collectives=self._latency(layers, first=rank == 0, last=rank == p.pp - 1),
            # Gathered in the model's width, and summed in float32.
            row_bytes=layers.count("E") * m.hidden_size * (self.width + 4) * (p.ep * p.etp > 1),
        )

    def _launches(self, layers: str, *, last: bool) -> float:
        """Seconds that a stage's launches cost."""
        if not self.graphs:
            return EAGER_LAYER_S * len(layers)
        kernels = sum(GRAPH_KERNELS[symbol] for symbol in layers)
        kernels += SUM_KERNELS * sum(self._exchanging(symbol) > 1 for symbol in layers)
        # All ends are counted on the last stage.
        kernels += last * (END_KERNELS + VOCABULARY_KERNELS * (self.parallel.tp > 1))
        return GRAPH_KERNEL_S * kernels

    def _exchanging(self, symbol: str) -> int:
        """Ranks that exchange the rows of a layer."""
        p = self.parallel
        return max(p.tp, p.ep * p.etp) if symbol == "E" else p.tp

    def _latency(self, layers: str, *, first: bool, last: bool) -> float:
        """Seconds of a stage's collectives, of no size."""
        p, found = self.parallel, 0.0
        for symbol in layers:
            if (ranks := self._exchanging(symbol)) > 1:
                found += LAYER_COLLECTIVES * self._latency_of(ranks)
        if p.tp > 1:
            ends = first * EMBEDDING_COLLECTIVES + last * HEAD_COLLECTIVES
            found += ends * self._latency_of(p.tp)
        if p.pp > 1:
            # The hidden states, and the drawn tokens.
            found += 2 * self._latency_of(self.job.world_size)
        return found

    def _latency_of(self, ranks: int) -> float:
        return NODE_LATENCY_S if ranks <= self.job.gpu.per_node else NETWORK_LATENCY_S

    def step(self, rows: float, shared: float, cached: float) -> StepTerms:
        """Seconds of a decode step by term.

        rows: sequences of the fullest replica. shared: those of all replicas that decode in step.
        cached: tokens in the fullest replica's cache.
        """
        # Experts that at least one of the rows has chosen, if all are equally likely.
        touched = self.local * (1.0 - self.missed**shared)
        launches = weights = cache = states = compute = collectives = 0.0
        for stage in self.stages:
            read_weights = (stage.dense + touched * stage.expert) / self.bandwidth
            read_cache = stage.token * cached / self.bandwidth
            read_states = stage.state * rows / self.bandwidth
            flops = stage.dense_flops * rows + stage.routed_flops * shared
            read = read_weights + read_cache + read_states
            weights, cache, states = (
                weights + read_weights,
                cache + read_cache,
                states + read_states,
            )
            compute += max(0.0, flops / self.rate - read)
            launches += stage.launches
            collectives += stage.collectives + stage.row_bytes * shared / self.link
        host = HOST_STEP_S + HOST_ROW_S * rows
        return StepTerms(host, launches, weights, cache, states, compute, collectives)

    def prefill(self, tokens: float) -> float:
        """Seconds to prefill `tokens` of a sequence, in chunks and without a graph."""
        if tokens not in self._prefills:
            self._prefills[tokens] = self._prefill(max(1, int(tokens)))
        return self._prefills[tokens]

    def _prefill(self, tokens: int) -> float:
        m, p = self.model, self.parallel
        chunks = -(-tokens // (self.job.rollout.chunk or tokens))
        flops = sum(m.pattern.count(s) * layer_flops(m, s, tokens) for s in set(m.pattern))
        flops /= p.tp * p.pp
        weights = sum(s.dense + s.expert * self.local for s in self.stages)
        launches = EAGER_LAYER_S * m.num_layers
        latency = sum(stage.collectives for stage in self.stages)
        return chunks * (launches + latency + weights / self.bandwidth) + flops / self.rate
