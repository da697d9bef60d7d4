"""Reads and writes of global memory by a kernel, with their addresses as linear forms."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from gpu_dry.linear import (
    Numbers,
    Unknown,
    Value,
    add,
    function_of,
    multiply,
    number,
    result_of,
    unknown,
)
from gpu_dry.ptx import Instruction, Kernel
from numpy.typing import NDArray

Registers = dict[str, Value]
#: Rounds in which the loops' registers must settle: more than loops are deep.
_ROUNDS = 20
#: Instructions whose results are not a function of their operands, and differ between threads.
_NO_FUNCTIONS = (
    "shfl", "redux", "atom", "vote", "match", "activemask", "elect", "ldmatrix", "mma", "wgmma",
    "tcgen05", "call", "mbarrier",
)  # fmt: skip
_OTHER_SPACES = ("param", "shared", "local", "const")
_ADDRESS = re.compile(r"\[\s*(%?[\w$.]+)\s*(?:\+\s*(-?\w+)\s*)?\]")


@dataclass(frozen=True, eq=False)
class Access:
    """One read or write of global memory.

    argument: position of the kernel's pointer argument that the address starts from.
    address: in bytes from the argument.
    active: [threads] bool, False for threads that certainly do not take part.
    size: bytes of a thread.
    asynchronous: the read is complete only after a wait (cp.async).
    """

    argument: int
    writes: bool
    address: Value
    active: NDArray[np.bool_]
    size: int
    asynchronous: bool
    line: str


#: What matters for the order of accesses: one, or "barrier", or "wait" for asynchronous reads.
Event = Access | str


class Evaluation:
    """Events of each block of a kernel, from the values of its registers.

    A register that a loop changes is `start + iterations * step` if the step does not change, and
    otherwise unknown. All begin as unknowns, and the blocks are evaluated until nothing is learnt.
    """

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.pointers = {Unknown(("argument", position)) for position in kernel.pointers}
        self.threads: Numbers = np.arange(kernel.threads, dtype=np.int64)
        #: Step of (header, register) where it is known, and None where it is not constant.
        self.steps: dict[tuple[str, str], Value | None] = {}
        self.varying: set[tuple[str, str]] = set()
        self.diverges = False
        self.events: dict[str, list[Event]] = {}
        self.assigned = {
            header: {
                register
                for block in kernel.blocks.values()
                if header in block.loops
                for instruction in block.instructions
                for register in instruction.results
            }
            for header in kernel.blocks
        }
        for _ in range(_ROUNDS):
            if not self.learns():
                return
        raise RuntimeError(f"the registers of the loops have not settled after {_ROUNDS} rounds")

    def learns(self) -> bool:
        """Evaluate all blocks; return True if that taught something about the loops."""
        before = (dict(self.steps), set(self.varying), self.diverges)
        entries: dict[str, Registers] = {}
        exits: dict[str, Registers] = {}
        for label, block in self.kernel.blocks.items():
            registers = self.merge(label, exits)
            entries[label] = dict(registers)
            self.events[label] = []
            for position, instruction in enumerate(block.instructions):
                self.execute(label, position, instruction, registers)
            exits[label] = registers
        for label, block in self.kernel.blocks.items():
            ends = [exits[at] for at in block.before if self.kernel.loops_back(at, label)]
            for register in self.assigned[label] & entries[label].keys() if ends else ():
                values = [end[register] for end in ends if register in end]
                self.learn_step((label, register), entries[label][register], values)
        return before != (self.steps, self.varying, self.diverges)

    def learn_step(self, at: tuple[str, str], start: Value, ends: list[Value]) -> None:
        """Note how an iteration changes a register; `ends` has its value at each way back."""
        if not all(end.uniform for end in ends):
            self.varying.add(at)
        steps = {add(end, start, -1) for end in ends}
        step = steps.pop() if len(steps) == 1 else None
        if step is not None and at[0] not in step.loops and self.steps.get(at, step) is not None:
            self.steps[at] = step
        elif at in self.steps:
            self.steps[at] = None

    def merge(self, label: str, exits: dict[str, Registers]) -> Registers:
        """Registers at the start of a block, from the blocks before it."""
        block = self.kernel.blocks[label]
        before = [exits[at] for at in block.before if not self.kernel.loops_back(at, label)]
        merged: Registers = dict(before[0]) if len(before) == 1 else {}
        for register in before[0] if len(before) > 1 else ():
            values = [registers[register] for registers in before if register in registers]
            if len(values) < len(before):
                continue
            merged[register] = values[0]
            if any(value != values[0] for value in values):
                uniform = not self.diverges and all(value.uniform for value in values)
                loops = frozenset(block.loops).union(*(value.loops for value in values))
                merged[register] = unknown("join", label, register, uniform=uniform, loops=loops)
        if label in block.loops:
            counter = unknown("count", label, loops=frozenset(block.loops))
            for register in self.assigned[label] & merged.keys():
                at, start = (label, register), merged[register]
                step = self.steps.get(at)
                if step is not None:
                    merged[register] = add(start, multiply(counter, step))
                else:
                    uniform = start.uniform and at not in self.varying and not self.diverges
                    loops = start.loops | block.loops
                    merged[register] = unknown("loop", *at, uniform=uniform, loops=loops)
        return merged

    def execute(
        self, label: str, position: int, instruction: Instruction, registers: Registers
    ) -> None:
        """Update the registers and the block's events."""
        name, operands = instruction.name, instruction.operands
        active = number(1)
        if instruction.guard is not None:
            register, negated = instruction.guard
            active = self.operand(register, registers)
            active = add(number(1), active, -1) if negated else active
        if name[0] == "bra":
            self.diverges |= not active.uniform
        elif name[0] in ("bar", "barrier") and "warp" not in name:
            # A barrier with a number of threads may leave some of the block out.
            if len(operands) < 2 or operands[1] == str(self.kernel.threads):
                self.events[label].append("barrier")
        elif name[:2] == ("cp", "async") and (
            name[2] == "wait_all" or (name[2] == "wait_group" and operands == ("0",))
        ):
            self.events[label].append("wait")
        else:
            self.events[label] += self.accesses(instruction, active, registers)
        for index, register in enumerate(instruction.results):
            value = self.result((label, position, index), instruction, registers)
            if active != number(1):
                old = registers.get(register, value)
                same = active.uniform and value.uniform and old.uniform
                loops = value.loops | old.loops | active.loops
                value = unknown("guarded", label, position, index, uniform=same, loops=loops)
            registers[register] = value

    def accesses(
        self, instruction: Instruction, active: Value, registers: Registers
    ) -> Iterator[Access]:
        """The access of an instruction to the memory of an argument, if it is one."""
        name, operands = instruction.name, instruction.operands
        if name[:3] in (("cp", "async", "ca"), ("cp", "async", "cg")):
            address, size = operands[1], int(operands[2], 0)
        elif name[0] in ("ld", "st") and not any(part.startswith(_OTHER_SPACES) for part in name):
            address = operands[name[0] == "ld"]
            elements = next((int(part[1:]) for part in name if part in ("v2", "v4", "v8")), 1)
            size = elements * int(re.sub(r"\D+", "", name[-1])) // 8
        else:
            return
        value = self.address(address, registers)
        for argument in self.kernel.pointers:
            base = unknown("argument", argument)
            rest = add(value, base, -1)
            if base.unknowns <= value.unknowns and not rest.unknowns & self.pointers:
                takes_part = np.zeros(self.kernel.threads, dtype=bool)
                for coefficient in active.terms.values():
                    takes_part |= np.not_equal(coefficient, 0)
                writes, asynchronous = name[0] == "st", name[0] == "cp"
                yield Access(
                    argument, writes, rest, takes_part, size, asynchronous, instruction.line
                )

    def result(
        self, at: tuple[str, int, int], instruction: Instruction, registers: Registers
    ) -> Value:
        """Value of a result: at[2] is its place among the results."""
        loops = frozenset(self.kernel.blocks[at[0]].loops)
        name, operands = instruction.name, instruction.operands
        if name[:2] == ("ld", "param"):
            found = re.search(r"_param_(\d+)\s*\]", operands[1])
            return unknown("argument", int(found[1]) if found else operands[1])
        if name[0] == "ld":
            uniform = self.address(operands[1], registers).uniform
            return unknown("read", *at, uniform=uniform, loops=loops)
        if name[0] in _NO_FUNCTIONS:
            return unknown("result", *at, uniform=False, loops=loops)
        inputs = [
            self.operand(word, registers)
            for operand in operands[1:]
            for word in re.findall(r"[%$\w.\-]+", operand)
        ]
        if len(instruction.results) > 1:
            return function_of((name, at[2]), inputs)
        return result_of(name, inputs)

    def address(self, operand: str, registers: Registers) -> Value:
        found = _ADDRESS.fullmatch(operand)
        if found is None:
            return unknown("address", operand, uniform=False)
        return add(self.operand(found[1], registers), number(int(found[2] or "0", 0)))

    def operand(self, word: str, registers: Registers) -> Value:
        """Value of a register, a constant, or a name."""
        if word in registers:
            return registers[word]
        if word in ("%tid.x", "%laneid"):
            return number(self.threads if word == "%tid.x" else self.threads % 32)
        if re.fullmatch(r"0[fFdD][0-9a-fA-F]+", word):
            return number(int(word[2:], 16))
        if re.fullmatch(r"-?\d\w*", word):
            return number(int(word.rstrip("U"), 0))
        # A register without a value holds the same in no two threads; names are those of constants.
        return unknown("name", word, uniform=re.fullmatch(r"%[a-z]+\d+", word) is None)
