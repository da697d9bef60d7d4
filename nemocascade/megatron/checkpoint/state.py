"""The boxes of global tensors that a rank's model and optimizer hold.

The boxes come from Megatron's sharded state dicts (ShardedTensor: global shape, offset, replica).
A module may store a parameter as several tensors, for example the parts of Mamba's fused input
projection; each must be a rectangular view of the parameter. The optimizer's tensors follow the
parameter they belong to, element by element, so the same views split them. The distributed
optimizer's flat shards become a few boxes each, without gathering or padding. Their keys name only
the parameter, neither the optimizer that steps it nor how its state is sharded:

    model/<key>                    weights, and buffers that persist
    optimizer/main/<key>           fp32 copy that is trained, where the weight itself is not fp32
    optimizer/exp_avg/<key>        AdamW's moments
    optimizer/exp_avg_sq/<key>
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import Tensor

from nemocascade.megatron.adam import MOMENTS, Bf16MomentsAdamW
from nemocascade.megatron.checkpoint.boxes import Box, boxes_of_range
from nemocascade.megatron.checkpoint.storage import ReplicaGroup, TensorShard
from nemocascade.megatron.optimizer import Optimizer
from nemocascade.runtime.world import World

MODEL = "model/"
OPTIMIZER = "optimizer/"


@dataclass(frozen=True, eq=False)
class ModelPart:
    """A box of a parameter or buffer, and its position in a global tensor.

    owner: the parameter. local: the box in the owner's index space. box: the same elements in the
    global tensor, which may have additional leading axes. replica: see TensorShard.
    """

    key: str
    global_shape: tuple[int, ...]
    box: Box
    owner: Tensor
    local: Box
    replica: tuple[int, ...]

    @property
    def leading(self) -> int:
        """Number of additional leading axes of the global tensor."""
        return len(self.box.offset) - len(self.local.offset)

    def view(self, box: Box) -> Tensor:
        """The elements of `box`, which is inside `self.box`, as a view where that is possible."""
        values = self.owner.detach()[self.local.slices()].reshape(self.box.size)
        return values[box.relative_to(self.box.offset).slices()]


def unwrap(chunk: Any) -> Any:
    """The CascadeModel in a DDP wrapper, or the chunk itself."""
    return getattr(chunk, "module", chunk)


def model_parts(chunks: Sequence[Any], world: World) -> list[ModelPart]:
    """Every box of every parameter and persistent buffer of this rank's chunks.

    Raises TypeError if a module's sharded state dict does not tile its tensors exactly by views.
    """
    parts = []
    for chunk in map(unwrap, chunks):
        owners = _Owners(chunk)
        metadata = {"dp_cp_group": world.groups.dp_cp}
        for leaf in _leaves(chunk.sharded_state_dict(metadata=metadata)):
            parts.append(owners.part(leaf))
        owners.check_tiling(parts)
    return parts


def model_shards(parts: Sequence[ModelPart]) -> list[TensorShard]:
    """The weights and buffers themselves."""
    return [
        TensorShard(
            MODEL + p.key,
            p.global_shape,
            p.box,
            p.view(p.box),
            p.replica,
            _replicas(p),
        )
        for p in parts
    ]


def _replicas(part: ModelPart) -> ReplicaGroup:
    """The ranks that hold the same part: Megatron-Core marks the parameters that expert parallelism
    shards."""
    return "dp" if getattr(part.owner, "allreduce", True) else "expert_dp"


def optimizer_shards(parts: Sequence[ModelPart], optimizer: Optimizer) -> list[TensorShard]:
    """Main parameters and moments that this rank's optimizers hold.

    State that does not exist before the first step is created as Adam creates it.
    Raises TypeError if a stepped parameter is not part of the model's sharded state dict.
    """
    by_owner: dict[int, list[ModelPart]] = {}
    for part in parts:
        by_owner.setdefault(id(part.owner), []).append(part)
    shards: list[TensorShard] = []
    for inner in _stepping(optimizer):
        for owner, main, start, sharded in _main_parameters(inner):
            if id(owner) not in by_owner:
                raise TypeError(
                    f"a parameter of shape {list(owner.shape)} is trained but is in no "
                    "sharded state dict"
                )
            state = _adam_state(inner.optimizer, main, optimizer.moments_dtype)
            tensors = {name: state[name].detach() for name in MOMENTS}
            if main.dtype != owner.dtype:
                tensors["main"] = main.detach()
            for name, tensor in tensors.items():
                for part in by_owner[id(owner)]:
                    shards += _state_shards(part, f"{OPTIMIZER}{name}/", tensor, start, sharded)
    return shards


def optimizer_steps(optimizer: Optimizer) -> set[int]:
    """The step counts in all parameters' states; a single value unless the state is broken."""
    counts = _step_counts(optimizer)
    return {int(count.get("step", 0)) for count in counts if count.get("params", True)}


def set_optimizer_steps(optimizer: Optimizer, steps: int) -> None:
    """Set the step count in every parameter's state to `steps`."""
    for count in _step_counts(optimizer):
        if "params" in count:
            count["step"] = steps
        else:
            count["step"].fill_(steps)


def _step_counts(optimizer: Optimizer) -> Iterator[dict[str, Any]]:
    """The parameter groups, or the states of parameters, whose "step" counts the steps."""
    for inner in _stepping(optimizer):
        if _counts_by_group(inner.optimizer):
            yield from inner.optimizer.param_groups
        else:
            for _, main, _, _ in _main_parameters(inner):
                yield _adam_state(inner.optimizer, main, optimizer.moments_dtype)


class _Owners:
    """Finds the parameter or buffer that a tensor is a view of."""

    def __init__(self, chunk: Any) -> None:
        state = chunk.state_dict(keep_vars=True)
        tensors = {
            value.data_ptr(): (name, value)
            for name, value in state.items()
            if isinstance(value, Tensor) and value.numel()
        }
        self._starts = sorted(tensors)
        self._tensors = [tensors[start] for start in self._starts]

    def part(self, leaf: ShardedTensor) -> ModelPart:
        """The position of `leaf` in its owner."""
        view: Any = leaf.data
        at = bisect.bisect_right(self._starts, view.data_ptr()) - 1
        name, owner = self._tensors[max(at, 0)]
        skipped = (view.data_ptr() - owner.data_ptr()) // owner.element_size()
        if at < 0 or skipped >= owner.numel():
            raise TypeError(f"{leaf.key}: its sharded tensor is a copy; it must be a view")
        strides = _strides(owner.shape)
        regular = view.ndim == owner.ndim and all(
            n == 1 or a == b for n, a, b in zip(view.shape, view.stride(), strides, strict=True)
        )
        if not owner.is_contiguous() or not regular:
            raise TypeError(f"{leaf.key}: its sharded tensor is not a rectangle of {name}")
        offset = []
        for stride in strides:
            offset.append(skipped // stride)
            skipped %= stride
        size = (1,) * leaf.prepend_axis_num + tuple(view.shape)
        replica = leaf.replica_id
        return ModelPart(
            key=leaf.key,
            global_shape=tuple(leaf.global_shape),
            box=Box(tuple(leaf.global_offset), size),
            owner=owner,
            local=Box(tuple(offset), tuple(view.shape)),
            replica=(replica,) if isinstance(replica, int) else tuple(replica),
        )

    def check_tiling(self, parts: Sequence[ModelPart]) -> None:
        """Raise TypeError unless the parts hold every element of every tensor."""
        owned: dict[int, int] = {}
        for part in parts:
            owned[id(part.owner)] = owned.get(id(part.owner), 0) + part.local.volume
        wrong = [
            f"{name} ({owned.get(id(owner), 0)} of {owner.numel()} elements)"
            for name, owner in self._tensors
            if owned.get(id(owner), 0) != owner.numel()
        ]
        if wrong:
            raise TypeError("sharded state dicts don't hold all of: " + ", ".join(wrong))


def _leaves(value: Any) -> Iterator[ShardedTensor]:
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, ShardedTensorFactory):
        yield from _leaves(value.build())
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, ShardedObject):
        data: Any = value.data
        empty = data is None or (isinstance(data, Tensor) and not data.numel())
        if not empty:
            raise TypeError(f"{value.key} is an object that only pickle could store")
    elif not isinstance(value, LocalNonpersistentObject):
        raise TypeError(f"a sharded state dict holds a {type(value).__name__}")


def _state_shards(
    part: ModelPart, prefix: str, tensor: Tensor, start: int, sharded: bool
) -> list[TensorShard]:
    """The part's elements in `tensor`, which holds the owner's flat elements from `start` on."""
    strides = _strides(part.owner.shape)
    replica = part.replica
    replicated_over: ReplicaGroup = _replicas(part)
    if sharded:
        # Data-parallel ranks, the last coordinate, hold different elements.
        replica, replicated_over = (*replica[:-1], 0), ""
    shards = []
    for run in boxes_of_range(part.owner.shape, start, start + tensor.numel()):
        common = run.intersect(part.local)
        if common is None:
            continue
        inner = common.relative_to(part.local.offset).offset
        lead = part.leading
        offset = part.box.offset[:lead] + tuple(
            a + b for a, b in zip(part.box.offset[lead:], inner, strict=True)
        )
        first = sum(i * s for i, s in zip(common.offset, strides, strict=True)) - start
        view = tensor.as_strided(common.size, strides, tensor.storage_offset() + first)
        size = (1,) * lead + common.size
        box = Box(offset, size)
        values = view.reshape(size)
        key, shape = prefix + part.key, part.global_shape
        shards.append(TensorShard(key, shape, box, values, replica, replicated_over))
    return shards


def _strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of `shape`."""
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def _stepping(optimizer: Optimizer) -> list[Any]:
    """Megatron's optimizers that have parameters on this rank."""
    return [p for p in optimizer.parts if not getattr(p, "is_stub_optimizer", False)]


def _main_parameters(inner: Any) -> Iterator[tuple[Tensor, Tensor, int, bool]]:
    """Yield (parameter, trained fp32 tensor, its first flat element in the parameter, is a shard).

    The lists of Megatron's optimizers are paired by construction; its index maps are not when a
    group mixes fp32 and 16-bit parameters.
    """
    if hasattr(inner, "shard_fp32_groups"):
        for owners, mains in (
            (inner.model_float16_groups, inner.shard_fp32_from_float16_groups),
            (inner.model_fp32_groups, inner.shard_fp32_groups),
        ):
            for owner, main in _pairs(owners, mains):
                yield owner, main, inner._get_model_param_range_map(owner)["param"].start, True
    elif hasattr(inner, "fp32_from_float16_groups"):
        for owners, mains in (
            (inner.float16_groups, inner.fp32_from_float16_groups),
            (inner.fp32_from_fp32_groups, inner.fp32_from_fp32_groups),
        ):
            for owner, main in _pairs(owners, mains):
                yield owner, main, 0, False
    else:
        for group in inner.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, 0, False


def _pairs(left: Sequence[Any], right: Sequence[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    for a, b in zip(left, right, strict=True):
        yield from zip(a, b, strict=True)


def _counts_by_group(adam: Any) -> bool:
    """Fused Adams of apex and Transformer Engine count steps by group, torch's by parameter."""
    by_torch = type(adam).__module__.startswith("torch.")
    return not by_torch and not isinstance(adam, Bf16MomentsAdamW)


def _adam_state(adam: Any, main: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """AdamW's state of a parameter, created as AdamW creates it if no step was made yet. dtype: of
    the moments."""
    state: dict[str, Any] = adam.state[main]
    for name in MOMENTS:
        if name not in state:
            state[name] = torch.zeros_like(main, dtype=dtype)
        if state[name].dtype != dtype:
            raise TypeError(f"optimizer state {name} has dtype {state[name].dtype}, not {dtype}")
    if "step" not in state and not _counts_by_group(adam):
        on_device = any(g.get("fused") or g.get("capturable") for g in adam.param_groups)
        device = main.device if on_device else "cpu"
        state["step"] = torch.zeros((), dtype=torch.float32, device=device)
    return state
