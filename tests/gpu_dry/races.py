"""Data races between the warps of a block, found in a compiled kernel's PTX.

If one warp reads an address of global memory and another warp writes it, the order is undefined
without a barrier of the block between. `unordered` finds such pairs: a read before a write (every
warp reads one element of a row, and the row is then overwritten in place), a write before a read,
and both from one iteration of a loop to the next.

**PTX, not SASS.** PTX names the kernel's arguments, so that an address can be followed to the one
it starts from, and it is what the assembler must respect: `bar.sync` guarantees that the accesses
before it are performed for all threads of the barrier.

**What it decides.** An address is a linear form over the index of the thread, which is known, and
over unknowns (linear.py). Two accesses to one argument race if, for some value of the unknowns,
bytes of threads in two warps overlap. A thread that overwrites what it has read itself does not.

**What it assumes.** Rows that are different multiples of an unknown width do not overlap. Indices
that threads have read, and tiles that iterations find by division or by reading, are distinct.
Integers do not overflow. The threads of a warp execute each instruction together.

**What it cannot see.** Two arguments that share memory; addresses that do not start from one
argument (tensor descriptors, pointers in global or shared memory, a choice between two pointers);
shared memory; races between blocks; two writes; atomics, which are neither accesses nor barriers;
mbarriers, and barriers of a part of the block, which order nothing here. Where a tile has fewer
elements than threads, several threads read an element that one of them overwrites: that is
reported, even if the others do not use it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from gpu_dry.accesses import Access, Evaluation
from gpu_dry.linear import Coefficient, Numbers, Unknown
from gpu_dry.ptx import Kernel, parse

_WARP = 32


class _Pending(NamedTuple):
    """An access after which there has been no barrier on some path.

    repeated: headers of the loops that have started another iteration since. often: those that
    have started more than one. in_flight: an asynchronous read that has not been waited for.
    """

    access: Access
    repeated: frozenset[str]
    often: frozenset[str]
    in_flight: bool

    def again(self, header: str) -> _Pending:
        """The same after another iteration of a loop has started."""
        often = self.often | (self.repeated & {header})
        return self._replace(repeated=self.repeated | {header}, often=often)

    def is_one_before(self, factor: Unknown) -> bool:
        """True for a counter that is one larger since."""
        header = factor.key[1]
        return (
            factor.counts_iterations
            and factor.loops & self.repeated == {header}
            and header not in self.often
        )


def unordered(ptx: str) -> list[str]:
    """Pairs of accesses by different warps to the same memory without a barrier between.

    ptx: of a kernel compiled by Triton, such as `compiled.asm["ptx"]`.

    Returns a line for each pair: the position of the argument among the kernel's parameters, and
    the source lines of both accesses; an empty list if there is none.
    """
    kernel = parse(ptx)
    if kernel.threads <= _WARP:
        return []
    found = set()
    for first, second in _pairs(kernel):
        if _may_overlap(first, second, kernel.threads):
            kinds = [("reads", "writes")[access.writes] for access in (first.access, second)]
            found.add(
                f"argument {second.argument}: {first.access.line} {kinds[0]} what {second.line} "
                f"{kinds[1]} in another warp, with no barrier between"
            )
    return sorted(found)


def _pairs(kernel: Kernel) -> list[tuple[_Pending, Access]]:
    """Every access with those before it that no barrier separates from it, one of both a write."""
    events = Evaluation(kernel).events
    accesses = [event for each in events.values() for event in each if isinstance(event, Access)]
    shared = {access.argument for access in accesses if access.writes} & {
        access.argument for access in accesses if not access.writes
    }
    entries: dict[str, set[_Pending]] = {label: set() for label in kernel.blocks}
    pairs: dict[tuple[_Pending, Access], None] = {}
    todo = list(reversed(kernel.blocks))
    while todo:
        label = todo.pop()
        pending = set(entries[label])
        for event in events[label]:
            if event == "barrier":
                pending = {each for each in pending if each.in_flight}
            elif event == "wait":
                pending = {each._replace(in_flight=False) for each in pending}
            elif isinstance(event, Access) and event.argument in shared:
                for each in pending:
                    same = each.access.argument == event.argument
                    if same and each.access.writes != event.writes:
                        pairs[each, event] = None
                pending.add(_Pending(event, frozenset(), frozenset(), event.asynchronous))
        for following in kernel.blocks[label].after:
            arriving = pending
            if kernel.loops_back(label, following):
                arriving = {each.again(following) for each in pending}
            if not arriving <= entries[following]:
                entries[following] |= arriving
                todo.append(following)
    return list(pairs)


def _may_overlap(pending: _Pending, second: Access, threads: int) -> bool:
    """True if threads of two warps may touch the same bytes."""
    first, repeated = pending.access, pending.repeated
    warps = np.arange(threads) // _WARP
    pairs = (warps[:, None] != warps) & first.active[:, None] & second.active
    #: The unknowns may shift one address against the other by any multiple of this.
    shift = 0
    #: Bytes by which counters that are one larger have moved the second address.
    moved = 0
    for product in (first.address.terms.keys() | second.address.terms.keys()) - {()}:
        a, b = (access.address.terms.get(product, 0) for access in (first, second))
        uniform = all(factor.uniform for factor in product)
        changes = any(factor.loops & repeated for factor in product)
        counts = len(product) == 1 and product[0].counts_iterations
        if np.array_equal(a, b) and (not uniform or (changes and not counts)):
            return False  # indices, rows or tiles that are assumed to be distinct
        if isinstance(a, int) and isinstance(b, int):
            if counts and a == b and pending.is_one_before(product[0]):
                moved += b
                continue
            shift = math.gcd(shift, a - b, a if changes else 0)
        elif uniform and not changes:
            pairs &= _differences(a, b) == 0
        else:
            shift = 1
    apart = _differences(first.address.terms.get((), 0), second.address.terms.get((), 0)) - moved
    overlaps = (apart < second.size) & (apart > -first.size)
    if shift:
        apart = apart % shift
        overlaps = (apart < second.size) | (apart > shift - first.size)
    return bool((pairs & overlaps).any())


def _differences(a: Coefficient, b: Coefficient) -> Numbers:
    """a - b for each pair of threads, [threads, threads] or what broadcasts to it."""
    return np.asarray(np.atleast_1d(a)[:, None] - np.atleast_1d(b), dtype=np.int64)
