"""Tensors of one side, assembled box by box from the stored tensors of the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nemocascade.megatron.checkpoint.boxes import Box, whole
from nemocascade.megatron.checkpoint.index import DTYPES, Index
from nemocascade.megatron.checkpoint.storage import CHUNK_BYTES, Outgoing, Reader, TensorShard
from nemocascade.megatron.convert.names import NameMap, Shape


def outgoing(
    names: NameMap,
    reader: Reader,
    dtypes: Mapping[str, str],
    *,
    to_ours: bool,
    source_prefix: str = "",
) -> list[Outgoing]:
    """Every tensor of one side, to be written, read from `reader`, which holds the other side.

    dtypes: the safetensors dtype of each tensor; values are converted to it. source_prefix:
    starts the names in the reader's index. A tensor is read only while it is written, at most a
    chunk at a time.
    """
    shapes = names.ours if to_ours else names.theirs
    moves: dict[str, list[tuple[Box, str, Box]]] = {name: [] for name in shapes}
    for move in names.moves:
        if not to_ours:
            moves[move.theirs].append((move.their_box, move.ours, move.our_box))
        elif move.theirs not in names.copies:
            moves[move.ours].append((move.our_box, move.theirs, move.their_box))
    return [
        Outgoing(
            name, dtypes[name], shape, _reader(moves[name], reader, dtypes[name], source_prefix)
        )
        for name, shape in shapes.items()
    ]


def _reader(
    moves: list[tuple[Box, str, Box]], reader: Reader, dtype: str, prefix: str
) -> Callable[[Box], Tensor]:
    def read(box: Box) -> Tensor:
        # Boxes without a move belong to tensors that the other side does not have; they are zero.
        values = torch.zeros(box.size, dtype=DTYPES[dtype])
        for target, source, origin in moves:
            common = box.intersect(target)
            if common is not None:
                part = translate(common, target, origin)
                place = values[common.relative_to(box.offset).slices()].view(part.size)
                shape = reader.index[prefix + source].shape
                reader.read_into(TensorShard(prefix + source, shape, part, place))
        return values

    return read


def translate(part: Box, here: Box, there: Box) -> Box:
    """Map `part` of the box `here` to the other tensor, where `there` is the same elements."""
    axes = min(len(here.size), len(there.size))
    inner = part.relative_to(here.offset)
    lead = len(there.size) - axes
    skip = len(part.size) - axes
    offset = tuple(a + b for a, b in zip(there.offset[lead:], inner.offset[skip:], strict=True))
    return Box(there.offset[:lead] + offset, (1,) * lead + part.size[skip:])


def differences(index: Index, shapes: Mapping[str, Shape], prefix: str = "") -> list[str]:
    """Every tensor that is missing, unknown or of another shape in `index`."""
    stored = {name.removeprefix(prefix): entry for name, entry in index.items()}
    problems = [f"{name} is missing" for name in sorted(shapes.keys() - stored.keys())]
    problems += [
        f"{name} {list(stored[name].shape)} is unknown: it has no place in this model"
        for name in sorted(stored.keys() - shapes.keys())
    ]
    problems += [
        f"{name} has shape {list(stored[name].shape)}, the model needs {list(shape)}"
        for name, shape in sorted(shapes.items())
        if name in stored and stored[name].shape != shape
    ]
    return problems


def equal_tensors(reader: Reader, left: str, right: str) -> bool:
    """True if two stored tensors of one shape and dtype hold the same bits; read by chunks."""
    a, b = reader.index[left], reader.index[right]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    dtype = DTYPES[a.dtype]
    for box in whole(a.shape).split(CHUNK_BYTES // dtype.itemsize):
        pair = [torch.empty(box.size, dtype=dtype) for _ in range(2)]
        for name, values in zip((left, right), pair, strict=True):
            reader.read_into(TensorShard(name, a.shape, box, values))
        if not torch.equal(*(v.view(torch.uint8) for v in pair)):
            return False
    return True
