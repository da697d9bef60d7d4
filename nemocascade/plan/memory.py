"""Memory of the worst rank: its persistent state and the peak of a step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from nemocascade.megatron.generation.kv_cache import (
    CPU_GIB,
    CacheMemory,
    Load,
    block_size,
    state_bytes,
)
from nemocascade.plan.activations import Activations, in_flight
from nemocascade.plan.job import Job
from nemocascade.plan.parameters import RankCoordinates, adapted_bytes, place_of, stage_chunks
from nemocascade.recipe import LoraConfig, ParallelConfig

GIB = float(1 << 30)
# CUDA context, NCCL buffers of each communicator, and library workspaces.
_FIXED = 2.5 * GIB


class Blocks(NamedTuple):
    """Blocks of a rank's KV cache, each of `size` tokens. pool: that there are. needed: of the
    longest sequence and a stored prompt. live: of the tokens of all slots, on average. slots: that
    an engine chooses which may."""

    size: int
    pool: int
    needed: int
    live: float
    slots: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by purpose.

    activations: kept between forward and backward, and the teachers' LM heads of an exact
    divergence. peak: in addition, in one layer's backward, or
    in the LM head while its logits exist, whichever is more. weights, cache: the copy of the
    weights in a generation layout, and KV cache, states and work space of generation; they are
    freed before training. offloaded: part of gradients and optimizer that is not on the device
    while rollouts are generated. other: context and communication. blocks: of the KV cache; None
    without rollouts.
    """

    place: RankCoordinates
    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    activations: float
    peak: float
    teachers: float
    weights: float
    cache: float
    offloaded: float
    other: float
    blocks: Blocks | None = None

    @property
    def standing(self) -> float:
        """Bytes that are there in every phase, unless they are offloaded."""
        standing = self.parameters + self.gradients + self.optimizer + self.buffers
        return standing + self.teachers + self.other

    @property
    def training(self) -> float:
        """Peak bytes while the rank trains."""
        return self.standing + self.activations + self.peak

    @property
    def rollout(self) -> float:
        """Peak bytes while the rank generates; 0 if it does not."""
        if not self.cache:
            return 0.0
        return self.standing - self.offloaded + self.weights + self.cache

    @property
    def total(self) -> float:
        """Peak bytes of the rank: of the phase that needs more."""
        return max(self.training, self.rollout)

    def phases(self) -> list[tuple[str, float]]:
        """Names of the phases with their peak GiB."""
        found = (("training", self.training), ("rollouts", self.rollout))
        return [(name, value / GIB) for name, value in found if value]

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
            ("context, communication", self.other),
            ("rollouts: weights", self.weights),
            ("rollouts: cache", self.cache),
            ("rollouts: offloaded", -self.offloaded),
        )
        return [(name, value / GIB) for name, value in names if value]


def stage_memory(job: Job, place: RankCoordinates) -> Memory:
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
    if last:
        activations += kept.teacher_heads()
    moments = [(activations, kept.backward_peak(symbol) - size) for symbol, size in each.items()]
    if last:
        # The backward of a micro-batch directly follows its loss: only one is in flight.
        moments.append((activations + sum(kept.head().values()), kept.head_peak()))
    activations, peak = max(moments, key=sum, default=(activations, 0.0))
    trains = Memory(
        place=place,
        parameters=state.parameters,
        gradients=state.gradients,
        optimizer=state.optimizer,
        buffers=state.buffers,
        activations=activations,
        peak=peak,
        teachers=float(job.teachers * state.parameters),
        weights=0.0,
        cache=0.0,
        offloaded=state.gradients + state.optimizer if job.rollout.offload else 0.0,
        other=_FIXED if job.on_gpu else 0.0,
    )
    return _with_rollouts(job, trains) if job.rollout.sequences else trains


def _with_rollouts(job: Job, rank: Memory) -> Memory:
    """The memory of a rank with what generation allocates: a copy of the weights in a layout of its
    own, or of those with adapters, and caches and work space."""
    own = job.rollout.parallel.layout(job.parallel)
    stage = rank.place.pp
    if own == replace(job.parallel, cp=1):
        width = 2 if job.engine.precision == "bf16" else 4
        copied = adapted_bytes(job.model, job.parallel, job.moe, job.lora, stage, width)
        return _with_caches(job, own, stage, replace(rank, weights=float(copied)))
    there = replace(job, parallel=own, lora=LoraConfig())
    found = (
        _with_caches(
            job,
            own,
            stage,
            replace(rank, weights=float(there.state(RankCoordinates(stage, 0, 0)).parameters)),
        )
        for stage in range(own.pp)
    )
    return max(found, key=lambda memory: urgency(job, memory))


def _with_caches(job: Job, parallel: ParallelConfig, stage: int, rank: Memory) -> Memory:
    """The memory of a rank with the caches that an engine allocates for a pipeline stage of a
    generation layout, and with its largest prefill and its logits."""
    load, m, tp = job.rollout, job.model, parallel.tp
    sequences = -(-load.sequences // max(1, parallel.data_parallel(job.world_size)))
    slots = load.slots or sequences
    width = 2 if job.engine.precision == "bf16" else 4
    rows = min(load.chunk or load.length, load.length)
    widest = max(m.mamba_in_proj, (m.num_heads + 2 * m.num_kv_heads) * m.head_dim) / tp
    # A layer's input, its projection and the output of it, in prefill; float32 logits twice.
    work = rows * (2 * m.hidden_size + 2 * widest) * width + 2 * 4 * slots * m.vocab_size / tp
    # The margin is not free: communication buffers have it.
    free = available(job) - (rank.standing - rank.offloaded + rank.weights)
    own = free * load.kv_memory_fraction if job.on_gpu else CPU_GIB * GIB
    memory = CacheMemory(
        budget=max(0, int(load.kv_gib * GIB or own)),
        each=state_bytes(m, "".join(stage_chunks(m, parallel, stage)), tp, width),
        size=block_size("cuda" if job.on_gpu else "cpu"),
    )
    most = Load(max(1, load.length), load.prompt, sequences)
    needed, pool = memory.needed(most), max(0, memory.blocks(most, slots))
    # A block is half full on average at the end of a sequence; one more prompt is stored.
    each = (load.live or load.length) / memory.size + 0.5
    live = sequences * each + load.prompt / memory.size
    return replace(
        rank,
        cache=memory.states(slots) + max(needed, pool) * memory.block + work,
        blocks=Blocks(memory.size, pool, needed, live, memory.slots(most)),
    )


def state_bytes_on_host(job: Job) -> float:
    """Host memory of a last stage's rank for the teachers' hidden states of a step, on average; 0
    without an exact divergence."""
    if job.work is None or not job.exact_teachers:
        return 0.0
    rows = job.work.generated_tokens / max(1, job.parallel.data_parallel(job.world_size))
    width = 2 if job.engine.precision == "bf16" else 4
    return rows * job.model.hidden_size * width


def worst_rank(job: Job) -> Memory:
    """Memory of the rank that needs most. Ranks of a stage differ only in their optimizer shard."""
    # The first rank of a stage owns most: padding is at the ends of the buffers.
    firsts = (RankCoordinates(stage, 0, 0) for stage in range(job.parallel.pp))
    return max((stage_memory(job, place) for place in firsts), key=lambda m: urgency(job, m))


def every_rank(job: Job) -> list[Memory]:
    """Memory of each rank, in rank order."""
    places = [place_of(rank, job.parallel, job.world_size) for rank in range(job.world_size)]
    made = {place: stage_memory(job, place) for place in set(places)}
    return [made[place] for place in places]


def with_slots(job: Job) -> Job:
    """The job with as many slots as an engine chooses, if its recipe leaves them to the memory."""
    if not job.rollout.is_open:
        return job
    slots = min(job.rollout.slots, *(b.slots for b in _blocks(job)))
    sequences = min(job.rollout.sequences, slots * _replicas(job))
    return replace(job, rollout=replace(job.rollout, slots=slots, sequences=sequences))


def _blocks(job: Job) -> list[Blocks]:
    """Blocks of the KV cache of each stage's ranks."""
    places = (RankCoordinates(stage, 0, 0) for stage in range(job.parallel.pp))
    return [m.blocks for m in (stage_memory(job, p) for p in places) if m.blocks is not None]


def _replicas(job: Job) -> int:
    own = job.rollout.parallel.layout(job.parallel)
    return max(1, own.data_parallel(job.world_size))


def resident_slots(job: Job) -> int:
    """Slots of a replica whose tokens its KV cache holds on average. Preemption moves the other
    sequences to host memory, so no more decode at a time."""
    share = min([1.0, *(b.pool / max(b.live, 1e-9) for b in _blocks(job))])
    if share == 1.0:
        return job.rollout.slots
    return max(1, int(share * -(-job.rollout.sequences // _replicas(job))))


def urgency(job: Job, memory: Memory) -> tuple[bool, float]:
    """Order of ranks by their need of memory: those that are short of it come last."""
    return bool(shortage(job, memory)), memory.total


def fits(job: Job, memory: Memory) -> bool:
    """True if a rank has the memory, and its KV cache holds the longest sequence."""
    return not shortage(job, memory)


def shortage(job: Job, memory: Memory) -> str:
    """The memory that a rank is short of, with its remedy; empty if it fits."""
    have, blocks = available(job), memory.blocks
    if memory.total > have:
        return (
            f"needs {memory.total / GIB:.1f} GiB, a {job.gpu.name} gives {have / GIB:.1f} GiB of "
            f"{job.gpu.memory_gib:.0f} with a margin of {job.margin:.0%}"
        )
    if blocks is not None and blocks.pool < blocks.needed:
        return (
            f"has a KV cache of {blocks.pool} blocks of {blocks.size} tokens, and the longest "
            f"sequence with a stored prompt needs {blocks.needed}: set --rollout.kv-gib or "
            "--rollout.kv-memory-fraction higher, or --rollout.slots lower"
        )
    return ""


def available(job: Job) -> float:
    """Bytes that a rank may use."""
    return job.gpu.memory_gib * GIB * (1.0 - job.margin)
