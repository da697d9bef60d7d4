"""The router's CUDA source, run on the CPU by an emulation of blocks and warps, and compiled.

On a GPU the tests of test_moe_router.py run the kernels themselves (backend "cuda").
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import resource
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from nemocascade_kernels import Routing, moe_route
from nemocascade_kernels.moe_router import cuda
from nemocascade_kernels.testing import poison, random_normal
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
EMULATION = Path(__file__).parent / "cuda_emulation"


class Settings(ctypes.Structure):
    """RouterSettings of csrc/common/expert_choice.h"""

    _fields_ = (
        ("experts", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("groups", ctypes.c_int32),
        ("top_groups", ctypes.c_int32),
        ("normalize", ctypes.c_bool),
        ("scale", ctypes.c_float),
    )


class RouteArguments(ctypes.Structure):
    """csrc/moe_router/router_cuda.h, with Sorted's pointers at the end."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("bfloat16", ctypes.c_bool),
        ("softmax", ctypes.c_bool),
        *((name, ctypes.c_void_p) for name in ("bias", "mask", "given", "weights", "experts")),
        ("loads", ctypes.c_void_p),
        ("state", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("settings", Settings),
        *((name, ctypes.c_void_p) for name in ("counts", "order", "offsets", "positions")),
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("emulation") / "moe_router.so"
    command = [
        compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-ffp-contract=off",
        "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas",
        f"-I{EMULATION}", f"-I{ROOT / 'csrc'}", str(EMULATION / "moe_router.cpp"), "-o", str(path),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    found = ctypes.CDLL(str(path))
    for function in (found.scratch, found.choose_bytes, found.state_size):
        function.restype = ctypes.c_int64
    found.scratch.argtypes = (ctypes.c_int64, ctypes.c_int32)
    pointer = ctypes.c_void_p
    found.route_gradient.argtypes = (
        pointer, pointer, ctypes.c_bool, ctypes.c_bool, pointer, pointer, ctypes.c_int64, pointer,
    )  # fmt: skip
    return found


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def settings_of(experts: int, options: dict[str, Any]) -> Settings:
    return Settings(
        experts,
        options["top_k"],
        options.get("num_groups", 1),
        options.get("top_groups", 1),
        options.get("normalize", True),
        options.get("scale", 1.0),
    )


def emulate(
    library: ctypes.CDLL,
    logits: Tensor | None,
    num_experts: int,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    given: Tensor | None = None,
    seed: int = 0,
    **options: Any,
) -> Routing:
    """Run the source on the CPU; `seed` determines the order of threads and blocks."""
    like = logits if logits is not None else given
    assert like is not None
    tokens, top_k = like.shape[0], options["top_k"]
    outputs = {
        "weights": torch.empty(tokens, top_k),
        "experts": torch.empty(tokens, top_k, dtype=torch.int32),
        "counts": torch.empty(num_experts, dtype=torch.int32),
        "order": torch.empty(tokens * top_k, dtype=torch.int32),
        "offsets": torch.empty(num_experts + 1, dtype=torch.int32),
        "positions": torch.empty(tokens, top_k, dtype=torch.int32),
    }
    loads = torch.empty(library.scratch(tokens, num_experts), dtype=torch.int32)
    for tensor in (*outputs.values(), loads):
        poison(tensor)
    given = None if given is None else given.int().contiguous()
    state = torch.zeros(library.state_size(num_experts), dtype=torch.int32)
    arguments = RouteArguments(
        logits=address(logits),
        bfloat16=logits is not None and logits.dtype == torch.bfloat16,
        softmax=options.get("score") == "softmax",
        bias=address(bias),
        mask=address(mask),
        given=address(given),
        loads=address(loads),
        state=address(state),
        tokens=tokens,
        settings=settings_of(num_experts, options),
        **{name: address(tensor) for name, tensor in outputs.items()},
    )
    library.set_seed(seed)
    code = library.route(ctypes.byref(arguments))
    if code:
        raise RuntimeError(f"CUDA error {code}")
    assert not state.any(), "the next launch counts from zeros"
    return Routing(**outputs)


def gradient(
    library: ctypes.CDLL, grad: Tensor, logits: Tensor, experts: Tensor, options: dict[str, Any]
) -> Tensor:
    out = torch.empty_like(logits)
    poison(out)
    settings = settings_of(logits.shape[1], options)
    code = library.route_gradient(
        address(grad), address(logits), logits.dtype == torch.bfloat16,
        options.get("score") == "softmax", address(experts), address(out), logits.shape[0],
        ctypes.addressof(settings),
    )  # fmt: skip
    assert code == 0
    return out


def assert_same_choice(ours: Routing, reference: Routing) -> None:
    for name in ("experts", "counts", "order", "offsets", "positions"):
        assert torch.equal(getattr(ours, name), getattr(reference, name)), name


@pytest.mark.parametrize(
    ("tokens", "experts", "options"),
    [
        (1, 2, {"top_k": 1}),
        (67, 8, {"top_k": 2, "scale": 2.5}),
        (200, 33, {"top_k": 3, "normalize": False}),
        (100, 128, {"top_k": 6, "scale": 2.5}),
        (70, 128, {"top_k": 8, "score": "softmax"}),
        (40, 200, {"top_k": 4, "score": "softmax", "normalize": False}),
        (40, 256, {"top_k": 8, "num_groups": 8, "top_groups": 4}),
        (30, 500, {"top_k": 10}),
        (20, 512, {"top_k": 32, "score": "softmax"}),
        (50, 32, {"top_k": 4, "num_groups": 32, "top_groups": 9}),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulated_kernels_equal_the_reference(
    library: ctypes.CDLL, tokens: int, experts: int, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    ranks = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(1)).argsort(-1)
    logits = ((ranks - experts / 2) * (6.0 / experts)).to(dtype)
    bias = random_normal(experts, seed=2, scale=1e-3)
    mask = torch.rand(tokens, generator=torch.Generator().manual_seed(3)) > 0.3
    grad = random_normal(tokens, options["top_k"], seed=4)
    ours = emulate(library, logits, experts, bias=bias, mask=mask, **options)
    leaf = logits.clone().requires_grad_()
    reference = moe_route(leaf, expert_bias=bias, token_mask=mask, backend="reference", **options)
    assert_same_choice(ours, reference)
    torch.testing.assert_close(ours.weights, reference.weights.detach(), rtol=1e-5, atol=1e-6)
    reference.weights.backward(grad)
    found = gradient(library, grad, logits, ours.experts, options)
    tolerance = (
        {"rtol": 1e-2, "atol": 1e-4} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-6}
    )
    torch.testing.assert_close(found, leaf.grad, **tolerance)


def test_emulated_ties_nan_and_replay(library: ctypes.CDLL) -> None:
    logits = random_normal(80, 70, seed=5)
    logits[0] = 0.0
    logits[1, 3::2] = 90.0
    logits[2] = torch.tensor([-0.0, 0.0] * 35)
    logits[3] = torch.nan
    logits[4] = -torch.inf
    for score in ("sigmoid", "softmax"):
        ours = emulate(library, logits, 70, top_k=4, score=score)
        assert ours.experts[:3].tolist() == [[0, 1, 2, 3], [3, 5, 7, 9], [0, 1, 2, 3]]
        assert all(len(set(row)) == 4 and max(row) < 70 for row in ours.experts.tolist())
    recorded = moe_route(logits, 4, backend="reference").experts
    recorded[10] = 70
    recorded[11, 1] = recorded[11, 0]
    logits = random_normal(80, 70, seed=6)
    ours = emulate(library, logits, 70, given=recorded, top_k=4)
    reference = moe_route(logits, 4, experts=recorded, backend="reference")
    assert_same_choice(ours, reference)
    torch.testing.assert_close(ours.weights, reference.weights)
    sorted_only = emulate(library, None, 70, given=recorded, top_k=4)
    assert_same_choice(sorted_only, reference)
    outside = torch.tensor([[9, 0], [-1, 1]], dtype=torch.int32)
    assert emulate(library, None, 3, given=outside, top_k=2).order.tolist() == [1, 3, 0, 2]


def test_emulated_masked_tokens_may_hold_anything(library: ctypes.CDLL) -> None:
    logits = random_normal(40, 12, seed=7)
    mask = torch.arange(40) % 3 != 0
    logits[~mask] = torch.nan
    options = {"top_k": 2, "score": "softmax"}
    ours = emulate(library, logits, 12, mask=mask, **options)
    assert (ours.weights[~mask] == 0).all()
    found = gradient(library, torch.ones(40, 2), logits, ours.experts, options)
    assert (found[~mask] == 0).all()
    assert torch.isfinite(found).all()


def test_emulated_blocks_of_several_tiles(library: ctypes.CDLL) -> None:
    """More tokens than blocks x tile: ranks go on from tile to tile, loads from block to block."""
    tokens = 64 * 512 + 100
    experts = torch.randint(0, 5, (tokens, 1), generator=torch.Generator().manual_seed(8))
    ours = emulate(library, None, 5, given=experts, top_k=1)
    assert torch.equal(ours.order.long(), torch.argsort(experts.view(-1), stable=True))


def is_sorted(library: ctypes.CDLL, tokens: int, experts: int, top_k: int, seed: int = 0) -> bool:
    """Sort random experts, and compare with torch."""
    generator = torch.Generator().manual_seed(9)
    given = torch.randint(0, experts, (tokens, top_k), generator=generator)
    ours = emulate(library, None, experts, given=given, top_k=top_k, seed=seed)
    order = torch.argsort(given.view(-1), stable=True)
    counts = torch.bincount(given.view(-1), minlength=experts)
    return torch.equal(ours.order.long(), order) and torch.equal(ours.counts.long(), counts)


def test_a_missing_barrier_shows(library: ctypes.CDLL) -> None:
    """Without one barrier, whichever it is, some order of the threads gives a wrong result."""

    def is_correct(line: int, tokens: int, experts: int, top_k: int, seed: int) -> bool:
        # In a child process: a wrong position may be written anywhere, and a wrong count may keep a
        # loop going, or a lock taken, for ever.
        child = os.fork()
        if child == 0:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)
            library.skip_barrier(line)
            try:
                correct = is_sorted(library, tokens, experts, top_k, seed)
            except Exception:  # a count that nothing has written may be any number
                correct = False
            os._exit(not correct)
        return os.waitpid(child, 0)[1] == 0

    source = (ROOT / "csrc/moe_router/router_kernels.cuh").read_text().splitlines()
    barriers = {n: text.strip() for n, text in enumerate(source, 1) if "__sync" in text}
    small, several_tiles = (100, 9, 4), (64 * 512 + 1, 5, 1)
    assert all(is_correct(0, *small, seed) for seed in range(8))
    unseen = [
        text
        for line, text in barriers.items()
        if all(is_correct(line, *small, seed) for seed in range(4))
        and is_correct(line, *several_tiles, 0)
    ]
    # Reductions or __match_any_sync follow the first four: here they wait for the lanes too, though
    # they order no memory. The others order a block with those that wait for it, and here blocks
    # run in turn.
    assert unseen == ["__syncwarp();"] * 4 + ["__syncthreads();"] * 2
    assert len(barriers) == 13


def test_shared_memory_is_allowed_for_all_sizes(library: ctypes.CDLL) -> None:
    sizes = {
        (experts, top_k): library.choose_bytes(experts, top_k, 0)
        for experts in range(1, cuda.MOST_SORTED + 1)
        for top_k in range(1, cuda.MOST_CHOICES + 1)
    }
    assert max(sizes.values()) <= 64 << 10, "the least that any GPU since Volta allows a block"
    most = library.choose_bytes(cuda.MOST_EXPERTS, cuda.MOST_CHOICES, cuda.MOST_EXPERTS // 32)
    assert 48 << 10 < most <= 64 << 10
    beyond = [size for size, count in sizes.items() if count > 48 << 10]
    assert min(top_k for experts, top_k in beyond if experts == 1024) == 24
    assert all(experts > cuda.MOST_EXPERTS for experts, _ in beyond)
    for experts, top_k in [(1024, 23), (1024, 24), (1024, 32), min(beyond), max(beyond)]:
        assert is_sorted(library, 70, experts, top_k)
    with pytest.raises(RuntimeError, match="CUDA error 1"):
        is_sorted(library, 70, 8000, 1)  # more than the device allows: an error, not a launch


def test_sizes_beyond_the_kernels_are_rejected_together() -> None:
    experts = torch.zeros(3, 33, dtype=torch.int32)
    rule = "experts=1025, at most 1024, top_k=33, at most 32: use backend='triton'"
    with pytest.raises(ValueError, match=rule):
        cuda.sort_slots(experts, 1025)


def test_compiles_for_hopper_without_spills(tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    command = [
        nvcc, "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}",
        "-gencode=arch=compute_90a,code=sm_90a", "-Xptxas=-v", "-Werror=all-warnings",
        "-c", str(ROOT / "csrc/moe_router/router.cu"), "-o", str(tmp_path / "router.o"),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", result.stderr)]
    # Route and gradient for 2 types x 4 sizes x 2 scores.
    assert len(registers) == 2 * 16
    assert max(registers) <= 128, "two blocks of 256 threads must fit a multiprocessor"
    assert set(re.findall(r"(\d+) bytes (?:stack|spill)", result.stderr)) == {"0"}


def test_the_largest_sizes_are_what_python_says() -> None:
    header = (ROOT / "csrc/moe_router/router_cuda.h").read_text()
    for name, most in (
        ("Experts", cuda.MOST_EXPERTS),
        ("Sorted", cuda.MOST_SORTED),
        ("Choices", cuda.MOST_CHOICES),
        ("Groups", cuda.MOST_GROUPS),
    ):
        assert f"constexpr int kMost{name} = {most};" in header
