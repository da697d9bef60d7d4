"""Values of registers as linear forms: a number for each thread, plus multiples of unknowns.

The index of a thread is known, so whatever is computed from it alone is exact. Parameters, counters
of loops and values read from memory are unknowns. A sum of unknowns is taken not to overflow.
Predicates are 0 or 1, and the product of two is their conjunction.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]
#: One number for all threads, or one for each.
Coefficient = int | Numbers


@dataclass(frozen=True)
class Unknown:
    """A value that is not known.

    key: what it is computed from; equal keys are equal values.
    uniform: all threads of a block have the same value.
    loops: headers of the loops in which iterations may have different values.
    """

    key: tuple[object, ...]
    uniform: bool = True
    loops: frozenset[str] = frozenset()

    @property
    def counts_iterations(self) -> bool:
        return self.key[0] == "count"


#: Product of unknowns, sorted; the empty product is 1.
Product = tuple[Unknown, ...]


@dataclass(frozen=True, eq=False)
class Value:
    """Sum over `terms` of coefficient times product."""

    terms: Mapping[Product, Coefficient]

    @cached_property
    def key(self) -> frozenset[tuple[object, ...]]:
        """Equal for equal values."""
        return frozenset(
            (
                tuple(hash(factor.key) for factor in product),
                value if isinstance(value, int) else value.tobytes(),
            )
            for product, value in self.terms.items()
        )

    @property
    def known(self) -> Coefficient | None:
        """The number itself if there are no unknowns."""
        return None if self.unknowns else self.terms.get((), 0)

    @cached_property
    def unknowns(self) -> frozenset[Unknown]:
        return frozenset(factor for product in self.terms for factor in product)

    @cached_property
    def uniform(self) -> bool:
        """True if all threads have the same value."""
        return all(isinstance(value, int) for value in self.terms.values()) and all(
            factor.uniform for factor in self.unknowns
        )

    @cached_property
    def loops(self) -> frozenset[str]:
        return frozenset(loop for factor in self.unknowns for loop in factor.loops)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Value) and self.key == other.key)

    def __hash__(self) -> int:
        return hash(self.key)


def number(value: Coefficient) -> Value:
    return _value({(): value})


def unknown(*key: object, uniform: bool = True, loops: frozenset[str] = frozenset()) -> Value:
    return Value({(Unknown(key, uniform, loops),): 1})


def function_of(name: object, inputs: Sequence[Value]) -> Value:
    """An unknown that depends on nothing but `inputs`."""
    return unknown(
        name,
        *(value.key for value in inputs),
        uniform=all(value.uniform for value in inputs),
        loops=frozenset(loop for value in inputs for loop in value.loops),
    )


def _value(terms: Mapping[Product, Coefficient]) -> Value:
    """Drop zeros, and store a number that is equal in all threads as one."""
    kept: dict[Product, Coefficient] = {}
    for product, coefficient in terms.items():
        if not isinstance(coefficient, int) and (coefficient == coefficient[0]).all():
            coefficient = int(coefficient[0])
        if not isinstance(coefficient, int) or coefficient:
            kept[product] = coefficient
    return Value(kept)


def add(a: Value, b: Value, scale: int = 1) -> Value:
    """Compute a + scale * b."""
    terms = dict(a.terms)
    for product, coefficient in b.terms.items():
        terms[product] = terms.get(product, 0) + scale * coefficient
    return _value(terms)


def multiply(a: Value, b: Value) -> Value:
    terms: dict[Product, Coefficient] = {}
    for left, x in a.terms.items():
        for right, y in b.terms.items():
            product = tuple(sorted(left + right, key=lambda factor: hash(factor.key)))
            terms[product] = terms.get(product, 0) + x * y
    return _value(terms)


def result_of(name: tuple[str, ...], inputs: Sequence[Value]) -> Value:
    """Result of an instruction that is a function of its inputs.

    name: opcode with its modifiers; the last part is the type, such as ("add", "s32").
    """
    found = None
    if name[-1] == "pred":
        found = _predicate(name[0], inputs)
    elif not any(part.startswith(_NO_INTEGERS) or part.endswith("x2") for part in name):
        found = _exact(name, inputs)
        if found is None and (found := _linear(name, inputs)) is not None:
            kind = {"cvt": name[1], "mul": "s64", "mad": "s64"}.get(name[0], name[-1])
            kind = name[-1] if "lo" in name else kind
            found = _value({p: _as_type(c, f"s{kind[1:]}") for p, c in found.terms.items()})
    return function_of(name, inputs) if found is None else found


def _predicate(operation: str, inputs: Sequence[Value]) -> Value | None:
    if operation == "and":
        return multiply(inputs[0], inputs[1])
    if operation == "or":
        return add(add(inputs[0], inputs[1]), multiply(inputs[0], inputs[1]), -1)
    if operation == "not":
        return add(number(1), inputs[0], -1)
    return number(1 if inputs[0].known else 0) if operation == "mov" else None


#: Types of floating point. Those of two packed numbers end in x2.
_NO_INTEGERS = ("f16", "f32", "f64", "bf16", "tf32")
_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
_ONE_INPUT = ("neg", "mov", "cvt", "not")
_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "neg": operator.neg, "mov": operator.pos,
    "cvt": operator.pos, "and": operator.and_, "or": operator.or_, "xor": operator.xor,
    "not": operator.invert, "shr": operator.rshift, "shl": operator.lshift, "min": np.minimum,
    "max": np.maximum, "selp": lambda a, b, p: np.where(p, a, b),
    "bfe": lambda a, start, size: (a >> start) & ((1 << size) - 1),
}  # fmt: skip


def _exact(name: tuple[str, ...], inputs: Sequence[Value]) -> Value | None:
    """Result of an integer instruction on known numbers."""
    operation, kind = name[0], name[-1]
    numbers = [_as_type(value.known, kind) for value in inputs if value.known is not None]
    if len(numbers) < len(inputs):
        return None
    if operation == "setp" and len(inputs) == 2 and name[1] in _COMPARISONS:
        found, kind = _COMPARISONS[name[1]](*numbers), "s64"
    elif operation in ("mul", "mad") and name[1] in ("lo", "wide"):
        found = numbers[0] * numbers[1] + (numbers[2] if operation == "mad" else 0)
        kind = "s64" if name[1] == "wide" else kind
    elif operation in _ONE_INPUT and len(numbers) != 1:  # it packs several numbers
        return None
    elif operation in _OPERATIONS and kind != "pred" and len(name) <= 3:
        if operation == "bfe" and kind[0] == "s":
            return None
        found, kind = _OPERATIONS[operation](*numbers), name[1] if operation == "cvt" else kind
    else:
        return None
    if isinstance(found, int):  # a register has 64 bits
        found = (found + 2**63) % 2**64 - 2**63
    tidy = np.asarray(found, dtype=np.int64)
    # Registers hold signed numbers; instructions on unsigned ones convert them.
    return number(_as_type(tidy if tidy.ndim else int(tidy), "s" + kind[1:]))


def _as_type(value: Any, kind: str) -> Any:
    """The number that a register of type `kind` ("s32", "u64", "b16") holds."""
    bits = int(kind[1:])
    if bits >= 64:
        return value
    low = value & ((1 << bits) - 1)
    return low if kind[0] == "u" else low - ((low >> (bits - 1)) << bits)


def _linear(name: tuple[str, ...], inputs: Sequence[Value]) -> Value | None:
    """Result of an integer instruction if it is a linear form."""
    operation = name[0]
    if operation in ("mov", "cvt") and len(inputs) == 1:
        return inputs[0]
    if operation in ("add", "sub"):
        return add(inputs[0], inputs[1], 1 if operation == "add" else -1)
    if operation == "neg":
        return add(number(0), inputs[0], -1)
    if operation in ("mul", "mad") and name[1] in ("lo", "wide"):
        product = multiply(inputs[0], inputs[1])
        return product if operation == "mul" else add(product, inputs[2])
    if operation == "shl" and isinstance(inputs[1].known, int):
        return multiply(inputs[0], number(1 << inputs[1].known))
    if operation in ("or", "xor"):
        return _disjoint_or(inputs[0], inputs[1])
    if operation == "and" and isinstance(inputs[1].known, int):
        unit = -inputs[1].known
        if unit > 0 and unit & (unit - 1) == 0:  # without its low bits, a multiple of `unit`
            return multiply(function_of(("high", unit), [inputs[0]]), number(unit))
    return None


def _disjoint_or(a: Value, b: Value) -> Value | None:
    """The sum of two values without a bit in common; None if that is not certain.

    One must be known and lie below a power of two that divides every coefficient of the other's
    unknowns: it can meet only the low bits of the other's known part.
    """
    form, known = (a, b.known) if b.known is not None else (b, a.known)
    coefficients = [c for product, c in form.terms.items() if product]
    unit = math.gcd(*(int(each) for c in coefficients for each in np.atleast_1d(c)))
    unit &= -unit
    if known is None or np.min(known) < 0 or np.max(known) >= unit:
        return None
    low = form.terms.get((), 0) & (unit - 1)
    return None if np.any(low & known) else add(a, b)
