"""Triton launches on the device that is played: compiled as the real launcher does, never run.

`JITFunction.run` specialises every launch on its real arguments and compiles it for the device's
architecture. The launch is checked (grid, shared memory, spilled registers, order of memory
accesses) and recorded.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from gpu_dry import device as dry
from gpu_dry.races import unordered
from nemocascade_kernels.compile import (
    SHARED_MEMORY_LIMIT,
    assembler_report,
    matrix_instruction,
)
from torch._subclasses.fake_tensor import unset_fake_temporarily

PACKAGE = "nemocascade_kernels"
Entry = dict[str, Any]
"""A kernel as `nemocascade_kernels.compile` lists it."""

LAUNCHED: dict[str, Entry] = {}
"""Every kernel of ours that was launched, by its entry without the label."""
CALL: list[str] = ["", ""]
"""Op and label of the call that is running."""


def listed() -> list[Entry]:
    """The entries of all launches so far."""
    return [LAUNCHED[key] for key in sorted(LAUNCHED)]


class _Pointer:
    """Stands for a fake tensor where Triton looks at a pointer."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype, self.shape, self.tensor = tensor.dtype, tensor.shape, tensor
        self._address = 512 + int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address

    def stride(self, dim: int | None = None) -> Any:
        return self.tensor.stride() if dim is None else self.tensor.stride(dim)

    def numel(self) -> int:
        return self.tensor.numel()


class _Utils:
    """The part of Triton's driver that loads binaries."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_MEMORY_LIMIT[architecture()],
            "multiprocessor_count": dry.MULTIPROCESSORS,
            "max_num_regs": dry.REGISTERS,
            "warpSize": 32,
            "sm_clock_rate": 1830000,
            "mem_clock_rate": 1,
            "mem_bus_width": 5120,
        }

    def load_binary(
        self, name: str, binary: bytes, shared: int, device: int
    ) -> tuple[None, None, int, int, int]:
        registers, stack = resources(binary)
        return None, None, registers, stack, 1024


def architecture() -> int:
    return int(dry.PROPERTIES.major) * 10 + int(dry.PROPERTIES.minor)


def resources(binary: bytes) -> tuple[int, int]:
    """Registers a thread and bytes of stack of a cubin, by Triton's own cuobjdump."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+)", text), re.search(r"STACK:(\d+)", text)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump reported no registers: {text}")
    return int(registers[1]), int(stack[1])


class _Launcher:
    """Stands for the compiled launcher of one kernel."""

    def __init__(self, src: Any, metadata: Any) -> None:
        self.name = src.fn.__name__

    def __call__(self, x: int, y: int, z: int, *_rest: Any) -> None:
        dry.RECORD.add("launch", self.name)
        if not (1 <= x < 2**31 and 1 <= y < 65536 and 1 <= z < 65536):
            dry.RECORD.fault(f"{self.name}: grid {(x, y, z)} is illegal")


def _examine(compiled: Any) -> None:
    """Check and list a compiled kernel of ours."""
    entry, ptx = entry_of(compiled.src, compiled.metadata), compiled.asm["ptx"]
    key = json.dumps(entry, sort_keys=True)
    if key not in LAUNCHED:
        # The stack holds spilled registers, among other things.
        spilled = (
            assembler_report(compiled.asm["ptx"], architecture())[1] if compiled.n_spills else 0
        )
        if spilled:
            dry.RECORD.fault(f"{entry['kernel']}: {spilled} bytes of registers are spilled")
        for race in _races(ptx):
            dry.RECORD.fault(f"{entry['kernel']}: {race}")
        op = entry["kernel"].split(".")[1]
        # An op of its own may be in the folder of another, as `moe_experts_fp8` is.
        entry["op"] = CALL[0] if op == "common" or CALL[0].startswith(op) else op
        entry["matrix"] = matrix_instruction(ptx)
        LAUNCHED[key] = {"label": CALL[1], **entry}


def _races(ptx: str) -> list[str]:
    """`unordered`, whose results are kept beside Triton's cache: it takes a second a kernel."""
    here = Path(__file__).parent
    digest = hashlib.sha256(ptx.encode())
    for name in ("races", "accesses", "linear", "ptx"):
        digest.update((here / f"{name}.py").read_bytes())
    path = Path(os.environ["TRITON_CACHE_DIR"]).with_name("races") / digest.hexdigest()
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(unordered(ptx)))
        partial.replace(path)
    found: list[str] = json.loads(path.read_text())
    return found


def entry_of(src: Any, metadata: Any) -> Entry:
    """The specialisation of a compiled source."""
    names = src.fn.arg_names
    divisible = {path[0] for path, marks in src.attrs.items() if ["tt.divisibility", 16] in marks}
    constants = {names[path[0]]: _plain(value) for path, value in src.constants.items()}
    signature = {
        name: f"{kind}:16" if position in divisible else kind
        for position, (name, kind) in enumerate(src.signature.items())
        if name not in constants
    }
    options = {} if metadata.maxnreg is None else {"maxnreg": metadata.maxnreg}
    return {
        "kernel": f"{src.fn.__module__}:{src.fn.__name__}",
        "signature": signature,
        "constants": constants,
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "options": options,
    }


def _plain(value: Any) -> Any:
    """A constant as JSON holds it: a function by its name."""
    if hasattr(value, "arg_names"):
        return {"function": f"{value.__module__}:{value.__name__}"}
    return value


class _Driver:
    """Triton's active driver."""

    utils = _Utils()
    launcher_cls = _Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", architecture(), 32)

    def get_active_torch_device(self) -> torch.device:
        return dry.DEVICE

    def get_device_interface(self) -> Any:
        return torch.cuda

    def get_benchmarker(self) -> Any:
        raise RuntimeError("a dry run times nothing")

    def set_current_device(self, device: int) -> None:
        pass


def install() -> None:
    """Make Triton compile for the device that is played, and record instead of launching.

    An autotuned kernel takes its first configuration.
    """
    import triton
    from triton.runtime import autotuner, jit
    from triton.tools.tensor_descriptor import TensorDescriptor

    os.environ.pop("TRITON_INTERPRET", None)
    triton.runtime.driver.set_active(_Driver())
    run = jit.JITFunction.run

    def dry_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        def pointer(value: Any) -> Any:
            if isinstance(value, TensorDescriptor):
                pointer(value.base)
                return value
            if not isinstance(value, torch.Tensor):
                return value
            if not dry.is_fake(value):
                dry.RECORD.fault(f"{self.__name__}: a CPU tensor is passed to a kernel")
            dry.Host.known.pop(value, None)  # the kernel may write it
            return _Pointer(value)

        with unset_fake_temporarily():
            compiled = run(
                self, *[pointer(a) for a in args], **{k: pointer(v) for k, v in kwargs.items()}
            )
            if self.__module__.startswith(PACKAGE) and not kwargs.get("warmup"):
                _examine(compiled)
            return compiled

    def first(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.configs[0]
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        if config.pre_hook is not None:
            config.pre_hook({**self.nargs, **kwargs, **config.all_kwargs()})
        return self.fn.run(*args, **kwargs, **config.all_kwargs())

    jit.JITFunction.run = dry_run
    autotuner.Autotuner.run = first
