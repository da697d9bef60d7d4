"""The arithmetic of estimated times, and that every goal has a case."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels import predict, predict_cases
from benchmarks.kernels.estimate import (
    NO_WORK,
    Ceilings,
    Estimate,
    Launch,
    Loop,
    Operator,
    Work,
    counts,
    estimates,
    occupancy,
    operator_time,
    product_time,
    rows_time,
)

ROOT = Path(__file__).resolve().parents[2]
# Round numbers: a TB/s, a GHz, and 10 multiprocessors of 100 FLOPs a clock: 1 TFLOP/s.
SMALL = Ceilings(
    tflops=1.0,
    terabytes_s=1.0,
    multiprocessors=10,
    clock_ghz=1.0,
    tensor_flops_clock=100,
    shared_bytes_clock=100,
    launch_us=1.0,
)
NOTHING = Loop(0, 0, 0, 0)


def launch(**changes: Any) -> Launch:
    made = Launch("kernel", 10, 4, 32, 0, 0, NOTHING, NOTHING, 64)
    return made._replace(**changes)


def about(seconds: float) -> Any:
    return pytest.approx(seconds)


def test_occupancy_is_that_of_the_scarcest() -> None:
    assert occupancy(launch(warps=1), SMALL) == 32, "blocks"
    assert occupancy(launch(warps=16), SMALL) == 4, "warps"
    # 247 registers are 248 x 32 in units of 256 = 7936 a warp, 31,744 a block of 4 warps.
    assert occupancy(launch(registers=247), SMALL) == 2
    # 126 registers: 128 x 32 x 8 = 32,768 a block; 98,304 bytes and 1 KiB: two in 228 KiB.
    assert occupancy(launch(registers=126, warps=8, shared_bytes=98_304), SMALL) == 2
    assert occupancy(launch(shared_bytes=131_072), SMALL) == 1


def test_rows_are_bound_by_memory_or_issue() -> None:
    # 100 MB at 1 TB/s: 100 us. A thread's pass reads 16 bytes in 10 instructions: 195,312.5 passes
    # of a warp, 1,953,125 instructions on 40 schedulers at 1 GHz: 48.8 us.
    kernel = launch(bytes=100_000_000, body=Loop(10, 16, 0, 0))
    assert rows_time(kernel, SMALL) == Estimate("kernel", about(100e-6), "memory")
    kernel = kernel._replace(body=Loop(40, 16, 0, 0))
    assert rows_time(kernel, SMALL) == Estimate("kernel", about(195.3125e-6), "issue")
    # 330 programs in waves of 32 x 10: the second wave holds 10, and counts whole.
    kernel = launch(bytes=100_000_000, programs=330, warps=1)
    assert rows_time(kernel, SMALL).seconds == pytest.approx(100e-6 * 640 / 330)
    assert rows_time(launch(bytes=8), SMALL) == Estimate("kernel", 1e-6, "launch")


def test_products_are_bound_by_the_slowest_part_of_a_step() -> None:
    # A step of depth 64 is 10,000 FLOPs: 100 clocks of the tensor cores; 20 instructions of 4 warps
    # on 4 schedulers: 20 clocks; 5,000 bytes: 50 clocks. The clock at the ceiling is 1 GHz. Depth
    # 640 is 10 steps: a tile takes 1,000 clocks. 100 tiles on 10 multiprocessors: 10 us.
    kernel = launch(shared_bytes=131_072, body=Loop(20, 0, 10_000, 5_000))
    work = Work(100 * 100_000.0, 640)
    found = product_time(kernel, work, SMALL)
    assert found == Estimate("kernel", about(10e-6), "tensor cores")
    slow = kernel._replace(body=Loop(20, 0, 10_000, 20_000))
    assert product_time(slow, work, SMALL) == Estimate("kernel", about(20e-6), "shared memory")
    # One block that waits issues its 20 clocks after the 100.
    waiting = kernel._replace(body=Loop(20, 0, 10_000, 5_000, True))
    assert product_time(waiting, work, SMALL).seconds == pytest.approx(12e-6)
    assert "one after the other" in product_time(waiting, work, SMALL).bound
    # 500 instructions a tile: 500 clocks, seen by one block, hidden by a second one.
    tail = kernel._replace(once=Loop(500, 0, 0, 0))
    assert product_time(tail, work, SMALL) == Estimate(
        "kernel", about(15e-6), "what is done once a tile"
    )
    assert product_time(tail._replace(shared_bytes=98_304), work, SMALL).seconds == pytest.approx(
        10e-6
    )
    # 128 threads that read and write 100 bytes each a tile: 12,800 at 100 a clock, 128 clocks.
    reads = kernel._replace(once=Loop(1, 100, 0, 0))
    assert product_time(reads, work, SMALL).seconds == pytest.approx(11.28e-6)
    # 101 tiles need an eleventh wave.
    assert product_time(kernel, Work(101 * 100_000.0, 640), SMALL).seconds == pytest.approx(11e-6)


def test_a_case_shares_its_flops_among_its_products() -> None:
    product = launch(shared_bytes=131_072, body=Loop(1, 0, 10_000, 0))
    events: list[Launch | Operator] = [
        product,
        Operator("mm", 5e6, 8),
        product,
        launch(bytes=2_000_000),
    ]
    found = [e.seconds for e in estimates(events, Work(20_000_000.0, 640), SMALL)]
    assert found == pytest.approx([10e-6, 5e-6, 10e-6, 2e-6])
    assert operator_time(Operator("copy", 0.0, 3_000_000), SMALL).bound == "memory"


PTX = """.visible .entry kernel(
    .param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 128
{
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];
    mov.b32 %r5, 0;
$L__loop:
    cp.async.cg.shared.global [%r6], [%rd2], 0x10, %r7;
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd3, %rd4, p, 1, 1, 0, 0;
    wgmma.wait_group.sync.aligned 0;
    add.s32 %r5, %r5, 1;
    setp.lt.s32 %p1, %r5, 8;
    @%p1 bra $L__loop;
    st.global.b32 [%rd1], %r5;
    ret;
}
"""


def test_instructions_of_the_loop_are_counted() -> None:
    body, once, compute = counts(PTX, 4)
    # m64n128k16: 2 x 64 x 128 x 16 FLOPs; operands of 64 + 128 rows of 16 elements of 2 bytes.
    assert body == Loop(6, 16, 262_144, 6_144, True)
    assert once == Loop(4, 20, 0, 0)
    assert compute == 0


def test_a_wait_for_tma_is_part_of_the_loop_of_products() -> None:
    wait = """
$L__wait:
    mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r8], %r9;
    @!%p2 bra $L__wait;
    wgmma.wait_group.sync.aligned 0;"""
    waiting = PTX.replace("\n    wgmma.wait_group.sync.aligned 0;", wait)
    body, once, compute = counts(waiting, 4)
    assert body == Loop(8, 16, 262_144, 6_144, True)
    assert once == Loop(4, 20, 0, 0)
    assert compute == 0


def test_loops_that_compute_run_as_often_as_the_work_says() -> None:
    # 160 rows in tiles of 16: 10 tiles. A tile is 30 instructions outside of a loop of 20 that runs
    # 5 times, and once with the rest: 110 of 4 warps. 4,400 on 40 schedulers at 1 GHz: 0.11 us.
    kernel = launch(body=Loop(20, 16, 0, 0), once=Loop(10, 0, 0, 0), compute=20, tile_rows=16)
    kernel, work = kernel._replace(programs=10_000), Work(rows=160_000, passes=5)
    found = rows_time(kernel, SMALL, work)
    # 10,000 programs in waves of 160: the last counts whole.
    assert found == Estimate("kernel", about(110e-6 * 10_080 / 10_000), "issue")
    text = PTX.replace("cp.async.cg.shared.global [%r6], [%rd2], 0x10, %r7;\n", "")
    text = text.replace("wgmma.mma_async", "other")
    assert counts(text, 4)[2] == 5
    # A loop that reads what it compares again counts too; one that writes goes over memory once.
    wait = "wgmma.wait_group.sync.aligned 0;"
    assert counts(text.replace(wait, "ld.global.b32 %r6, [%rd2];"), 4)[2] == 5
    assert counts(text.replace(wait, "st.global.b32 [%rd2], %r6;"), 4)[2] == 0


def test_kernels_may_have_work_of_their_own() -> None:
    product = launch(shared_bytes=131_072, body=Loop(1, 0, 10_000, 0))
    own = {"kernel": Work(10_000_000.0, 640)}
    found = [e.seconds for e in estimates([product, product], NO_WORK, SMALL, own)]
    assert found == pytest.approx([10e-6, 10e-6])


def test_every_goal_has_a_case_and_a_verdict() -> None:
    for goal in predict.GOALS:
        case = predict_cases.CASES[goal.case]
        work = case.bytes if goal.unit in ("TB/s", "x bytes") else case.flops
        assert work or goal.unit in ("us", "x faster")
        peer = None
        if goal.peer:
            part = Estimate("other", 1.0, "issue")
            peer = predict.Prediction(predict_cases.CASES[goal.peer], (part,), kept=1000)
        for seconds, size, met in ((1e-9, 1, True), (1e3, 10**13, False)):
            part = Estimate("kernel", seconds, "issue")
            found = predict.Prediction(case, (part,), size, size)
            value = found.measure(goal.unit, Ceilings(), peer)
            assert predict.reaches(goal, value) is met, goal
            shown = predict.verdict_of(goal, value, found)
            assert ("estimate reaches the goal" in shown) is met
            assert ("misses the goal: bound by" in shown) is not met
            table = predict.lines([found, *([peer] if peer else [])], {}, Ceilings())
            assert sum(shown in line for line in table) >= 1


def test_a_measurement_is_shown_beside_the_estimate() -> None:
    name = "moe_router forward 8192 x 512"
    rows = [{"kind": "ours", "median_s": 12e-6}]
    record = {"ops": {"moe_router": {"cases": [{"case": "forward 8192 x 512", "rows": rows}]}}}
    part = Estimate("kernel", 8e-6, "issue")
    prediction = predict.Prediction(predict_cases.CASES[name], (part,))
    shown = predict.lines([prediction], record, Ceilings())[-1]
    assert shown.split("  ")[0] == name
    assert " 8 us " in shown
    assert " 12 us " in shown


def test_it_plays_a_case() -> None:
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "benchmarks/kernels/predict.py", "--only", "mopd", "--parts"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("ESTIMATES for an H200, not measurements")
    assert "mopd_kernel" in done.stdout
