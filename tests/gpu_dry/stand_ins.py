"""Stand-ins of packages that must be built: enough for Megatron-Core and for us to import them.

A name that a stand-in does not define is a class without weights, or a submodule. Adam, linears,
multi-tensor functions and attention answer as the package's would, by torch's operators.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch


class _Module(ModuleType):
    """A module in which every name is found."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = ANSWERS.get(name)
        if made is None and name[0].islower():
            made = importlib.import_module(f"{self.__name__}.{name}")
        elif made is None:
            made = type(name, (torch.nn.Module,), {})
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds every submodule of one package."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if not name.startswith(self.package + "."):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


def stand_in(module: ModuleType) -> None:
    """Turn a package that is being imported into a stand-in, with all its submodules."""
    module.__class__ = _Module
    sys.meta_path.insert(0, _Finder(module.__name__))


class FusedAdam(torch.optim.AdamW):
    """Adam with the arguments of apex's and Transformer Engine's."""

    def __init__(
        self, params: Any, *, adam_w_mode: bool = True, set_grad_none: Any = None, **kwargs: Any
    ) -> None:
        for extra in ("exp_avg_dtype", "exp_avg_sq_dtype", "master_weights", "bias_correction"):
            kwargs.pop(extra, None)
        super().__init__(params, **kwargs, fused=True)


class DotProductAttention(torch.nn.Module):
    """Attention whose output has the shape of the query."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        super().__init__()

    def forward(self, query: torch.Tensor, key: Any, value: Any, **_kwargs: Any) -> torch.Tensor:
        mixed: torch.Tensor = query * key.sum() * value.sum()
        return mixed.flatten(-2)


def multi_tensor_applier(
    function: Callable[..., Any], flag: Any, lists: Sequence[Any], *args: Any
) -> Any:
    return function(2048 * 32, flag, lists, *args)


def multi_tensor_l2norm(
    _chunk: int, _flag: Any, lists: Sequence[Any], per_tensor: bool = False, *_args: Any
) -> Any:
    norms = torch.stack(torch._foreach_norm(lists[0]))
    return norms.norm().reshape(1), norms if per_tensor else None


def multi_tensor_scale(_chunk: int, _flag: Any, lists: Sequence[Any], scale: Any) -> None:
    torch._foreach_copy_(lists[1], torch._foreach_mul(lists[0], scale))


def wgrad_gemm_accum_fp32(inputs: Any, grad_outputs: Any, main_grad: torch.Tensor) -> None:
    main_grad.add_(1.0)


class Linear(torch.nn.Module):
    """Transformer Engine's linear with Megatron's arguments. recipes: the FP8 recipe of every call;
    None outside of `fp8_autocast`.

    On several ranks it runs within user buffers alone, where no collective of torch moves rows: it
    repeats its own rows, and sums parts of its output, which have the right shapes only.
    """

    recipes: ClassVar[list[Any]] = []

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        tp_size: int,
        bias: bool,
        parallel_mode: str,
        params_dtype: torch.dtype,
        **_kwargs: Any,
    ) -> None:
        super().__init__()
        assert not bias
        self.in_features, self.out_features, self.tp_size = in_features, out_features, tp_size
        self.use_bias, self.parallel_mode = bias, parallel_mode
        self.user_buffers = {k: v for k, v in _kwargs.items() if k.startswith("ub_")}
        shape = out_features // tp_size, in_features
        if parallel_mode == "row":
            shape = out_features, in_features // tp_size
        # On the default device, as Megatron's initial values are: `meta` in the dry run.
        self.weight = torch.nn.Parameter(torch.empty(shape, dtype=params_dtype))

    def forward(self, x: torch.Tensor, is_first_microbatch: bool | None = None) -> torch.Tensor:
        self.recipes.append(_ACTIVE[-1])
        if self.tp_size == 1:
            return torch.nn.functional.linear(x, self.weight)
        assert self.user_buffers["ub_overlap_ag"]
        rows = x.shape[0] * (self.tp_size if self.parallel_mode == "column" else 1)
        assert [rows, *BUFFERS[0]["shape"][1:]] == BUFFERS[0]["shape"]
        if self.parallel_mode == "column":
            return torch.nn.functional.linear(x.repeat(self.tp_size, 1, 1), self.weight)
        parts = torch.nn.functional.linear(x, self.weight).unflatten(0, (self.tp_size, -1))
        out: torch.Tensor = parts.sum(0)
        return out

    def get_extra_state(self) -> torch.Tensor:
        return torch.zeros(1)


_ACTIVE: list[Any] = [None]


@contextlib.contextmanager
def fp8_autocast(*, enabled: bool, fp8_recipe: Any, fp8_group: Any = None) -> Iterator[None]:
    """Note the recipe for `Linear`."""
    _ACTIVE.append(fp8_recipe if enabled else None)
    try:
        yield
    finally:
        # A recomputation ends by an exception where all that backward needs is there.
        _ACTIVE.pop()


BUFFERS: list[dict[str, Any]] = []
"""Arguments of `initialize_ub` of the user buffers that exist."""


def initialize_ub(
    shape: list[int], tp_size: int, quantization_modes: Any = None, bootstrap_backend: str = ""
) -> None:
    """Note the arguments; like the package's, reject buffers that exist."""
    assert not BUFFERS
    BUFFERS.append(locals().copy())


@dataclass(frozen=True)
class Float8BlockScaling:
    """The blockwise recipe."""

    fp8_format: str


ANSWERS: dict[str, Any] = {
    "Linear": Linear,
    "fp8_autocast": fp8_autocast,
    "initialize_ub": initialize_ub,
    "destroy_ub": BUFFERS.clear,
    "UserBufferQuantizationMode": SimpleNamespace(NONE="none", FP8="fp8"),
    "Float8BlockScaling": Float8BlockScaling,
    "Format": SimpleNamespace(E4M3="e4m3", HYBRID="hybrid"),
    "FusedAdam": FusedAdam,
    "DotProductAttention": DotProductAttention,
    "multi_tensor_applier": multi_tensor_applier,
    "multi_tensor_l2norm": multi_tensor_l2norm,
    "multi_tensor_scale": multi_tensor_scale,
    "wgrad_gemm_accum_fp32": wgrad_gemm_accum_fp32,
    "wgrad_gemm_accum_fp16": wgrad_gemm_accum_fp32,
}
