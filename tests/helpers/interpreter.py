"""Triton's interpreter without work that it repeats for each value, with the same bits.

Triton's own searches `triton.language` for builtins at each launch and each call of a function,
computes for each sum of integers a check that it then discards, copies all arguments, and makes the
type and the shape of each value anew. It converts floats bit by bit.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

#: The version whose internals are replaced; tests with another are only slower.
TRITON = "3.7."

#: Owner, name, value while interpreting, value otherwise.
_Change = tuple[Any, str, Any, Any]


def accelerate(*, load: bool = False) -> bool:
    """Replace parts of the interpreter if it has been imported; True if they are replaced.

    load: import it first. Where kernels are compiled, nothing is replaced.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    if load:
        importlib.import_module("triton.runtime.interpreter")
    interpreter: Any = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None or not interpreter.triton.__version__.startswith(TRITON):
        return False
    if not isinstance(interpreter._patch_lang, _Language):
        _keep_types(interpreter)
        interpreter._convert_float = _conversion(interpreter._convert_float)
        # Without `debug`, nothing looks at the check of an integer's overflow.
        builder = interpreter.interpreter_builder
        assert not builder.options.debug
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
        if not torch.cuda.is_available():
            executor = interpreter.GridExecutor
            executor._init_args_hst = lambda _, args, kwargs: (args, kwargs)
            executor._restore_args_dev = lambda *_: None
        interpreter._patch_lang = _Language(_language_changes(interpreter))
    return True


class _Language:
    """Replaces `_patch_lang`: one set of changes for a launch and all functions it calls."""

    def __init__(self, changes: list[_Change]) -> None:
        self.changes = changes
        self.active = False

    def __call__(self, _: Any) -> _Language:
        if not self.active:
            for owner, name, value, _ in self.changes:
                setattr(owner, name, value)
        self.active = True
        return self

    def restore(self) -> None:
        self.active = False
        for owner, name, _, original in self.changes:
            setattr(owner, name, original)


def _language_changes(interpreter: Any) -> list[_Change]:
    """The changes of Triton's own `_patch_lang`."""
    tl, semantic = interpreter.tl, interpreter.interpreter_semantic

    def patch_attr(owner: Any, name: str, member: Any, _: Any, scope: Any) -> None:
        # A builtin's wrapper only checks that `_semantic` is given.
        function = getattr(member, "__wrapped__", member)

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs["_semantic"] = semantic
            return function(*args, **kwargs)

        scope.set_attr(owner, name, call)

    interpreter._patch_attr = patch_attr
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    first: dict[tuple[int, str], Any] = {}
    for owner, name, original in scope._changes:
        first.setdefault((id(owner), name), (owner, original))
    changes = [
        (owner, name, getattr(owner, name), original)
        for (_, name), (owner, original) in first.items()
    ]
    scope.restore()
    return changes


def _conversion(convert: Any) -> Any:
    """`_convert_float`, of at most 16 bits by a table, and of float32 to bfloat16 by a shift."""
    tables: dict[Any, Any] = {}

    def converted(values: Any, source: Any, target: Any, rounding: Any) -> Any:
        bits = source.primitive_bitwidth
        if bits <= 16:
            key = source.name, target.name, str(rounding)
            if key not in tables:
                every = np.arange(2**bits, dtype=f"uint{bits}")
                tables[key] = convert(every, source, target, rounding)
            return tables[key][values.view(f"uint{bits}")]
        if source.is_fp32() and target.is_bf16() and rounding is None:
            raw = values.view(np.uint32)
            # The interpreter's own rounding of subnormal numbers is not a shift.
            if not (((raw & 0x7F800000) == 0) & ((raw & 0x7FFFFF) != 0)).any():
                return (raw >> 16).astype(np.uint16)
        return convert(values, source, target, rounding)

    return converted


def _keep_types(interpreter: Any) -> None:
    """Make each type's numpy type, name and shape once.

    A tensor's type must be made after that: none is made before a kernel runs.
    """
    core, semantic = interpreter.tl.core, interpreter.TritonSemantic
    numpy_type_of, broadcast = interpreter._get_np_dtype, semantic.broadcast_impl_value
    new_type = core.block_type.__init__
    numpy_types: dict[str, Any] = {}
    names: dict[tuple[str, int], str] = {}
    #: By sizes: the shape of a type; that of a tensor, and its number of elements.
    shapes: dict[tuple[int, ...], tuple[Any, Any, Any]] = {}
    #: By the identity of a type's shape in `shapes`, which keeps it.
    sizes_of: dict[int, tuple[int, ...]] = {}

    def get_np_dtype(dtype: Any) -> Any:
        found = numpy_types.get(dtype.name)
        if found is None:
            found = numpy_types[dtype.name] = numpy_type_of(dtype)
        return found

    def init_type(self: Any, element_ty: Any, shape: Any) -> None:
        sizes = sizes_of.get(id(shape))
        if sizes is None:
            sizes = (*(size.value if isinstance(size, core.constexpr) else size for size in shape),)
            if sizes not in shapes:
                new_type(self, element_ty, shape)
                wrapped = core.tuple([core.constexpr(size) for size in sizes])
                shapes[sizes] = self.shape, wrapped, core.constexpr(self.numel)
                sizes_of[id(self.shape)] = sizes
        self.element_ty = element_ty
        self.shape, _, numel = shapes[sizes]
        self.numel = numel.value
        key = element_ty.name, id(self.shape)
        if key not in names:
            names[key] = f"<{self.shape}, {element_ty}>"
        self.name = names[key]

    def init_tensor(self: Any, handle: Any, dtype: Any) -> None:
        self.handle, self.type, self.dtype = handle, dtype, dtype.scalar
        sizes = sizes_of[id(dtype.shape)] if dtype.is_block() else ()
        _, self.shape, self.numel = shapes[sizes]

    def broadcast_value(self: Any, lhs: Any, rhs: Any) -> Any:
        a, b = lhs.type, rhs.type
        if not (a.is_block() and b.is_block()):
            return broadcast(self, lhs, rhs)
        if a.shape is b.shape:
            return lhs, rhs
        left, right = sizes_of[id(a.shape)], sizes_of[id(b.shape)]
        pairs = [*zip(left, right, strict=False)]
        if len(left) != len(right) or any(m != n and 1 not in (m, n) for m, n in pairs):
            return broadcast(self, lhs, rhs)
        sizes = [max(pair) for pair in pairs]
        return widened(self, lhs, sizes), widened(self, rhs, sizes)

    def widened(self: Any, value: Any, sizes: list[int]) -> Any:
        dtype = core.block_type(value.dtype, sizes)
        if dtype.shape is value.type.shape:
            return value
        return self.tensor(self.builder.create_broadcast(value.handle, sizes), dtype)

    shapes[()] = (), core.tuple([]), core.constexpr(1)
    interpreter._get_np_dtype = get_np_dtype
    core.block_type.__init__ = init_type
    core.tensor.__init__ = init_tensor
    semantic.broadcast_impl_value = broadcast_value
