"""mamba2, forward and backward over packed documents, beside torch's chunks and other kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from nemocascade_kernels import PackedSeq, mamba2
from nemocascade_kernels.mamba2.arguments import Inputs
from nemocascade_kernels.mamba2.op import OP
from nemocascade_kernels.testing import random_normal
from torch import Tensor

from benchmarks.measure import Case, Goal, Row, Unavailable

TORCH = "chunks in torch"
WINDOW = 4


@dataclass(frozen=True)
class Shape:
    """T tokens in documents of one length, h heads of p, g groups, n state."""

    tokens: int
    document: int
    heads: int
    head_dim: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        return self.inner + 2 * self.groups * self.state


# The tiny and a small model; the mixer of Nemotron 3 Nano.
CPU = (Shape(8192, 512, 8, 32, 2, 32), Shape(8192, 2048, 16, 64, 4, 64))
GPU = (Shape(8192, 2048, 64, 64, 8, 128), Shape(131_072, 16_384, 64, 64, 8, 128))

# The output of the seven tensors.
Mixer = Callable[[list[Tensor]], Tensor]


def cases(suite: str, device: torch.device, tiny: bool) -> list[Case]:
    """Each shape forward alone, and with its backward."""
    shapes = (Shape(96, 40, 2, 8, 1, 8),) if tiny else {"cpu": CPU, "gpu": GPU}[suite]
    dtype = torch.float32 if suite == "cpu" else torch.bfloat16
    return [case(device, shape, dtype, training) for shape in shapes for training in (False, True)]


def case(device: torch.device, shape: Shape, dtype: torch.dtype, training: bool) -> Case:
    inputs = make_inputs(shape, dtype, device)
    upstream = random_normal(shape.tokens, shape.inner, seed=8, dtype=dtype, device=device)
    cu_seqlens = [*range(0, shape.tokens, shape.document), shape.tokens]
    packed = PackedSeq.from_cu_seqlens(cu_seqlens, device)

    def prepare(load: Callable[[], Mixer]) -> Callable[[], Callable[[], Tensor]]:
        def make() -> Callable[[], Tensor]:
            mix = load()
            leaves = [t.clone().requires_grad_(training) for t in inputs]

            def call() -> Tensor:
                out = mix(leaves)
                if training:
                    torch.autograd.grad(out, leaves, upstream)
                return out.detach()

            return call

        return make

    def ours(backend: str | None) -> Callable[[], Mixer]:
        def load() -> Mixer:
            reason = backend and OP.limitation(inputs[0], backend=backend)
            if reason:
                raise Unavailable(reason)
            return lambda leaves: mamba2(
                *Inputs(*leaves), packed, heads=shape.heads, head_dim=shape.head_dim,
                groups=shape.groups, state=shape.state, backend=backend,
            )[0]  # fmt: skip

        return load

    what = "forward and backward" if training else "forward"
    settings = {
        "T": shape.tokens, "document": shape.document, "h": shape.heads, "p": shape.head_dim,
        "g": shape.groups, "n": shape.state, "K": WINDOW, "dtype": str(dtype).split(".")[1],
    }  # fmt: skip
    return Case(
        f"{what}, T {shape.tokens}, h {shape.heads} x {shape.head_dim}",
        settings,
        [
            Row("ours", "ours", prepare(ours(None))),
            Row(TORCH, "peer", prepare(ours("torch"))),
            Row("fla-core", "peer", prepare(ours("fla"))),
            Row("mamba-ssm", "peer", prepare(lambda: load_mamba_ssm(shape, packed))),
        ],
        [Goal("not slower than torch", "ours", 1.0, TORCH)],
    )


def make_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """The seven tensors of `mamba2`; dt_bias, A and D are float32."""
    heads, channels = shape.heads, shape.channels
    tensors = [
        random_normal(shape.tokens, shape.inner + channels + heads, seed=1, dtype=dtype),
        random_normal(channels, WINDOW, seed=2, dtype=dtype, scale=0.5),
        random_normal(channels, seed=3, dtype=dtype, scale=0.25),
        random_normal(heads, seed=4) - 4,
        -random_normal(heads, seed=5).exp(),
        random_normal(heads, seed=6),
        random_normal(shape.inner, seed=7, dtype=dtype),
    ]
    return [t.to(device) for t in tensors]


def load_mamba_ssm(shape: Shape, packed: PackedSeq) -> Mixer:
    try:
        from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined
    except ImportError as error:
        raise Unavailable(f"mamba-ssm is not installed: {error}") from error
    document = packed.document_of().int()[None].to(packed.device)

    def mix(leaves: list[Tensor]) -> Tensor:
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight = leaves
        out: Tensor = mamba_split_conv1d_scan_combined(
            zxbcdt[None], conv_weight, conv_bias, dt_bias, A, D, chunk_size=256,
            seq_idx=document, rmsnorm_weight=norm_weight, rmsnorm_eps=1e-5,
            headdim=shape.head_dim, ngroups=shape.groups, norm_before_gate=False,
        )  # fmt: skip
        return out[0]

    return mix
