"""The search for data races: it finds those of small kernels, and none in the package's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gpu_dry.linear import add, multiply, number, result_of, unknown
from gpu_dry.ptx import parse
from gpu_dry.races import unordered
from nemocascade_kernels.compile import triton_ops
from nemocascade_kernels.testing import without_interpreter

pytest.importorskip("triton")


def findings(which: str) -> dict[str, list[str]]:
    environment = without_interpreter()
    environment["PYTHONPATH"] = f"{Path(__file__).parents[1]}:{environment.get('PYTHONPATH', '')}"
    command = [sys.executable, "-m", "gpu_dry.racy_kernels", which]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    found: dict[str, list[str]] = json.loads(result.stdout)
    return found


def test_races_are_found_and_nothing_else() -> None:
    found = findings("own")
    racy = {name.removeprefix("4 warps/") for name, lines in found.items() if lines}
    assert racy == {
        "row_then_target", "barrier_on_one_path", "foreign_indices", "shifted", "reversed_rows",
        "write_then_read", "next_iteration",
    }  # fmt: skip
    assert len(found) == 16
    (line,) = found["4 warps/row_then_target"]
    source = (Path(__file__).parent / "racy_kernels.py").read_text().splitlines()
    read, write = (source[int(part.split()[0]) - 1] for part in line.split("racy_kernels.py:")[1:])
    assert "chosen = tl.load" in read
    assert "tl.store" in write
    assert line.startswith("argument 0: ")
    (line,) = found["4 warps/write_then_read"]
    assert " writes what " in line


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("launches", ["sample", pytest.param("package", marks=pytest.mark.slow)])
def test_the_package_has_no_race(launches: str) -> None:
    found = findings(launches)
    assert {name.split("/")[0] for name in found} == set(triton_ops())
    assert {name: lines for name, lines in found.items() if lines} == {}


ASYNCHRONOUS = """
.visible .entry copy(
	.param .u64 .ptr .global .align 1 copy_param_0
)
.reqntid 64
{{
	ld.param.b64 	%rd1, [copy_param_0];
	mov.u32 	%r1, %tid.x;
	mov.b32 	%r2, global_smem;
	cp.async.ca.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 0x4, %r3;
	cp.async.commit_group;
	{between}
	mad.wide.u32 	%rd2, %r1, 4, %rd1;
	st.global.b32 [ %rd2 + 0 ], {{ %r1 }};
	ret;
}}
"""


@pytest.mark.parametrize(
    ("between", "races"),
    [
        ("cp.async.wait_group 0;\n bar.sync 0;", 0),
        ("cp.async.wait_all;\n barrier.sync 0, 64;", 0),
        ("bar.sync 0;", 1),  # the read may still be under way
        ("cp.async.wait_group 1;\n bar.sync 0;", 1),
        ("cp.async.wait_group 0;", 1),
        ("cp.async.wait_group 0;\n bar.sync 1, 32;", 1),  # a barrier of one warp
        ("cp.async.wait_group 0;\n bar.warp.sync 0xffffffff;", 1),
    ],
)
def test_an_asynchronous_read_needs_a_wait_and_a_barrier(between: str, races: int) -> None:
    assert len(unordered(ASYNCHRONOUS.format(between=between))) == races


def test_an_unknown_number_of_threads_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"no \.reqntid"):
        parse(ASYNCHRONOUS.format(between="").replace(".reqntid 64", ""))


def test_bitwise_results_are_sums_only_where_no_bits_meet() -> None:
    thread, block = number(np.arange(128)), unknown("block")
    tile = multiply(block, number(128))
    assert result_of(("or", "b32"), [tile, thread]) == add(tile, thread)
    shifted = add(tile, number(-256))
    assert result_of(("or", "b32"), [shifted, thread]) == add(shifted, thread)
    for other in (multiply(block, number(64)), add(tile, number(1)), block):
        assert result_of(("or", "b32"), [other, thread]) != add(other, thread)
    assert result_of(("bfe", "u32"), [thread, number(5), number(2)]) == number(np.arange(128) // 32)
    assert result_of(("shr", "u32"), [number(-1), number(28)]) == number(15)
    assert result_of(("cvt", "u64", "u32"), [number(-1)]) == number(2**32 - 1)
    assert result_of(("mov", "b64"), [number(2**63 + 5)]) == number(5 - 2**63)
    high = result_of(("and", "b32"), [block, number(-16)])
    assert result_of(("or", "b32"), [high, number(15)]) == add(high, number(15))
