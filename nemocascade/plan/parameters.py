"""Bytes of parameters, gradients and optimizer state of each rank, without building the model.

The parameters of a rank are listed in the order of Megatron's DDP buffers. Padding and the
distributed optimizer's shards are computed as in Megatron, so the result is exact.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from nemocascade.recipe import (
    LoraConfig,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
)

# Megatron's DDP: parameters start at multiples of 64 elements, buckets end at multiples of 128.
_START, _END = 64, 128
_SMALLEST_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000
_MAIN_BYTES, _GRADIENT_BYTES = 4, 4
MOMENT_BYTES = {"fp32": 8, "bf16": 4}
"""Bytes of AdamW's two moments of a parameter, by `OptimizerConfig.moments`."""


@dataclass(frozen=True)
class Parameter:
    """A parameter on one rank. numel: its elements there. float32: stored in float32 at any model
    precision. expert: routed, so replicated over the expert data-parallel ranks. shared: used by
    two stages, in a bucket of its own. adapted: a weight with low-rank factors.
    """

    name: str
    numel: int
    float32: bool = False
    expert: bool = False
    shared: bool = False
    trained: bool = True
    adapted: bool = False


@dataclass(frozen=True)
class StateBytes:
    """Persistent bytes of a rank. buffers: router buffers, in checkpoints or not."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class RankCoordinates:
    """Coordinates of a rank. The order is tp (or etp, ep) fastest, then the replicas, then pp.

    dp: among the ranks that share the optimizer state of dense parameters, which are dp x cp.
    """

    pp: int
    dp: int
    expert_dp: int


def place_of(rank: int, parallel: ParallelConfig, world_size: int) -> RankCoordinates:
    """The coordinates of `rank` that its memory depends on."""
    stage = world_size // parallel.pp
    inner = rank % stage
    return RankCoordinates(
        pp=rank // stage,
        dp=inner // parallel.tp,
        expert_dp=inner // (parallel.etp * parallel.ep),
    )


def stage_chunks(model: ModelConfig, parallel: ParallelConfig, pp_rank: int) -> list[str]:
    """Layers of a pipeline rank, as a pattern for each of its vpp chunks."""
    chunks = parallel.layout(model.pattern).split("|")
    return chunks[pp_rank :: parallel.pp]


@functools.lru_cache(maxsize=1 << 12)
def stage_kinds(layout: str, pp: int) -> list[tuple[int, list[tuple[str, int]]]]:
    """A pipeline rank of each kind, with its number of layers of each symbol: most ranks have the
    same layers. The last rank, which has the LM head, comes last. layout: with `|` between chunks.
    """
    chunks = layout.split("|")
    ranks: dict[str, int] = {}
    for rank in range(pp - 1):
        ranks.setdefault("".join(chunks[rank::pp]), rank)
    found = [(rank, layers) for layers, rank in ranks.items()]
    found.append((pp - 1, "".join(chunks[pp - 1 :: pp])))
    return [(rank, [(s, layers.count(s)) for s in sorted(set(layers))]) for rank, layers in found]


def stage_parameters(
    model: ModelConfig,
    parallel: ParallelConfig,
    moe: MoeTrainingConfig,
    pp_rank: int,
    lora: LoraConfig | None = None,
) -> list[list[Parameter]]:
    """Parameters of a pipeline rank, as a list for each of its vpp chunks. lora: its factors; with
    a rank, nothing else is trained."""
    last = pp_rank == parallel.pp - 1
    # Layouts that differ in other axes have the same parameters.
    axes = ParallelConfig(tp=parallel.tp, pp=min(parallel.pp, 2), ep=parallel.ep, etp=parallel.etp)
    return [
        list(
            chunk_parameters(
                model,
                axes,
                moe,
                pattern,
                first=pp_rank == chunk == 0,
                last=last and chunk == parallel.vpp - 1,
                lora=lora,
            )
        )
        for chunk, pattern in enumerate(stage_chunks(model, parallel, pp_rank))
    ]


@functools.lru_cache(maxsize=1 << 12)
def chunk_parameters(
    model: ModelConfig,
    parallel: ParallelConfig,
    moe: MoeTrainingConfig,
    pattern: str,
    *,
    first: bool,
    last: bool,
    lora: LoraConfig | None = None,
) -> tuple[Parameter, ...]:
    """Parameters of one chunk on each of its ranks, in the order of the module tree."""
    table = model.vocab_size // parallel.tp * model.hidden_size
    shared = model.tie_embeddings and parallel.pp > 1
    found: list[Parameter] = []
    if first:
        found.append(Parameter("embedding.word_embeddings.weight", table, shared=shared))
    for index, symbol in enumerate(pattern):
        layer = _layer(model, parallel, moe, symbol, f"decoder.layers.{index}")
        found += _with_factors(layer, model, parallel, lora) if lora and lora.rank else layer
    if last:
        found.append(Parameter("decoder.final_norm.weight", model.hidden_size))
        if shared or not model.tie_embeddings:
            found.append(Parameter("output_layer.weight", table, shared=shared))
    if lora is None or not lora.rank:
        return tuple(found)
    return tuple(p if "lora_" in p.name else replace(p, trained=False) for p in found)


def _with_factors(
    layer: Sequence[Parameter], model: ModelConfig, parallel: ParallelConfig, lora: LoraConfig
) -> list[Parameter]:
    """The layer's parameters with the factors of its adapted weights: those of a linear follow its
    weight, those of experts come after both of their weights."""
    found: list[Parameter] = []
    later: list[Parameter] = []
    for p in layer:
        if later and not p.expert:
            found, later = [*found, *later], []
        if not lora.adapts(p.name):
            found.append(p)
            continue
        found.append(replace(p, adapted=True))
        names = [f"{p.name}_lora_a", f"{p.name}_lora_b"]
        if not p.expert:
            names = [f"{p.name.removesuffix('.weight')}.lora_{letter}" for letter in "ab"]
        sizes = _factor_sizes(p, model, parallel, lora.rank)
        factors = [replace(p, name=n, numel=s) for n, s in zip(names, sizes, strict=True)]
        if p.expert:
            later += factors
        else:
            found += factors
    return found + later


def _factor_sizes(
    weight: Parameter, model: ModelConfig, parallel: ParallelConfig, rank: int
) -> tuple[int, int]:
    """Elements of A [r, I] and B [O, r] of a weight on a rank, over all of its experts."""
    is_row = weight.name.removesuffix(".weight").endswith(("_proj", "fc2"))
    is_row = is_row and not weight.name.endswith("in_proj.weight")
    experts = model.num_experts // parallel.ep if weight.expert else 1
    # One side of a weight is the hidden size, whole on every rank.
    other = weight.numel // model.hidden_size // experts
    inputs, outputs = (other, model.hidden_size) if is_row else (model.hidden_size, other)
    return experts * rank * inputs, experts * rank * outputs


def adapted_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    moe: MoeTrainingConfig,
    lora: LoraConfig,
    pp_rank: int,
    width: int,
) -> int:
    """Bytes of the weights of a pipeline rank that have factors."""
    if not lora.rank:
        return 0
    chunks = stage_parameters(model, parallel, moe, pp_rank, lora)
    return width * sum(p.numel for chunk in chunks for p in chunk if p.adapted)


def _layer(
    model: ModelConfig, parallel: ParallelConfig, moe: MoeTrainingConfig, symbol: str, name: str
) -> list[Parameter]:
    hidden, tp = model.hidden_size, parallel.tp
    gates = 2 if model.activation == "swiglu" else 1
    found = [Parameter(f"{name}.norm.weight", hidden)]

    def add(part: str, numel: int, **options: bool) -> None:
        found.append(Parameter(f"{name}.mixer.{part}", numel, **options))

    def mlp(prefix: str, width: int) -> None:
        add(f"{prefix}linear_fc1.weight", gates * width // tp * hidden)
        add(f"{prefix}linear_fc2.weight", width // tp * hidden)

    if symbol == "M":
        channels = model.mamba_channels
        for part in ("A_log", "dt_bias", "D"):
            add(part, model.mamba_heads // tp, float32=True)
        add("in_proj.weight", model.mamba_in_proj // tp * hidden)
        add("conv1d.weight", channels // tp * model.mamba_conv)
        add("conv1d.bias", channels // tp)
        add("norm.weight", model.mamba_inner // tp)
        add("out_proj.weight", model.mamba_inner // tp * hidden)
    elif symbol == "*":
        heads = model.num_heads + 2 * model.num_kv_heads
        add("linear_qkv.weight", heads * model.head_dim // tp * hidden)
        add("linear_proj.weight", model.num_heads * model.head_dim // tp * hidden)
        if model.qk_norm:
            add("q_layernorm.weight", model.head_dim)
            add("k_layernorm.weight", model.head_dim)
    elif symbol == "E":
        local = model.num_experts // parallel.ep
        width = model.expert_width // parallel.etp
        add("router.weight", model.num_experts * hidden, trained=not moe.freeze_router)
        add("experts.linear_fc1", local * gates * width * hidden, expert=True)
        add("experts.linear_fc2", local * hidden * width, expert=True)
        if model.shared_expert_width:
            mlp("shared_experts.", model.shared_expert_width)
    else:
        mlp("", model.mlp_width)
    return found


@functools.lru_cache(maxsize=1 << 14)
def state_bytes(
    model: ModelConfig,
    parallel: ParallelConfig,
    world_size: int,
    place: RankCoordinates,
    *,
    precision: str,
    moe: MoeTrainingConfig,
    optimizer: OptimizerConfig,
    on_gpu: bool,
    gradients_in: str = "fp32",
    lora: LoraConfig | None = None,
) -> StateBytes:
    """Persistent bytes of the rank at `place`, from the first step to the last.

    on_gpu: gradients are reduced during backward, which splits the buffers of the first stage into
    buckets, each with its own padding. gradients_in: `EngineConfig.gradients`. lora: see
    `stage_parameters`.
    """
    dp = world_size // (parallel.tp * parallel.pp)
    expert_dp = world_size // (parallel.etp * parallel.ep * parallel.pp)
    size = 2 if precision == "bf16" else 4
    weights = gradients = states = 0
    routers = "".join(stage_chunks(model, parallel, place.pp)).count("E")
    for chunk, parameters in enumerate(stage_parameters(model, parallel, moe, place.pp, lora)):
        weights += sum(p.numel * _width(p, size) for p in parameters if not p.trained)
        bucketed = on_gpu and place.pp == 0 and chunk == 0
        bucket = max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * dp) if bucketed else None
        for buffer in _buffers(parameters, size):
            width, expert = _width(buffer[0], size), buffer[0].expert
            ranks, rank = (expert_dp, place.expert_dp) if expert else (dp, place.dp)
            if optimizer.distributed:
                buckets = _buckets(buffer, bucket, ranks)
                padded = sum(end - start for start, end, _ in buckets)
                owned = sum(_owned(b, rank, ranks) for b in buckets)
            else:
                padded = owned = sum(p.numel for p in buffer)
            main = _MAIN_BYTES if width < _MAIN_BYTES else 0
            weights += padded * width
            gradients += padded * (width if gradients_in == "bf16" else _GRADIENT_BYTES)
            states += owned * (main + MOMENT_BYTES[optimizer.moments])
    # Selection bias and load of each router, float32.
    buffers = routers * 2 * 4 * model.num_experts
    return StateBytes(weights, gradients, states, buffers)


def _width(parameter: Parameter, size: int) -> int:
    return 4 if parameter.float32 else size


def _buffers(parameters: Iterable[Parameter], size: int) -> list[list[Parameter]]:
    """Trained parameters, grouped by dtype and by the ranks that replicate them."""
    groups: dict[tuple[int, bool], list[Parameter]] = {}
    for p in parameters:
        if p.trained:
            groups.setdefault((_width(p, size), p.expert), []).append(p)
    return list(groups.values())


_Bucket = tuple[int, int, list[tuple[int, int]]]


def _buckets(parameters: Sequence[Parameter], size: int | None, ranks: int) -> list[_Bucket]:
    """(start, padded end, spans of the parameters) of each bucket, last parameter first."""
    found: list[_Bucket] = []
    multiple = math.lcm(ranks, _END)
    spans: list[tuple[int, int]] = []
    begin = position = 0

    def close(end: int) -> int:
        padded = -(-end // multiple) * multiple
        found.append((begin, padded, list(spans)))
        spans.clear()
        return padded

    for parameter in reversed(parameters):
        position = -(-position // _START) * _START
        if parameter.shared and spans:
            begin = position = close(position)
        end = position + parameter.numel
        spans.append((position, end))
        if parameter.shared or (size is not None and end - begin >= size):
            begin = position = close(end)
        else:
            position = end
    if spans:
        close(position)
    return found


def _owned(bucket: _Bucket, rank: int, ranks: int) -> int:
    """Parameter elements in a rank's shard of a bucket."""
    start, end, spans = bucket
    share = (end - start) // ranks
    low, high = start + rank * share, start + (rank + 1) * share
    return sum(max(0, min(b, high) - max(a, low)) for a, b in spans)
