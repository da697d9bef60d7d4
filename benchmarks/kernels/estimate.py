"""Estimated time of a launch on a GPU, from the compiled kernel. Nothing here is measured.

A kernel without matrix instructions takes the longest of: its bytes at the rate of a copy, and its
instructions at the rate of the schedulers. A kernel of products takes its FLOPs at the measured
rate of a large product, times how far its loop is bound by something else: by issue, or by reads of
shared memory. What it does once a tile is added, unless a second block on the multiprocessor hides
it. The last wave counts as a whole one. Latency that is not hidden, ragged tiles and the order of
tiles in L2 are excluded, so an estimate of a product is a least time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from gpu_dry import ptx


@dataclass(frozen=True)
class Ceilings:
    """Ceilings of one GPU: the defaults are those of an H200. tflops: dense bf16, measured on
    random data; terabytes_s: a copy, measured. launch_us: least time of a launch in a CUDA graph,
    assumed. The others are of the data sheet and the CUDA programming guide."""

    tflops: float = 790.0
    terabytes_s: float = 4.3
    multiprocessors: int = 132
    registers: int = 65_536
    shared_bytes: int = 233_472
    warps: int = 64
    blocks: int = 32
    schedulers: int = 4
    shared_bytes_clock: int = 128
    tensor_flops_clock: int = 4096
    clock_ghz: float = 1.755
    launch_us: float = 2.0


class Loop(NamedTuple):
    """Counts of a piece of code, for one thread: instructions, bytes of global reads and writes;
    and of matrix instructions, for one block: FLOPs, bytes of operands in shared memory. waits: it
    waits for all of its matrix instructions, so the same block issues nothing beside them."""

    instructions: int
    global_bytes: int
    matrix_flops: int
    operand_bytes: int
    waits: bool = False


class Launch(NamedTuple):
    """One launch. bytes: those of all tensors of its arguments. body: the counts of its hottest
    loop, or of all its code; once: those outside of it. depth_block: depth of a tile's step.
    compute: instructions of a pass of each loop that writes no global memory, in all.
    tile_rows: rows that a program takes at once."""

    name: str
    programs: int
    warps: int
    registers: int
    shared_bytes: int
    bytes: int
    body: Loop
    once: Loop
    depth_block: int
    compute: int = 0
    tile_rows: int = 1


class Operator(NamedTuple):
    """An operator of torch on the device: its FLOPs if it is a product, and its tensors' bytes."""

    name: str
    flops: float
    bytes: int


class Work(NamedTuple):
    """Work that a case does in its own kernels of products: FLOPs of all, and the mean depth. For a
    kernel with loops that compute on a tile of rows: all rows, and passes of such a loop."""

    flops: float = 0.0
    depth: int = 1
    rows: int = 0
    passes: int = 1


NO_WORK = Work()


class Estimate(NamedTuple):
    """Estimated seconds, and what bounds them."""

    name: str
    seconds: float
    bound: str


def occupancy(launch: Launch, on: Ceilings) -> int:
    """Blocks of a launch on one multiprocessor at a time; at least 1."""
    # Registers are given to a warp in units of 256; a block has 1 KiB of shared memory more.
    a_warp = -(-launch.registers * 32 // 256) * 256
    by_registers = on.registers // max(1, a_warp * launch.warps)
    by_shared = on.shared_bytes // (launch.shared_bytes + 1024)
    return max(1, min(by_registers, by_shared, on.warps // launch.warps, on.blocks))


def rows_time(launch: Launch, on: Ceilings, work: Work = NO_WORK) -> Estimate:
    """Estimate of a kernel without products. work: of one that computes on tiles of rows; all its
    code runs once a tile, and loops without writes to global memory as often as `work` says."""
    memory = launch.bytes / (on.terabytes_s * 1e12)
    busy = min(on.multiprocessors, launch.programs)
    a_second = busy * on.schedulers * on.clock_ghz * 1e9
    issue = 0.0
    if work.rows:
        tiles = -(-work.rows // launch.tile_rows)
        once = launch.body.instructions + launch.once.instructions
        instructions = once + (work.passes - 1) * launch.compute
        issue = tiles * launch.warps * instructions / a_second
    elif launch.body.global_bytes:
        warps = launch.bytes / (32 * launch.body.global_bytes)
        issue = warps * launch.body.instructions / a_second
    resident = occupancy(launch, on) * on.multiprocessors
    waves = math.ceil(launch.programs / resident)
    last_wave = waves * resident / launch.programs if launch.programs > resident else 1.0
    seconds = max(memory, issue) * last_wave
    bound = "memory" if memory >= issue else "issue"
    if seconds < on.launch_us * 1e-6:
        return Estimate(launch.name, on.launch_us * 1e-6, "launch")
    return Estimate(launch.name, seconds, bound)


def product_time(launch: Launch, work: Work, on: Ceilings) -> Estimate:
    """Estimate of a kernel of products. work: its own FLOPs and depth."""
    body = launch.body
    clocks = {
        "tensor cores": body.matrix_flops / on.tensor_flops_clock,
        "issue": body.instructions * launch.warps / on.schedulers,
        "shared memory": body.operand_bytes / on.shared_bytes_clock,
    }
    bound = max(clocks, key=lambda name: clocks[name])
    # At the measured rate of a product, the tensor cores' clock is slower than the nominal one.
    clock = on.tflops * 1e12 / (on.multiprocessors * on.tensor_flops_clock)
    steps = max(1.0, work.depth / launch.depth_block)
    blocks = occupancy(launch, on)
    step_clocks = clocks[bound]
    if body.waits and blocks == 1 and bound != "issue":
        step_clocks += clocks["issue"]
        bound = f"{bound} and issue, one after the other"
    tile_clocks = main_clocks = steps * step_clocks
    bytes_a_clock = on.terabytes_s * 1e12 / on.multiprocessors / clock
    per_tile = max(
        launch.once.instructions * launch.warps / on.schedulers,
        launch.once.global_bytes * launch.warps * 32 / bytes_a_clock,
    )
    if blocks == 1:
        tile_clocks += per_tile
        bound = "what is done once a tile" if per_tile > main_clocks / 4 else bound
    else:
        tile_clocks = max(tile_clocks, per_tile)
    tiles = work.flops / (steps * body.matrix_flops)
    waves = math.ceil(tiles / (blocks * on.multiprocessors)) * blocks
    seconds = waves * tile_clocks / clock
    memory = launch.bytes / (on.terabytes_s * 1e12)
    if memory > seconds:
        return Estimate(launch.name, memory, "memory")
    return Estimate(launch.name, max(seconds, on.launch_us * 1e-6), bound)


def operator_time(operator: Operator, on: Ceilings) -> Estimate:
    """Estimate of an operator of torch: the larger of its FLOPs' and its bytes' time."""
    compute = operator.flops / (on.tflops * 1e12)
    memory = operator.bytes / (on.terabytes_s * 1e12)
    seconds = max(compute, memory, on.launch_us * 1e-6)
    bound = {compute: "tensor cores", memory: "memory"}.get(seconds, "launch")
    return Estimate(operator.name, seconds, bound)


def estimates(
    events: Sequence[Launch | Operator],
    work: Work,
    on: Ceilings,
    kernels: Mapping[str, Work] | None = None,
) -> Iterable[Estimate]:
    """Estimates of all events. The case's own products share its FLOPs equally, but for those of
    `kernels`, whose work is given by name."""
    own = sum(isinstance(e, Launch) and e.body.matrix_flops > 0 for e in events)
    for event in events:
        if isinstance(event, Operator):
            yield operator_time(event, on)
            continue
        mine = (kernels or {}).get(event.name, work._replace(flops=work.flops / max(1, own)))
        if event.body.matrix_flops and mine.flops:
            yield product_time(event, mine, on)
        else:
            yield rows_time(event, on, mine)


_WGMMA = re.compile(r"m64n(\d+)k(\d+)")
_MMA = re.compile(r"m(\d+)n(\d+)k(\d+)")
_WIDTH = {"b8": 1, "u8": 1, "b16": 2, "u16": 2, "b32": 4, "f32": 4, "u32": 4, "b64": 8, "f64": 8}


def count(blocks: Iterable[ptx.Block], warps: int) -> Loop:
    """Counts of some blocks of a kernel's PTX."""
    instructions = global_bytes = flops = operands = 0
    waits = False
    for instruction in (i for block in blocks for i in block.instructions):
        name = instruction.name
        instructions += 1
        if name[0] in ("ld", "st") and "global" in name:
            vector = next((int(part[1:]) for part in name if re.fullmatch(r"v\d", part)), 1)
            global_bytes += vector * _WIDTH.get(name[-1], 4)
        elif name[0] == "cp" and "async" in name and "global" in name:
            sizes = [int(op, 0) for op in instruction.operands if op.isdigit() or op[:2] == "0x"]
            global_bytes += sizes[0] if sizes else 16
        elif name[:2] == ("wgmma", "wait_group"):
            waits |= instruction.operands[-1:] == ("0",)
        elif name[0] == "wgmma" and (shape := _WGMMA.search(".".join(name))):
            n, k = int(shape[1]), int(shape[2])
            flops += 2 * 64 * n * k * (warps // 4)
            operands += 2 * (64 + n) * k * (warps // 4)
        elif name[0] == "mma" and (shape := _MMA.search(".".join(name))):
            m, n, k = (int(size) for size in shape.groups())
            flops += 2 * m * n * k * warps
    return Loop(instructions, global_bytes, flops, operands, waits)


def _waits_for_tma(kernel: ptx.Kernel, labels: set[str]) -> bool:
    """True for a loop that does nothing but wait at a barrier of asynchronous copies."""
    loop = [i.name for label in labels for i in kernel.blocks[label].instructions]
    others = [name for name in loop if name[0] not in ("mbarrier", "bra", "selp", "setp", "mov")]
    return any(name[:2] == ("mbarrier", "try_wait") for name in loop) and not others


def counts(text: str, warps: int) -> tuple[Loop, Loop, int]:
    """Counts of the loop with the most matrix FLOPs, else bytes, a pass; of what is outside of it;
    and the instructions of all other loops that write no global memory. Without such a loop, all
    code is its body."""
    kernel = ptx.parse(text)
    bodies = {
        header: {label for label, block in kernel.blocks.items() if header in block.loops}
        for header in {h for block in kernel.blocks.values() for h in block.loops}
    }
    # A wait for a tile that TMA brings is a loop too, inside of the one that multiplies it.
    for header in [h for h, body in bodies.items() if _waits_for_tma(kernel, body)]:
        del bodies[header]
    # Innermost loops alone: those that contain no other header.
    inner = {h: b for h, b in bodies.items() if not any(o != h and o in b for o in bodies)}
    loops = {h: count((kernel.blocks[label] for label in b), warps) for h, b in inner.items()}
    found = {h: c for h, c in loops.items() if c.matrix_flops or c.global_bytes}
    writing = {
        header
        for header, labels in inner.items()
        for label in labels
        for instruction in kernel.blocks[label].instructions
        if instruction.name[0] == "st" and "global" in instruction.name
    }
    compute = sum(
        c.instructions for h, c in loops.items() if h not in writing and not c.matrix_flops
    )
    everything = count(kernel.blocks.values(), warps)
    if not found or (everything.matrix_flops and not any(c.matrix_flops for c in found.values())):
        return everything, Loop(0, 0, 0, 0), compute
    best = max(found, key=lambda h: (found[h].matrix_flops, found[h].global_bytes))
    outside = (block for label, block in kernel.blocks.items() if label not in inner[best])
    return found[best], count(outside, warps), compute
