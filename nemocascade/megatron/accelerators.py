"""Detection of optional packages and libraries that make a run faster, and of their fallbacks.

Nothing here is required. A package is imported only if its setting allows it. A broken one is
reported with its reason; it stops the run only if its setting is "on".
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from nemocascade_kernels import backends
from nemocascade_kernels import native as kernel_library
from nemocascade_kernels.common import products
from nemocascade_kernels.moe_experts.op import fp8_limitation

from nemocascade.megatron.config import Accelerators, Adam
from nemocascade.megatron.layers.flash_attention import FLASH_ATTENTION_3, check_flash_attention_3
from nemocascade.megatron.layers.linear import APEX_WEIGHT_GRADIENT, TE_LINEARS
from nemocascade.megatron.optimizer import FUSED_ADAMS, MOMENTS
from nemocascade.megatron.user_buffers import check_user_buffers
from nemocascade.megatron.workspace import MixerBackend
from nemocascade.recipe import EngineConfig, UserError
from nemocascade.recipe.train import Moments
from nemocascade.runtime import native


class AcceleratorError(UserError, RuntimeError):
    """An accelerator whose setting is "on" is unavailable; the message lists all of them."""


@dataclass(frozen=True)
class Finding:
    """The result for one accelerator: a line of the table.

    version: None if it is not installed. limitation: why it is unavailable; empty if it is used.
    purpose: where it is used. instead: the fallback.
    """

    name: str
    version: str | None
    purpose: str
    instead: str
    limitation: str = ""

    @property
    def used(self) -> bool:
        return not self.limitation


@dataclass(frozen=True)
class Detection:
    """Result of `detect`. accelerators: those to be used. findings: the lines of `table`."""

    accelerators: Accelerators
    findings: tuple[Finding, ...]

    def table(self) -> str:
        """An aligned table with a line for each finding: where it is used, and its fallback."""
        rows = [("accelerator", "found", "used for", "runs instead")]
        for f in self.findings:
            found = f.version or "no"
            rows.append(
                (f.name, found, f.purpose, "-")
                if f.used
                else (f.name, found, "-", f"{f.instead} ({f.limitation})")
            )
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        )


def detect(engine: EngineConfig, device: torch.device, *, moments: Moments = "fp32") -> Detection:
    """Check every accelerator once and select those to be used by the settings of `engine`.

    moments: precision of AdamW's moments.

    Raises AcceleratorError naming every unavailable package whose setting is "on".
    """
    adam_te, adam_apex = _adams(engine, device, moments)
    te_attention = _examine(_TE_ATTENTION, engine.transformer_engine, device)
    gradient = _examine(_APEX_GRADIENT, engine.apex, device)
    experts = _fp8_experts(engine, device)
    asked = engine.transformer_engine if engine.linears == "fp8" else "off"
    linears = _examine(_TE_LINEARS, asked, device)
    asked = engine.transformer_engine if engine.overlap_tensor_parallel else "off"
    overlap = _examine(_TE_OVERLAP, asked, device)
    flash = _examine(_FLASH_3, engine.flash_attention_3, device)
    triton = _triton(device)
    fla = _fla(engine, device, triton)
    reasons = _missing(
        (engine.transformer_engine, (adam_te, te_attention)),
        (engine.apex, (adam_apex, gradient)),
        (engine.fla, (fla,)),
        (engine.flash_attention_3, (flash,)),
    )
    reasons += _missing_modes(engine, experts, linears, overlap)
    if reasons:
        raise AcceleratorError("; ".join(reasons))
    adam: Adam = "transformer_engine" if adam_te.used else "apex" if adam_apex.used else "torch"
    return Detection(
        Accelerators(
            adam=adam,
            te_attention=te_attention.used,
            fused_weight_gradient=gradient.used,
            te_linears=linears.used,
            te_overlap=overlap.used,
            mamba2=_mixer(device, fla, triton),
            flash_attention=3 if flash.used else 2,
        ),
        findings=(
            _device(device),
            _bf16(device),
            *(_bf16_products(kind, engine, device) for kind in products.WAYS),
            triton,
            *(_native(*library) for library in _NATIVE),
            _native_layers(device),
            adam_te,
            te_attention,
            flash,
            adam_apex,
            gradient,
            fla,
            experts,
            linears,
            overlap,
        ),
    )


def _adams(engine: EngineConfig, device: torch.device, moments: Moments) -> tuple[Finding, Finding]:
    """The fused AdamW of Transformer Engine and that of apex; at most one of them is used."""
    te = _examine(_TE_ADAM, engine.transformer_engine, device)
    apex = _examine(_APEX_ADAM, engine.apex, device)
    if moments == "bf16":
        te = _with_bf16_moments(te, device)
        if apex.used:
            apex = replace(apex, limitation="its moments are fp32")
    if te.used and apex.used:
        apex = _unavailable(_APEX_ADAM, apex.version, "Transformer Engine's is preferred")
    return te, apex


def _fla(engine: EngineConfig, device: torch.device, triton: Finding) -> Finding:
    """fla-core; where our Triton kernels run, it is not even imported, unless it is "on"."""
    if device.type != "cuda" or not triton.used or engine.fla != "auto":
        return _examine(_FLA, engine.fla, device)
    version = _version(_FLA.distributions) if _installed(_FLA.module) else None
    reason = "they are preferred: --engine.fla on" if version else "not installed"
    return Finding(_FLA.name, version, _FLA.purpose, "our Triton kernels", reason)


def _mixer(device: torch.device, fla: Finding, triton: Finding) -> MixerBackend | None:
    """The Mamba-2 mixer on a GPU; None elsewhere."""
    if device.type != "cuda":
        return None
    return "fla" if fla.used else "triton" if triton.used else "torch"


def _missing(*settings: tuple[str, Sequence[Finding]]) -> list[str]:
    """The reason why packages that are set to "on" are not used. settings: with the findings that
    each of them decides."""
    demanded = [f for setting, found in settings if setting == "on" for f in found]
    broken = [f for f in demanded if not f.used and "preferred" not in f.limitation]
    if not broken:
        return []
    named = "; ".join(f"{f.name} is set to on, but {f.limitation}" for f in broken)
    return [f"{named}: install it, or set it to auto or off"]


def _missing_modes(
    engine: EngineConfig, experts: Finding, linears: Finding, overlap: Finding
) -> list[str]:
    """Reasons why modes that the settings ask for cannot be used."""
    reasons = [
        f"engine.{name} is fp8, but {f.limitation}: set --engine.{name} bf16"
        for name, setting, f in (
            ("experts", engine.experts, experts),
            ("linears", engine.linears, linears),
        )
        if setting == "fp8" and not f.used
    ]
    if engine.overlap_tensor_parallel and not overlap.used:
        reasons.append(
            f"engine.overlap_tensor_parallel is True, but {overlap.limitation}: set "
            "--engine.overlap-tensor-parallel False"
        )
    return reasons


@dataclass(frozen=True)
class _Package:
    """An optional package. `check` raises if it does not work."""

    name: str
    module: str
    distributions: tuple[str, ...]
    purpose: str
    instead: str
    check: Callable[[torch.device], object]


def fla_limitation(engine: EngineConfig, device: torch.device) -> str:
    """Reason why fla-core cannot replace our Triton kernels; empty if it can."""
    return _examine(_FLA, engine.fla, device).limitation


def _check_fla(_device: torch.device) -> None:
    """Only its version: `warm_up` checks its results for the shapes of the run's model."""
    from nemocascade_kernels.mamba2.fla_check import check_version

    check_version()


def _with_bf16_moments(adam: Finding, device: torch.device) -> Finding:
    """Transformer Engine's Adam as found, or unavailable if it has no moments in bf16."""
    if not adam.used:
        return adam
    kind = importlib.import_module(FUSED_ADAMS["transformer_engine"]).FusedAdam
    dtype = MOMENTS["bf16"]
    try:
        parameter = torch.nn.Parameter(torch.zeros(1, device=device))
        kind([parameter], exp_avg_dtype=dtype, exp_avg_sq_dtype=dtype)
    except Exception as error:  # an older version may reject the dtype, or not know the argument
        return replace(adam, limitation=f"no moments in bf16: {_reason(error)}")
    return adam


def _check_te_linears(device: torch.device) -> None:
    """Megatron's linears of Transformer Engine, its blockwise recipe, and a device that has it."""
    importlib.import_module(TE_LINEARS)
    recipes = importlib.import_module("transformer_engine.common.recipe")
    if not hasattr(recipes, "Float8BlockScaling"):
        raise RuntimeError("its recipes have no Float8BlockScaling: install 2.3 or newer")
    if (capability := torch.cuda.get_device_capability(device)) < (9, 0):
        raise RuntimeError(f"it needs compute capability 9.0, and the device has {capability}")


def _check_te_overlap(_device: torch.device) -> None:
    """Megatron's linears of Transformer Engine, and its user buffers."""
    importlib.import_module(TE_LINEARS)
    check_user_buffers()


def _import(*names: str) -> Callable[[torch.device], object]:
    return lambda _device: [importlib.import_module(name) for name in names]


_TE_ADAM = _Package(
    "Transformer Engine Adam",
    "transformer_engine",
    ("transformer-engine", "transformer_engine"),
    "optimizer step",
    "apex's or torch's Adam",
    _import(FUSED_ADAMS["transformer_engine"]),
)
_TE_ATTENTION = _Package(
    "Transformer Engine attention",
    "transformer_engine",
    ("transformer-engine", "transformer_engine"),
    "packed attention",
    "torch's variable-length attention",
    _import("transformer_engine.pytorch.attention"),
)
_TE_LINEARS = _Package(
    "Transformer Engine linears",
    "transformer_engine",
    ("transformer-engine", "transformer_engine"),
    "linear layers in FP8",
    "Megatron's linear layers",
    _check_te_linears,
)
_TE_OVERLAP = _Package(
    "Transformer Engine user buffers",
    "transformer_engine",
    ("transformer-engine", "transformer_engine"),
    "linear layers beside tensor-parallel communication",
    "linear layers between collectives",
    _check_te_overlap,
)
_FLASH_3 = _Package(
    "FlashAttention-3",
    FLASH_ATTENTION_3,
    ("flash-attn-3", "flash_attn_3"),
    "packed attention, behind Transformer Engine's",
    "torch's FlashAttention-2",
    check_flash_attention_3,
)
_APEX_ADAM = _Package(
    "apex Adam",
    "apex",
    ("apex",),
    "optimizer step",
    "torch's AdamW",
    _import(FUSED_ADAMS["apex"], "amp_C"),
)
_APEX_GRADIENT = _Package(
    "apex weight gradient",
    "apex",
    ("apex",),
    "accumulation of weight gradients in the GEMM",
    "torch's GEMM with accumulation",
    _import(APEX_WEIGHT_GRADIENT),
)
_FLA = _Package(
    "fla-core",
    "fla",
    ("fla-core", "flash-linear-attention"),
    "Mamba-2 scan and convolution",
    "the scan and convolution in torch",
    _check_fla,
)
_NATIVE = (
    ("nemocascade", native.limitation, "packing planner", "nothing: data cannot be packed"),
    (
        "nemocascade_kernels",
        kernel_library.limitation,
        "compiled kernels",
        "Triton or torch operators",
    ),
)


def _unavailable(package: _Package, version: str | None, reason: str) -> Finding:
    return Finding(package.name, version, package.purpose, package.instead, reason)


def _examine(package: _Package, setting: str, device: torch.device) -> Finding:
    """Check that `package` is installed, allowed, and works on `device`."""
    if not _installed(package.module):
        return _unavailable(package, None, "not installed")
    version = _version(package.distributions)
    if setting == "off":
        return _unavailable(package, version, "switched off")
    if device.type != "cuda":
        return _unavailable(
            package, version, f"it needs a CUDA device, the run is on {device.type}"
        )
    try:
        package.check(device)
    except Exception as error:  # a broken build may raise anything; its reason is shown
        return _unavailable(package, version, _reason(error))
    return Finding(package.name, version, package.purpose, package.instead)


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "unknown version"


def _device(device: torch.device) -> Finding:
    if device.type != "cuda":
        return Finding(
            "CUDA device",
            None,
            "the model",
            f"the CPU with {torch.get_num_threads()} threads",
            "the run is on the CPU" if torch.cuda.is_available() else "torch finds none",
        )
    p = torch.cuda.get_device_properties(device)
    found = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    return Finding("CUDA device", found, "the model", "the CPU")


def _bf16(device: torch.device) -> Finding:
    name, instead = "bf16 matrix units", "emulation by torch: bf16 is slower than fp32"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return Finding(name, "yes", "bf16 matrix products", instead)
        return Finding(name, None, "bf16 matrix products", instead, "needs sm_80 or newer")
    for capability in ("amx_bf16", "avx512_bf16"):
        if torch.cpu.get_capabilities().get(capability):
            return Finding(name, capability, "bf16 matrix products", instead)
    return Finding(name, None, "bf16 matrix products", instead, "this CPU has none")


def _bf16_products(kind: str, engine: EngineConfig, device: torch.device) -> Finding:
    """The way of bf16 sums or products, which `settle_products` chose."""
    name = f"bf16 {kind}"
    purpose = {"sums": "weight gradients in fp32", "products": "linear heads"}[kind]
    if device.type != "cpu" or engine.precision != "bf16":
        reason = (
            f"its choice is for CPUs in bf16, the run is on {device.type} in {engine.precision}"
        )
        return Finding(name, None, purpose, "torch's products", reason)
    chosen = products.choice(kind)
    times = [f"{way} {1e3 * s:.1f} ms" for way, s in chosen.seconds.items() if s is not None]
    return Finding(name, chosen.way, f"{purpose} ({', '.join([*times, chosen.source])})", "-")


def _triton(device: torch.device) -> Finding:
    name, purpose, instead = "triton", "our Triton kernels", "torch operators"
    try:
        version = importlib.import_module("triton").__version__
    except Exception as error:  # a broken build may raise anything; its reason is shown
        missing = not _installed("triton")
        reason = "not installed" if missing else _reason(error)
        return Finding(name, None, purpose, instead, reason)
    if device.type != "cuda":
        return Finding(name, version, purpose, instead, "the run is on the CPU")
    if torch.cuda.get_device_capability(device) < (8, 0):
        return Finding(name, version, purpose, instead, "needs sm_80 or newer")
    return Finding(name, version, purpose, instead)


def _fp8_experts(engine: EngineConfig, device: torch.device) -> Finding:
    """The FP8 products of the routed experts: kernels on a GPU, their definition on a CPU."""
    name, purpose, instead = "FP8 experts", "routed experts", "products in the run's precision"
    if engine.experts == "bf16":
        return Finding(name, None, purpose, instead, "switched off")
    if device.type != "cuda":
        return Finding(name, "reference arithmetic in torch", purpose, instead)
    capability = torch.cuda.get_device_capability(device)
    if reason := fp8_limitation(capability):
        return Finding(name, None, purpose, instead, reason)
    return Finding(name, "Triton", purpose, instead)


def _native(
    package: str, limitation: Callable[[], str | None], purpose: str, instead: str
) -> Finding:
    """The library that setup.py builds from csrc/ for `package`."""
    name = f"{package}/_native.so"
    if reason := limitation():
        return Finding(name, None, purpose, instead, reason)
    try:
        ops = getattr(torch.ops, package)
        cuda, reason = ops.cuda_built(), ops.cuda_unavailable_reason()
    except Exception as error:  # a library of another version may fail in any way
        return Finding(name, "built", purpose, instead, _reason(error))
    return Finding(name, f"CUDA {cuda}" if cuda else f"CPU only ({reason})", purpose, instead)


def _native_layers(device: torch.device) -> Finding:
    """The C++ layers for CPUs: RMSNorm, and the Mamba-2 mixer between its projections."""
    name, purpose = "native layers", "Mamba-2 between its projections, RMSNorm; fp32 and bf16"
    instead = "torch operators"
    if device.type != "cpu":
        return Finding(
            name, None, purpose, instead, f"they are for CPUs, the run is on {device.type}"
        )
    ops, probe = backends.ops(), torch.empty(0)
    reasons = (ops[op].limitation(probe, backend="native") for op in ("mamba2", "rms_norm"))
    reason = next(filter(None, reasons), None)
    return Finding(name, None if reason else "built", purpose, instead, reason or "")
