"""Detection of optional packages: those used, those unavailable and why, those required."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType
from typing import Any

import pytest
import torch
from nemocascade_kernels.mamba2 import fla_check

from nemocascade.megatron import accelerators
from nemocascade.megatron.accelerators import (
    AcceleratorError,
    Detection,
    Finding,
    detect,
)
from nemocascade.megatron.config import Accelerators
from nemocascade.recipe import EngineConfig

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
PACKAGES = {
    "transformer_engine": "transformer-engine",
    "apex": "apex",
    "fla": "fla-core",
}


class Machine:
    """Packages installed on a pretended GPU machine, and which imports fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.installed: set[str] = set()
        self.broken: dict[str, BaseException] = {}
        self.imported: list[str] = []
        find, load = importlib.util.find_spec, importlib.import_module
        version = importlib.metadata.version

        def find_spec(name: str, *rest: Any) -> Any:
            if name in PACKAGES:
                return find("math") if name in self.installed else None
            return find(name, *rest)

        def import_module(name: str, *rest: Any) -> ModuleType:
            top = name.split(".")[0]
            if top in PACKAGES or name in ("amp_C", "fused_weight_gradient_mlp_cuda"):
                self.imported.append(name)
                if name in self.broken:
                    raise self.broken[name]
                return ModuleType(name)
            return load(name, *rest)

        def version_of(name: str) -> str:
            return "9.9.9" if name in PACKAGES.values() else version(name)

        patch.setattr(importlib.util, "find_spec", find_spec)
        patch.setattr(importlib, "import_module", import_module)
        patch.setattr(importlib.metadata, "version", version_of)
        here = Finding("here", "yes", "", "")
        for name in ("_device", "_bf16", "_triton"):
            patch.setattr(accelerators, name, lambda _device: here)
        patch.setattr(fla_check, "check_version", self._check_fla)

    def _check_fla(self) -> None:
        self.imported.append("fla")
        if "fla" in self.broken:
            raise self.broken["fla"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def finding(found: Detection, name: str) -> Finding:
    return next(f for f in found.findings if f.name == name)


def test_the_default_uses_nothing() -> None:
    found = Accelerators()
    assert (found.adam, found.te_attention, found.fused_weight_gradient, found.fla) == (
        "torch",
        False,
        False,
        False,
    )


def test_nothing_installed(machine: Machine) -> None:
    found = detect(EngineConfig(), CUDA)
    assert found.accelerators == Accelerators()
    assert machine.imported == []
    assert finding(found, "fla-core").refused == "not installed"


def test_everything_installed(machine: Machine) -> None:
    machine.installed = set(PACKAGES)
    found = detect(EngineConfig(), CUDA)
    assert found.accelerators == Accelerators("transformer_engine", True, True, True)
    assert finding(found, "fla-core").version == "9.9.9"
    assert "preferred" in finding(found, "apex Adam").refused


def test_apex_alone_gives_its_adam(machine: Machine) -> None:
    machine.installed = {"apex"}
    found = detect(EngineConfig(apex="on"), CUDA)
    assert found.accelerators == Accelerators("apex", False, True, False)


def test_off_does_not_even_import(machine: Machine) -> None:
    machine.installed = set(PACKAGES)
    engine = EngineConfig(transformer_engine="off", apex="off", fla="off")
    found = detect(engine, CUDA)
    assert found.accelerators == Accelerators()
    assert machine.imported == []
    assert finding(found, "fla-core").refused == "switched off"


def test_a_cpu_run_uses_none(machine: Machine) -> None:
    machine.installed = set(PACKAGES)
    found = detect(EngineConfig(), CPU)
    assert found.accelerators == Accelerators()
    assert machine.imported == []
    assert "needs a CUDA device" in finding(found, "fla-core").refused


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcudart.so.12: cannot open shared object file"),
        OSError("undefined symbol: _ZN2at"),
        RuntimeError("its scan differs from ours by 3.0e-01"),
        AttributeError("module has no attribute"),
    ],
)
def test_a_broken_package_is_refused_with_its_reason(
    machine: Machine, error: BaseException
) -> None:
    machine.installed = {"fla", "apex"}
    machine.broken = {"fla": error, "fused_weight_gradient_mlp_cuda": error}
    found = detect(EngineConfig(), CUDA)
    assert found.accelerators == Accelerators("apex", False, False, False)
    reason = finding(found, "fla-core").refused
    assert type(error).__name__ in reason
    assert str(error)[:30] in reason
    assert reason in found.table()


def test_on_and_missing_is_an_error_that_names_all(machine: Machine) -> None:
    machine.installed = {"apex"}
    machine.broken = {"amp_C": ImportError("no amp_C")}
    engine = EngineConfig(transformer_engine="on", apex="on", fla="on")
    with pytest.raises(AcceleratorError) as raised:
        detect(engine, CUDA)
    message = str(raised.value)
    for part in (
        "Transformer Engine attention",
        "not installed",
        "apex Adam",
        "no amp_C",
        "fla-core",
    ):
        assert part in message
    assert "apex weight gradient" not in message
    assert "set it to auto or off" in message


def test_preferring_transformer_engine_does_not_fail_apex_on(machine: Machine) -> None:
    machine.installed = set(PACKAGES)
    assert detect(EngineConfig(apex="on"), CUDA).accelerators.adam == "transformer_engine"


def test_the_table_has_a_line_for_each(machine: Machine) -> None:
    machine.installed = {"fla"}
    found = detect(EngineConfig(), CUDA)
    lines = found.table().splitlines()
    assert len(lines) == len(found.findings) + 1
    row = next(line for line in lines if line.startswith("fla-core"))
    assert "9.9.9" in row
    assert "Mamba-2 scan and convolution" in row
    row = next(line for line in lines if line.startswith("apex Adam"))
    assert "torch's AdamW (not installed)" in row


def test_detection_on_this_machine() -> None:
    """The real thing: it never raises with the default settings."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else CPU
    found = detect(EngineConfig(), device)
    names = [f.name for f in found.findings]
    assert len(names) == len(set(names)) == 11
    assert finding(found, "CUDA device").used == torch.cuda.is_available()
