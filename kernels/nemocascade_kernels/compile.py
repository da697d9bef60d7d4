"""Compile every Triton kernel of the package ahead of time; no GPU is needed.

    python -m nemocascade_kernels.compile --arch sm_90
    python -m nemocascade_kernels.compile --arch sm_80 --op linear_logprob
    python -m nemocascade_kernels.compile --arch sm_90 --sample     # one launch of each kernel

It prints one line a kernel: registers a thread, bytes spilled, shared memory, and the matrix
instruction. The exit code is 1 if a kernel spills registers, needs more shared memory than the
architecture has, or does not use the matrix instruction it was written for.

The kernels are those of `launches.json`: what the ops launch at the shapes of the models they are
for, with the specialisation that Triton gives each launch. The file is recorded by calling the ops
on a device that is played (`make gpu-dry UPDATE=1`).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemocascade_kernels import backends

PACKAGE = "nemocascade_kernels"

#: Shared memory that one block may have, in bytes (CUDA programming guide, "Technical
#: specifications").
SHARED_MEMORY_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class AotKernel:
    """One kernel with the argument types and the settings of a launch.

    kernel: the `@triton.jit` function.
    signature: the type of each argument that is not a constexpr, such as `{"x_ptr": "*bf16:16",
        "rows": "i32"}`. `:16` means that the value is divisible by 16. At run time Triton detects
        this for pointers and integers, and uses wider loads.
    constants: the value of each constexpr argument.
    matrix: the matrix instruction it must use on sm_90, "wgmma" or "mma"; None for a kernel without
        products; "any" accepts all.
    options: further options of the compiler, such as `maxnreg`.
    """

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    label: str = ""
    matrix: str | None = "any"
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__}[{self.label}]" if self.label else str(self.kernel.__name__)


@dataclass(frozen=True)
class Report:
    """The assembler's report on one compiled kernel."""

    op: str
    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix: str | None
    faults: tuple[str, ...]

    def line(self) -> str:
        verdict = "; ".join(self.faults) or "ok"
        return (
            f"{self.op:16s} {self.name:52s} {self.registers:4d} registers "
            f"{self.spilled_bytes:6d} B spilled {self.shared_bytes:7d} B shared  "
            f"{self.matrix or '-':8s} {verdict}"
        )


def triton_ops() -> list[str]:
    """Names of the ops that have Triton kernels."""
    importlib.import_module(PACKAGE)
    return sorted(name for name, op in backends.ops().items() if "triton" in op.backends)


def kernels_of(op: str, arch: int) -> list[AotKernel]:
    """The recorded launches of an op on an architecture (80, 90, 100); none if it has none there.

    Raises LookupError for an op without any launch.
    """
    entries = json.loads((Path(__file__).parent / "launches.json").read_text(encoding="utf-8"))
    recorded = [e for e in entries if e["op"] == op]
    if not recorded:
        raise LookupError(f"no launch of {op} is recorded: make gpu-dry UPDATE=1")
    found = [e for e in recorded if arch in e["architectures"]]
    return [
        AotKernel(
            _named(entry["kernel"]),
            entry["signature"],
            {name: _constant(value) for name, value in entry["constants"].items()},
            entry["num_warps"],
            entry["num_stages"],
            entry["label"],
            entry["matrix"],
            entry["options"],
        )
        for entry in found
    ]


def sample_of(kernels: Sequence[AotKernel]) -> list[AotKernel]:
    """One launch of each kernel function: at Nemotron's shapes if it is recorded there, and that
    with the largest tiles, which needs most registers and shared memory."""

    def weight(kernel: AotKernel) -> tuple[bool, int]:
        sizes = [v for v in kernel.constants.values() if isinstance(v, int) and v > 0]
        return kernel.label.startswith("nemotron"), math.prod(sizes)

    chosen: dict[int, AotKernel] = {}
    for kernel in kernels:
        best = chosen.setdefault(id(kernel.kernel), kernel)
        if weight(kernel) > weight(best):
            chosen[id(kernel.kernel)] = kernel
    return list(chosen.values())


def _named(name: str) -> Any:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def _constant(value: Any) -> Any:
    return _named(value["function"]) if isinstance(value, dict) else value


def compiled(op: str, kernel: AotKernel, arch: int) -> Any:
    """Triton's result for one kernel and sm_<arch>; `asm["ptx"]` is its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.kernel.arg_names
    given = set(kernel.signature) | set(kernel.constants)
    if given != set(names):
        raise ValueError(
            f"{op}/{kernel.name}: arguments {sorted(set(names) ^ given)} are missing from its "
            "entry, or unknown to the kernel"
        )
    signature, attributes = {}, {}
    for position, name in enumerate(names):
        kind, _, divisor = kernel.signature.get(name, "constexpr").partition(":")
        signature[name] = kind
        if divisor:
            attributes[(position,)] = [["tt.divisibility", int(divisor)]]
    source = ASTSource(
        kernel.kernel, signature, constexprs=dict(kernel.constants), attrs=attributes
    )
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, **kernel.options}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def compile_kernel(op: str, kernel: AotKernel, arch: int) -> Report:
    """Compile one kernel for sm_<arch> and read the assembler's report."""
    result = compiled(op, kernel, arch)
    registers, spilled = assembler_report(result.asm["ptx"], arch)
    shared, matrix = int(result.metadata.shared), matrix_instruction(result.asm["ptx"])
    faults = []
    if spilled:
        faults.append(f"SPILLS {spilled} B")
    if shared > SHARED_MEMORY_LIMIT[arch]:
        faults.append(f"SHARED MEMORY exceeds {SHARED_MEMORY_LIMIT[arch]} B")
    if arch == 90 and kernel.matrix != "any" and matrix != kernel.matrix:
        faults.append(f"MATRIX INSTRUCTION is {matrix}, and {kernel.matrix} was intended")
    return Report(op, kernel.name, registers, spilled, shared, matrix, tuple(faults))


def assembler_report(ptx: str, arch: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled, from `ptxas -v`."""
    from triton import knobs

    tool = knobs.nvidia.ptxas
    if arch >= 100:
        tool = getattr(knobs.nvidia, "ptxas_blackwell", tool)
    target = re.search(r"^\.target\s+(\w+)", ptx, re.MULTILINE)
    if target is None:
        raise RuntimeError("the PTX names no .target")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        with open(path, "w") as file:
            file.write(ptx)
        command = [
            tool.path,
            "-v",
            f"--gpu-name={target[1]}",
            path,
            "-o",
            os.path.join(folder, "kernel.cubin"),
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ptxas failed with code {result.returncode}:\n{result.stderr}")
    registers = re.search(r"Used (\d+) registers", result.stderr)
    if registers is None:
        raise RuntimeError(f"ptxas reported no registers:\n{result.stderr}")
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", result.stderr)
    return int(registers[1]), sum(map(int, spills))


def matrix_instruction(ptx: str) -> str | None:
    """The matrix instruction that a kernel's PTX uses: wgmma, tcgen05, mma, or None."""
    for instruction, mark in (
        ("wgmma", "wgmma.mma_async"),
        ("tcgen05", "tcgen05.mma"),
        ("mma", "mma.sync"),
    ):
        if mark in ptx:
            return instruction
    return None


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=f"python -m {PACKAGE}.compile", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--arch", required=True, choices=[f"sm_{arch}" for arch in SHARED_MEMORY_LIMIT]
    )
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--sample", action="store_true", help="only one launch of each kernel")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.op or ()) - set(triton_ops())):
        parser.error(f"no Triton kernels in {unknown}: choose among {triton_ops()}")
    return options


def main(arguments: list[str] | None = None) -> int:
    # The decorator reads this when a kernel is defined; interpreted kernels cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    options = parse(arguments)
    arch = int(options.arch.removeprefix("sm_"))
    reports = []
    for op in options.op or triton_ops():
        kernels = kernels_of(op, arch)
        for kernel in sample_of(kernels) if options.sample else kernels:
            reports.append(compile_kernel(op, kernel, arch))
            print(reports[-1].line(), flush=True)
    faulty = [report for report in reports if report.faults]
    print(f"{options.arch}: {len(reports)} kernels, {len(faulty)} with faults")
    return 1 if faulty or not reports else 0


if __name__ == "__main__":
    # Run the importable module: as `__main__`, this file would define a second AotKernel class.
    sys.exit(importlib.import_module(f"{PACKAGE}.compile").main())
