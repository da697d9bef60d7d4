"""Instructions and control flow of a kernel in PTX, as Triton's compiler writes it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_STATEMENT = re.compile(r"(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]\s][^,{}\[\]]*")
_WORD = re.compile(r"[%$\w.]+")
#: Instructions whose first operand is not a register that they write.
_NO_RESULT = (
    "st",
    "bar",
    "barrier",
    "bra",
    "ret",
    "exit",
    "cp",
    "red",
    "fence",
    "trap",
    "prefetch",
)


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    guard: the register of its predicate and whether it is negated; None if it always runs.
    name: opcode with its types and modifiers, such as ("ld", "global", "v4", "b32").
    operands: as written; a vector `{...}` and an address `[...]` are one operand.
    line: source line, "file.py:12"; empty if unknown.
    """

    guard: tuple[str, bool] | None
    name: tuple[str, ...]
    operands: tuple[str, ...]
    line: str

    @property
    def results(self) -> list[str]:
        """Registers that it writes."""
        if self.name[0] in _NO_RESULT or not self.operands:
            return []
        return [word for word in _WORD.findall(self.operands[0]) if not word[0].isdigit()]

    @property
    def is_branch(self) -> bool:
        return self.name[0] in ("bra", "ret", "exit")


@dataclass
class Block:
    """Instructions without a branch between them.

    after: labels of the blocks that may follow.
    loops: labels of the headers of the loops that contain the block, its own included.
    """

    instructions: list[Instruction] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    loops: set[str] = field(default_factory=set)


@dataclass
class Kernel:
    """One entry function.

    threads: number of threads of a block.
    pointers: positions of the parameters that are pointers.
    blocks: by label, in an order in which only the edge back to a loop's header leads backwards.
    """

    threads: int
    pointers: set[int]
    blocks: dict[str, Block]

    def loops_back(self, source: str, target: str) -> bool:
        """True if the edge closes a loop: `target` is the header of a loop around `source`."""
        return target in self.blocks[source].loops


def parse(text: str) -> Kernel:
    """The only entry function of a PTX module.

    Raises ValueError if the number of threads is not declared.
    """
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text)
    if threads is None:
        raise ValueError("the PTX has no .reqntid: the number of threads is unknown")
    pointers = re.findall(r"\.param\s+\.u64\s+\.ptr\s.*_param_(\d+)", text)
    blocks = _in_order(_blocks(text))
    return Kernel(int(threads[1]), {int(position) for position in pointers}, blocks)


def _statements(text: str) -> Iterator[Instruction | str]:
    """Instructions, and labels as strings."""
    files = {
        n: path.rsplit("/", 1)[-1] for n, path in re.findall(r'\.file\s+(\d+)\s+"(.*?)"', text)
    }
    body = text[text.index("{", text.index(".entry")) + 1 :]
    line, waiting = "", ""
    for raw in body.splitlines():
        code = raw.split("//")[0].strip()
        location = re.match(r"\.loc\s+(\d+)\s+(\d+)", code)
        if location:
            line = f"{files.get(location[1], '?')}:{location[2]}"
        elif re.fullmatch(r"[$\w]+:", code):
            if code.startswith("$L__func_end"):
                return
            yield code[:-1]
        elif not code.startswith(".loc"):
            *whole, waiting = f"{waiting} {code}".split(";")
            for statement in whole:
                found = _STATEMENT.fullmatch(statement.lstrip(" {}").rstrip())
                if found:
                    guard = (found[2], bool(found[1])) if found[2] else None
                    operands = tuple(part.strip() for part in _OPERAND.findall(found[4]))
                    yield Instruction(guard, tuple(found[3].split(".")), operands, line)


def _blocks(text: str) -> dict[str, Block]:
    """All blocks by label, in the order of the text."""
    blocks = {"entry": Block()}
    label, falls_through = "entry", True

    def begin(new: str) -> None:
        nonlocal label, falls_through
        if falls_through:
            blocks[label].after.append(new)
        label, falls_through = new, True
        blocks[label] = Block()

    for statement in _statements(text):
        if isinstance(statement, str):
            begin(statement)
            continue
        if not falls_through or (
            blocks[label].instructions and blocks[label].instructions[-1].is_branch
        ):
            begin(f"{label}+")
        blocks[label].instructions.append(statement)
        if statement.name[0] == "bra":
            blocks[label].after.append(statement.operands[0])
        if statement.is_branch:
            falls_through = statement.guard is not None
    return blocks


def _in_order(blocks: dict[str, Block]) -> dict[str, Block]:
    """Reachable blocks in reverse postorder, with their predecessors and loops."""
    order: list[str] = []
    opened: dict[str, Iterator[str]] = {"entry": iter(blocks["entry"].after)}
    backwards: list[tuple[str, str]] = []
    while opened:
        label = next(reversed(opened))
        following = next(opened[label], None)
        if following is None:
            order.append(label)
            del opened[label]
        elif following in opened:
            backwards.append((label, following))
        elif following not in order:
            opened[following] = iter(blocks[following].after)
    reachable = {label: blocks[label] for label in reversed(order)}
    for label, block in reachable.items():
        for following in block.after:
            reachable[following].before.append(label)
    for latch, header in backwards:
        body, todo = {header}, [latch]
        while todo:
            label = todo.pop()
            if label not in body:
                body.add(label)
                todo += reachable[label].before
        for label in body:
            reachable[label].loops.add(header)
    return reachable
