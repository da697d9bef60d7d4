"""The cases of `predict.py`: ops at the shapes of their goals, and their peers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from benchmarks.kernels.estimate import NO_WORK, Work
from benchmarks.kernels.predict_calls import (
    CACHED,
    EXPERTS,
    HIDDEN,
    MIXER,
    SHARED_WIDTH,
    SLOTS,
    TOKENS,
    TOP_K,
    VOCABULARY,
    WIDTH,
    Mark,
    decode_attention,
    decode_mixer,
    decode_mixture,
    decode_sample,
    distill,
    experts,
    head,
    mixer,
    mopd,
    router,
)

#: Rows of a tile and of a chunk of Mamba-2's kernels on Hopper.
TILE, CHUNK = 64, 256


@dataclass(frozen=True)
class Case:
    """One call. flops, bytes: its work by definition, for rates; of a linear head the FLOPs of the
    bare products. work: of its own kernels of products; kernels: of those with work of their own,
    by name. phase: "forward", "backward" or "both". outputs: bytes of results, which are no extra
    memory."""

    name: str
    call: Callable[[Mark], object]
    flops: float = 0.0
    bytes: int = 0
    work: Work = NO_WORK
    kernels: Mapping[str, Work] = field(default_factory=dict)
    phase: str = "both"
    outputs: int = 0


def mixer_work(tokens: int) -> dict[str, Work]:
    """Work of Mamba-2's kernels of products, by name: FLOPs of their innermost loops, and depths
    of as many tiles as these have passes."""
    heads, dim, _, state = MIXER
    passes = (CHUNK // TILE + 1) / 2
    pairs = 2.0 * tokens * heads * TILE * passes
    depth = int(passes * TILE)
    scan = Work(pairs * (state + dim), depth)
    return {
        "states_kernel": Work(2.0 * tokens * heads * dim * state, CHUNK),
        "scan_kernel": scan,
        "gate_gradient_kernel": scan,
        "shared_gradient_kernel": scan,
        "x_gradient_kernel": Work(pairs * (state + 2 * dim), depth),
    }


def _heads() -> list[Case]:
    t, h, v = 8192, 4096, VOCABULARY
    product = 2.0 * t * h * v
    size = f"{t}/{h}/{v}"
    whole = functools.partial(head, t, h, v)
    return [
        Case(f"linear_logprob forward {size}", functools.partial(whole, None), product),
        Case(f"linear_policy_loss {size}", functools.partial(whole, t), 3 * product),
        Case(
            f"linear_policy_loss {size}, a quarter trained",
            functools.partial(whole, t // 4),
            3 * product,
        ),
        Case(
            f"linear_policy_loss {TOKENS}/{h}/{v}",
            functools.partial(head, TOKENS, h, v, TOKENS),
            3 * product * TOKENS / t,
            # The gradient of the hidden states.
            outputs=2 * TOKENS * h,
        ),
        Case(
            f"linear_distill_loss reverse_kl {size}",
            functools.partial(distill, t, h, v),
            4 * product,
        ),
    ]


def _routers() -> list[Case]:
    # Logits are read; weights, ids, positions and order are written: 4 bytes each.
    return [
        Case(
            f"moe_router forward {tokens} x {count}",
            functools.partial(router, tokens, count, top_k),
            bytes=4 * tokens * (count + 4 * top_k),
            kernels={"route_kernel": Work(rows=tokens, passes=top_k)},
        )
        for tokens, count, top_k in ((8192, 512, 10), (65_536, 128, 6))
    ]


def _experts() -> list[Case]:
    made = []
    models = {
        "qwen3": (8192, 128, 8, 2048, 768, "swiglu"),
        "nemotron": (32_768, EXPERTS, TOP_K, HIDDEN, WIDTH, "relu2"),
    }
    for name, sizes in models.items():
        tokens, _, top_k, hidden, width, activation = sizes
        flops = 2.0 * tokens * top_k * hidden * width * (3 if activation == "swiglu" else 2)
        depth = (hidden + width) // 2
        ours, peer = (functools.partial(experts, *sizes, peer) for peer in (False, True))
        for phase, factor in (("forward", 1), ("backward", 2)):
            label = f"moe_experts {name} T {tokens} {phase}"
            work = Work(factor * flops, depth)
            made.append(Case(label, ours, factor * flops, work=work, phase=phase))
        label = f"moe_experts {name} T {tokens}"
        made.append(Case(label, ours, 3 * flops, work=Work(3 * flops, depth)))
        made.append(Case(f"{label}, torch's grouped_mm", peer, 3 * flops))
    return made


def _decoding() -> list[Case]:
    heads, dim, _, state = MIXER
    choices = functools.partial(Case, call=decode_mixture)
    cached = 4 * 128 * SLOTS * CACHED
    return [
        # A tensor-parallel rank of two: one head of keys and values, 512 bytes a token.
        Case(
            f"decode_step attention tp2 {SLOTS} x {CACHED}",
            functools.partial(decode_attention, 16, 1, 128),
            bytes=cached,
        ),
        Case(f"decode_step mamba {SLOTS}", decode_mixer, bytes=8 * SLOTS * heads * dim * state),
        choices(f"decode_step norm + router {SLOTS}", phase="forward"),
        choices(
            f"decode_step experts {SLOTS}",
            bytes=4 * HIDDEN * (EXPERTS * WIDTH + SHARED_WIDTH),
            phase="backward",
        ),
        Case(f"decode_step sample {SLOTS} x {VOCABULARY}", decode_sample),
    ]


def _cases() -> list[Case]:
    mixers = [
        Case(
            f"mamba2 {phase} T {TOKENS}",
            functools.partial(mixer, TOKENS),
            kernels=mixer_work(TOKENS),
            phase=phase,
        )
        for phase in ("forward", "backward")
    ]
    name = f"mopd_advantage metrics {TOKENS}"
    advantages = [
        Case(name, functools.partial(mopd, TOKENS, False)),
        Case(f"{name}, a chain of torch", functools.partial(mopd, TOKENS, True)),
    ]
    return [*_heads(), *advantages, *_routers(), *_experts(), *mixers, *_decoding()]


CASES = {case.name: case for case in _cases()}
