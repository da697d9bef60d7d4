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
from nemocascade.megatron.layers import attention_core, flash_attention
from nemocascade.megatron.layers.linear import TE_LINEARS
from nemocascade.megatron.optimizer import FUSED_ADAMS
from nemocascade.megatron.parameters import count_parameters
from nemocascade.recipe import EngineConfig, tiny

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
PACKAGES = {
    "transformer_engine": "transformer-engine",
    "apex": "apex",
    "fla": "fla-core",
    "flash_attn_interface": "flash-attn-3",
}


class FlashDouble:
    """torch's registry of flash-attention kernels, on a device of sm_90.

    events: activations and what ran meanwhile. active: the name of other kernels than torch's.
    """

    def __init__(self, patch: pytest.MonkeyPatch, broken: dict[str, BaseException]) -> None:
        self.events: list[str] = []
        self.active: str | None = None
        self.broken, self.capability = broken, (9, 0)
        attention: Any = torch.nn.attention
        patch.setattr(attention, "activate_flash_attention_impl", self.activate)
        patch.setattr(attention, "restore_flash_attention_impl", self.restore)
        patch.setattr(attention, "current_flash_attention_impl", lambda: self.active)
        patch.setattr(torch.cuda, "get_device_capability", lambda _device: self.capability)
        patch.setattr(flash_attention, "compare_attention", self.compare)

    def activate(self, name: str) -> None:
        if name in self.broken:
            raise self.broken[name]
        self.active = name
        self.events.append(name)

    def restore(self) -> None:
        self.active = None
        self.events.append("torch's")

    def compare(self, _device: torch.device) -> None:
        self.events.append(f"compared with {self.active}")
        if "results" in self.broken:
            raise self.broken["results"]


class Machine:
    """Packages installed on a pretended GPU machine, and which imports fail."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.installed = patch, set[str]()
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
        self.flash = FlashDouble(patch, self.broken)

    def without_triton(self) -> None:
        missing = Finding("triton", None, "", "", "not installed")
        self.patch.setattr(accelerators, "_triton", lambda _device: missing)

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
    assert found == Accelerators("torch", False, False, None)


def test_nothing_installed(machine: Machine) -> None:
    found = detect(EngineConfig(), CUDA)
    assert found.accelerators == Accelerators(mamba2="triton")
    assert machine.imported == []
    assert finding(found, "fla-core").limitation == "not installed"


def test_everything_installed(machine: Machine) -> None:
    machine.installed = set(PACKAGES)
    found = detect(EngineConfig(), CUDA)
    assert found.accelerators == Accelerators("transformer_engine", True, True, "triton", 3)
    assert "fla" not in machine.imported
    row = finding(found, "fla-core")
    assert (row.version, row.instead) == ("9.9.9", "our Triton kernels")
    assert row.limitation == "they are preferred: --engine.fla on"
    found = detect(EngineConfig(fla="on"), CUDA)
    assert found.accelerators.mamba2 == "fla"
    assert finding(found, "fla-core").used
    assert "preferred" in finding(found, "apex Adam").limitation


def test_apex_alone_gives_its_adam(machine: Machine) -> None:
    machine.installed = {"apex"}
    found = detect(EngineConfig(apex="on"), CUDA)
    assert found.accelerators == Accelerators("apex", False, True, "triton")


def test_off_does_not_even_import(machine: Machine) -> None:
    machine.installed = set(PACKAGES)
    engine = EngineConfig(transformer_engine="off", flash_attention_3="off", apex="off", fla="off")
    found = detect(engine, CUDA)
    assert found.accelerators == Accelerators(mamba2="triton")
    assert machine.flash.events == []
    assert machine.imported == []
    assert finding(found, "fla-core").limitation == "switched off"


def test_a_cpu_run_uses_none(machine: Machine) -> None:
    machine.installed = set(PACKAGES)
    found = detect(EngineConfig(), CPU)
    assert found.accelerators == Accelerators()
    assert machine.imported == []
    assert "needs a CUDA device" in finding(found, "fla-core").limitation


def test_fp8_experts(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineConfig(experts="fp8")
    assert finding(detect(EngineConfig(), CUDA), "FP8 experts").limitation == "switched off"
    assert finding(detect(engine, CPU), "FP8 experts").version == "reference arithmetic in torch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert finding(detect(engine, CUDA), "FP8 experts").used
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 0))
    with pytest.raises(AcceleratorError, match=r"experts is fp8, but .* \(8, 0\): set --engine"):
        detect(engine, CUDA)


def test_fp8_linears(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineConfig(linears="fp8")
    with pytest.raises(AcceleratorError, match="linears is fp8, but not installed: set --engine"):
        detect(engine, CUDA)
    machine.installed = {"transformer_engine"}
    with pytest.raises(AcceleratorError, match="no Float8BlockScaling: install"):
        detect(engine, CUDA)
    recipes: Any = ModuleType("transformer_engine.common.recipe")
    recipes.Float8BlockScaling = object
    load = importlib.import_module
    provider = ModuleType(TE_LINEARS)
    known = {TE_LINEARS: provider, recipes.__name__: recipes}
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *rest: known.get(name) or load(name)
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 0))
    assert detect(engine, CUDA).accelerators.te_linears
    assert not detect(EngineConfig(), CUDA).accelerators.te_linears
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    with pytest.raises(AcceleratorError, match=r"needs compute capability 9\.0, .* \(8, 9\)"):
        detect(engine, CUDA)
    with pytest.raises(AcceleratorError, match="linears is fp8, but it needs a CUDA device"):
        detect(engine, CPU)


def test_user_buffers(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = EngineConfig(overlap_tensor_parallel=True)
    with pytest.raises(AcceleratorError, match="parallel is True, but not installed: set --engine"):
        detect(engine, CUDA)
    machine.installed = {"transformer_engine"}
    te: Any = ModuleType("transformer_engine.pytorch")
    load = importlib.import_module
    known = {TE_LINEARS: ModuleType(TE_LINEARS), te.__name__: te}
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *rest: known.get(name) or load(name)
    )
    with pytest.raises(AcceleratorError, match=r"its user buffers need MPI: install 1\.9"):
        detect(engine, CUDA)
    te.initialize_ub = lambda shape, tp_size, bootstrap_backend: None
    assert detect(engine, CUDA).accelerators.te_overlap
    assert finding(detect(engine, CUDA), "Transformer Engine user buffers").used
    assert not detect(EngineConfig(), CUDA).accelerators.te_overlap
    with pytest.raises(AcceleratorError, match="parallel is True, but it needs a CUDA device"):
        detect(engine, CPU)


def test_moments_in_bf16_choose_the_adam(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformer Engine's if it takes them, and never apex's."""
    machine.installed = {"transformer_engine", "apex"}
    optimizers: Any = ModuleType(FUSED_ADAMS["transformer_engine"])
    load = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name, *rest: optimizers if name == optimizers.__name__ else load(name),
    )
    monkeypatch.setattr(torch, "zeros", lambda *_size, device: torch.empty(1))

    def fused_adam(_parameters: Any, exp_avg_dtype: Any, exp_avg_sq_dtype: Any) -> None:
        assert exp_avg_dtype == exp_avg_sq_dtype == torch.bfloat16

    optimizers.FusedAdam = fused_adam
    assert detect(EngineConfig(), CUDA, moments="bf16").accelerators.adam == "transformer_engine"
    optimizers.FusedAdam = lambda _parameters: None
    assert detect(EngineConfig(), CUDA).accelerators.adam == "transformer_engine"
    found = detect(EngineConfig(), CUDA, moments="bf16")
    assert found.accelerators.adam == "torch"
    assert "no moments in bf16" in finding(found, "Transformer Engine Adam").limitation
    assert finding(found, "apex Adam").limitation == "its moments are fp32"
    with pytest.raises(AcceleratorError, match="apex Adam is set to on, but its moments are fp32"):
        detect(EngineConfig(apex="on"), CUDA, moments="bf16")


@pytest.mark.parametrize(
    "error",
    [
        ImportError("libcudart.so.12: cannot open shared object file"),
        OSError("undefined symbol: _ZN2at"),
        RuntimeError("its scan differs from ours by 3.0e-01"),
        AttributeError("module has no attribute"),
    ],
)
def test_a_broken_package_is_rejected_with_its_reason(
    machine: Machine, error: BaseException
) -> None:
    machine.installed = {"fla", "apex"}
    machine.broken = {"fla": error, "fused_weight_gradient_mlp_cuda": error}
    machine.without_triton()
    found = detect(EngineConfig(), CUDA)
    assert found.accelerators == Accelerators("apex", False, False, "torch")
    reason = finding(found, "fla-core").limitation
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
    machine.without_triton()
    found = detect(EngineConfig(), CUDA)
    assert found.accelerators.mamba2 == "fla"
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
    assert len(names) == len(set(names)) == 17
    assert finding(found, "CUDA device").used == torch.cuda.is_available()


def test_flash_attention_3_is_checked_and_left_to_the_model(machine: Machine) -> None:
    machine.installed = {"flash_attn_interface"}
    found = detect(EngineConfig(), CUDA)
    assert found.accelerators.flash_attention == 3
    assert machine.flash.events == ["FA3", "compared with FA3", "torch's"]
    flash_attention.use_flash_attention(3)
    flash_attention.use_flash_attention(3)
    assert machine.flash.active == "FA3"
    assert machine.flash.events[3:] == ["FA3"]
    count_parameters(tiny())
    assert machine.flash.active == "FA3", "a model that only counts has no kernels"
    flash_attention.use_flash_attention(2)
    assert machine.flash.active is None


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("FA3", "ModuleNotFoundError: no kernels"),
        ("results", "RuntimeError: its output errs"),
        ("device", "it needs sm_90, and the device is sm_100"),
    ],
)
def test_flash_attention_2_remains_with_the_reason(
    name: str, reason: str, machine: Machine
) -> None:
    machine.installed = {"flash_attn_interface"}
    errors = {
        "FA3": ModuleNotFoundError("no kernels"), "results": RuntimeError("its output errs by 1")
    }  # fmt: skip
    machine.flash.broken = {key: error for key, error in errors.items() if key == name}
    if name == "device":
        machine.flash.capability = (10, 0)
    found = detect(EngineConfig(), CUDA)
    assert found.accelerators.flash_attention == 2
    row = next(line for line in found.table().splitlines() if line.startswith("FlashAttention-3"))
    assert (
        f"torch's FlashAttention-2 ({'RuntimeError: ' if name == 'device' else ''}{reason}" in row
    )
    assert machine.flash.active is None
    with pytest.raises(AcceleratorError, match=r"FlashAttention-3 is set to on, but .*set it to"):
        detect(EngineConfig(flash_attention_3="on"), CUDA)


def test_the_comparison_finds_wrong_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_attention.compare_attention(CPU)
    own = attention_core.packed_attention
    monkeypatch.setattr(
        flash_attention, "packed_attention", lambda q, k, v, packed: own(q, k, v.roll(1, 0), packed)
    )
    with pytest.raises(RuntimeError, match="its output errs by"):
        flash_attention.compare_attention(CPU)
    monkeypatch.setattr(
        flash_attention,
        "packed_attention",
        lambda q, k, v, packed: own(q, k.detach() + 0 * k, v, packed),
    )
    with pytest.raises(RuntimeError, match="its gradient of k errs"):
        flash_attention.compare_attention(CPU)
