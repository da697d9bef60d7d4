"""Memory of the worst rank: its persistent state and the peak of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemocascade.plan.activations import Activations, in_flight
from nemocascade.plan.job import Job
from nemocascade.plan.parameters import Place, place_of, stage_chunks
from nemocascade.recipe import ParallelConfig

GIB = float(1 << 30)
# CUDA context, NCCL buffers of each communicator, and library workspaces.
_FIXED = 2.5 * GIB


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by purpose.

    activations: kept between forward and backward. peak: in addition, in one layer's backward, or
    in the LM head while its logits exist, whichever is more. rollout: what generation allocates
    and frees again. offloaded: part of gradients and optimizer that is not on the device then.
    other: context and communication.
    """

    place: Place
    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    peak: float
    teachers: float
    rollout: float
    offloaded: float
    other: float

    @property
    def total(self) -> float:
        """Peak bytes of the rank; rollout and training alternate."""
        standing = self.parameters + self.gradients + self.optimizer + self.buffers
        step = max(self.activations + self.peak, self.rollout - self.offloaded)
        return standing + self.teachers + step + self.other

    def table(self) -> list[tuple[str, float]]:
        """Readable names with their GiB."""
        names = (
            ("parameters", self.parameters),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("router buffers", self.buffers),
            ("activations", self.activations),
            ("largest layer or LM head", self.peak),
            ("teachers", self.teachers),
            ("rollout caches and weights (instead of activations)", self.rollout),
            ("context, communication", self.other),
        )
        return [(name, value / GIB) for name, value in names if value]


def stage_memory(job: Job, place: Place) -> Memory:
    """Memory of the rank at `place`."""
    state = job.state(place)
    kept = Activations(job)
    layers = "".join(stage_chunks(job.model, job.parallel, place.pp))
    first, last = place.pp == 0, place.pp == job.parallel.pp - 1
    flying = in_flight(job.parallel, place.pp, job.microbatches)
    each = {symbol: sum(kept.layer(symbol).values()) for symbol in set(layers)}
    activations = flying * sum(each[symbol] for symbol in layers)
    if first:
        activations += flying * sum(kept.embedding().values())
    if job.parallel.pp > 1:
        activations += 2 * kept.stream
    moments = [(activations, kept.backward_peak(symbol) - size) for symbol, size in each.items()]
    if last:
        # The backward of a micro-batch directly follows its loss: only one is in flight.
        moments.append((activations + sum(kept.head().values()), kept.head_peak()))
    activations, peak = max(moments, key=sum, default=(activations, 0.0))
    return Memory(
        place=place,
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        buffers=state.buffers,
        activations=activations,
        peak=peak,
        teachers=float(job.teachers * state.parameters),
        rollout=_rollout(job, place),
        offloaded=state.gradients + state.optimizer if job.rollout.offload else 0.0,
        other=_FIXED if job.on_gpu else 0.0,
    )


def _rollout(job: Job, place: Place) -> float:
    """Bytes that generation allocates on the rank at `place` of the training layout: the KV cache
    and Mamba states of its sequences, and a copy of the weights in a layout of its own."""
    if not job.rollout.sequences:
        return 0.0
    own = job.rollout.parallel.layout(job.parallel)
    if own == replace(job.parallel, cp=1):
        return _caches(job, own, place.pp)
    there = replace(job, parallel=own)
    return max(
        _caches(job, own, stage) + there.state(Place(stage, 0, 0)).parameters
        for stage in range(own.pp)
    )


def _caches(job: Job, parallel: ParallelConfig, stage: int) -> float:
    """Bytes of the caches of a rank's sequences, on a pipeline stage of a generation layout."""
    sequences = -(-job.rollout.sequences // max(1, parallel.data_parallel(job.world_size)))
    layers = "".join(stage_chunks(job.model, parallel, stage))
    m, tp = job.model, parallel.tp
    width = 2 if job.engine.precision == "bf16" else 4
    token = 2 * max(m.num_kv_heads / tp, 1.0) * m.head_dim * width
    state = (m.mamba_inner * m.mamba_state * 4 + m.mamba_channels * (m.mamba_conv - 1) * width) / tp
    each = layers.count("*") * token * job.rollout.length + layers.count("M") * state
    # Two more slots: one for padding rows, one for a prompt that is shared by its continuations.
    return (sequences + 2) * each


def worst_rank(job: Job) -> Memory:
    """Memory of the rank that needs most. Ranks of a stage differ only in their optimizer shard."""
    # The first rank of a stage owns most: padding lies at the ends of the buffers.
    firsts = (Place(stage, 0, 0) for stage in range(job.parallel.pp))
    return max((stage_memory(job, place) for place in firsts), key=lambda m: m.total)


def every_rank(job: Job) -> list[Memory]:
    """Memory of each rank, in rank order."""
    places = [place_of(rank, job.parallel, job.world_size) for rank in range(job.world_size)]
    made = {place: stage_memory(job, place) for place in set(places)}
    return [made[place] for place in places]


def available(job: Job) -> float:
    """Bytes that a rank may use."""
    return job.gpu.memory_gib * GIB * (1.0 - job.margin)
