"""Every Triton kernel compiles for the relevant GPUs, without spills and without a GPU."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from nemocascade_kernels import compile as ahead
from nemocascade_kernels.testing import without_interpreter

pytest.importorskip("triton")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "nemocascade_kernels.compile", *arguments],
        capture_output=True, text=True, check=False, env=without_interpreter(),
    )  # fmt: skip


LINE = r"\w+ +\S.* +\d+ registers +0 B spilled +\d+ B shared +(wgmma|mma|tcgen05|-) +ok"
PRODUCTS = {"up_kernel", "rows_kernel", "down_gradient_kernel", "weight_gradient_kernel"}


def without_a_spill(code: int, printed: str) -> list[list[str]]:
    """Words of the line of each kernel, after a check of all lines."""
    assert code == 0, printed
    *lines, _ = map(str.strip, printed.splitlines())
    assert all(re.fullmatch(LINE, line) for line in lines), printed
    return [line.split() for line in lines]


def check_products_of_hopper(kernels: list[list[str]], models: Sequence[str]) -> None:
    """Expert products use wgmma; two blocks of Nemotron's fit on a multiprocessor."""
    products = [(op, name, words) for op, name, *words in kernels if "wgmma" in words]
    for model in models:
        of_model = {n.partition("[")[0] for _, n, _ in products if f"[{model}]" in n}
        assert of_model >= {"up_kernel", "down_gradient_kernel"}
    assert {name.partition("[")[0] for _, name, _ in products} >= PRODUCTS
    found = [
        (name, words)
        for op, name, words in products
        if op == "moe_experts" and "[nemotron]" in name
    ]
    assert {name.partition("[")[0] for name, _ in found} >= PRODUCTS
    for name, words in found:
        registers, shared = int(words[0]), int(words[words.index("shared") - 2])
        assert registers <= 128, (name, words)
        assert shared + 1024 <= 233_472 // 2, (name, words)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_launch_compiles_without_a_spill(arch: str) -> None:
    result = run("--arch", arch)
    kernels = without_a_spill(result.returncode, result.stdout + result.stderr)
    # FP8 is for Hopper alone.
    rejected = set() if arch == "sm_90" else {"moe_experts_fp8"}
    assert {words[0] for words in kernels} == set(ahead.triton_ops()) - rejected
    if arch == "sm_90":
        check_products_of_hopper(kernels, ("nemotron", "qwen3", "mixtral"))


def test_every_kernel_compiles_without_a_spill(checks: dict[str, Any]) -> None:
    kernels = without_a_spill(*checks["sm_90"])
    assert {words[0] for words in kernels} == set(ahead.triton_ops())
    for op in ahead.triton_ops():
        names = {words[1].partition("[")[0] for words in kernels if words[0] == op}
        assert names == {k.kernel.__name__ for k in ahead.kernels_of(op, 90)}
    check_products_of_hopper(kernels, ("nemotron",))


@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_kernels_with_products_compile_for_other_gpus(arch: str, checks: dict[str, Any]) -> None:
    kernels = without_a_spill(*checks[arch])
    assert {words[0] for words in kernels} == {"linear_policy_loss", "moe_experts"}
    expected = {"sm_80": "mma", "sm_100": "tcgen05"}[arch]
    products = {words[1].partition("[")[0] for words in kernels if expected in words}
    assert products >= PRODUCTS


def test_the_sample_has_the_largest_tiles_of_nemotron() -> None:
    up, down = object(), object()
    entries = [
        ahead.AotKernel(up, {}, {"BLOCK": size, "GATED": True}, label=label)
        for label, size in (("qwen3", 512), ("nemotron", 64), ("nemotron", 128), ("nemotron", 32))
    ]
    entries.append(ahead.AotKernel(down, {}, {"BLOCK": 16}))
    assert ahead.sample_of(entries) == [entries[2], entries[4]]


FP8_PRODUCTS = r"""
import re
from nemocascade_kernels import compile as ahead

def products(kernel):
    # How many there are, and how many are not wgmma of e4m3.
    ptx = ahead.compiled("moe_experts_fp8", kernel, 90).asm["ptx"]
    found = re.findall(r"(?:wgmma.mma_async|mma.sync)[^;]*?;", ptx)
    wide = [p for p in found if not re.match(r"wgmma\S+[.]f32[.]e4m3[.]e4m3", p)]
    return kernel.kernel.__name__, len(found), len(wide)

kernels = ahead.kernels_of("moe_experts_fp8", 90)
"""


def check_products_of_fp8(rows: list[tuple[str, int, int]]) -> None:
    assert all(wide == 0 for _, _, wide in rows), rows
    assert {name for name, count, _ in rows if count} == {
        "fp8_up_kernel", "fp8_rows_kernel", "fp8_down_gradient_kernel",
        "fp8_weight_gradient_kernel",
    }  # fmt: skip


def test_every_product_of_fp8_is_wgmma_e4m3(checks: dict[str, Any]) -> None:
    check_products_of_fp8(checks["fp8"])


@pytest.mark.slow
def test_every_product_of_every_launch_in_fp8_is_wgmma_e4m3() -> None:
    code = FP8_PRODUCTS + "import json; print(json.dumps([*map(products, kernels)]))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env=without_interpreter(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    check_products_of_fp8(json.loads(result.stdout))


KERNEL = """
import triton
import triton.language as tl
from nemocascade_kernels.compile import AotKernel

@triton.jit
def sum_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    {body}

def kernels(arch):
    return [AotKernel(sum_kernel, {{"x_ptr": "*fp32:16", "out_ptr": "*fp32:16", "size": "i32"}},
                      {{"BLOCK": {block}}}, num_warps={warps}, matrix={matrix})]
"""
SPILLING = """at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    total = x
    for i in range(size):
        total = tl.load(x_ptr + i * BLOCK + at) * total + x
    tl.store(out_ptr + at, total)"""
GREEDY = """at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a = tl.load(x_ptr + at)
    for i in range(size):
        a = tl.dot(a, tl.load(x_ptr + i * BLOCK * BLOCK + at))
    tl.store(out_ptr + at, a)"""
PLAIN = """at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.load(x_ptr + at))"""


FAULTS = {
    "spill": (SPILLING, 4096, 1, "any", "SPILLS"),
    "shared": (GREEDY, 128, 4, "any", "SHARED MEMORY exceeds"),
    "matrix": (PLAIN, 1024, 4, "wgmma", "MATRIX INSTRUCTION is None, and wgmma was intended"),
    "fine": (PLAIN, 1024, 4, "any", None),
}
CHECKS = """
import contextlib, importlib, io, json, sys

def printed(*arguments):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = ahead.main([*arguments])
    return code, out.getvalue()

def report(name):
    kernel, = importlib.import_module(name).kernels(90)
    found = ahead.compile_kernel("bad", kernel, 90)
    return bool(found.faults), found.line()

products_of = "--sample", "--op", "linear_policy_loss", "--op", "moe_experts"
json.dump({
    "sm_90": printed("--arch", "sm_90", "--sample"),
    "sm_80": printed("--arch", "sm_80", *products_of),
    "sm_100": printed("--arch", "sm_100", *products_of),
    "fp8": [*map(products, ahead.sample_of(kernels))],
    **{name: report(name) for name in sys.argv[1:]},
}, sys.stdout)
"""


@pytest.fixture(scope="module")
def checks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The findings of the tool, all in one process: torch's import takes as long as ten kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    for name, (body, block, warps, matrix, _) in FAULTS.items():
        source = KERNEL.format(body=body, block=block, warps=warps, matrix=repr(matrix))
        (folder / f"{name}.py").write_text(source)
    environment = without_interpreter()
    environment["PYTHONPATH"] = f"{folder}:{environment.get('PYTHONPATH', '')}:{package_folder()}"
    result = subprocess.run(
        [sys.executable, "-c", FP8_PRODUCTS + CHECKS, *FAULTS],
        capture_output=True, text=True, check=False, env=environment,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    found: dict[str, Any] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(name: str, checks: dict[str, Any]) -> None:
    """The tool on kernels made to be bad: a report that can only be green would prove nothing."""
    fault = FAULTS[name][-1]
    is_faulty, line = checks[name]
    assert is_faulty == (fault is not None), line
    assert re.search(fault or "ok$", line.strip()), line


def package_folder() -> str:
    return str(Path(ahead.__file__).parents[1])


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "blocks"),
    [
        (128, 98_328, 8, 2),
        (129, 98_328, 8, 1),  # registers are allocated by eights
        (128, 115_712, 8, 2),
        (128, 115_720, 8, 1),
        (16, 0, 8, 8),  # threads bound it
        (255, 220_000, 16, 1),  # at least one program each, whatever the launch will say
    ],
)
def test_programs_that_fit_on_a_device(
    registers: int, shared: int, warps: int, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemocascade_kernels.moe_experts import tiles

    hopper = SimpleNamespace(
        regs_per_multiprocessor=65_536,
        shared_memory_per_multiprocessor=233_472,
        max_threads_per_multi_processor=2048,
        multi_processor_count=132,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: hopper)
    compiled = SimpleNamespace(
        n_regs=registers,
        metadata=SimpleNamespace(shared=shared, num_warps=warps),
        _init_handles=lambda: None,
    )
    device = torch.device("cuda", 0)
    assert tiles.resident_programs(compiled, device) == 132 * blocks


def test_unknown_names_are_errors(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tool removes it: it compiles in a process of its own.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for arguments, message in (
        (["--arch", "sm_90", "--op", "no_such_op"], "choose among"),
        (["--arch", "sm_10"], "invalid choice: 'sm_10'"),
    ):
        with pytest.raises(SystemExit) as ended:
            ahead.main(arguments)
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


def test_an_entry_must_name_every_argument() -> None:
    class Kernel:
        arg_names = ("x_ptr", "size")
        __name__ = "kernel"

    entry = ahead.AotKernel(Kernel, {"x_ptr": "*fp32"}, {"BLOCK": 1})
    with pytest.raises(ValueError, match=r"\['BLOCK', 'size'\] are missing"):
        ahead.compile_kernel("op", entry, 90)
