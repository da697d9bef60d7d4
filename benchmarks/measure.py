"""Declaration and timing of benchmarks.

A file `benchmarks/kernels/bench_<op>.py` defines one function::

    def cases(suite: str, device: torch.device, tiny: bool) -> list[Case]

`suite` is "cpu" or "gpu". `tiny` asks for very small sizes, to check that the code runs. A `Case`
is one problem. Its `Row`s solve it in different ways in one process, and its `Goal`s compare rows.
`benchmarks/run.py` does everything else.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Unavailable(Exception):  # noqa: N818 - it states a fact about a peer; nothing went wrong
    """Raised by `Row.make` if a row cannot run here. Its text becomes the row's entry."""


#: Fewest rounds of every case, however long they take.
MIN_ROUNDS = 5
#: A peer that is slower than ours by more than this factor is timed in two rounds only.
SLOW = 2.0


@dataclass(frozen=True)
class Prepared:
    """A timed call with a separate result, for a call that does not return its own.

    result: called once, after the first call; its tensor is compared instead of the call's.
    """

    call: Callable[[], Tensor | None]
    result: Callable[[], Tensor]


def with_gradients(
    compute: Callable[[], Tensor], leaves: Sequence[Tensor], shown: Callable[[Tensor], Tensor]
) -> Prepared:
    """A call of `compute`, which may also compute the leaves' gradients. Its result is
    `shown(output)` and a probe of each gradient."""
    kept: list[Tensor] = []
    probing = [True]

    def call() -> None:
        output = compute()
        if probing:
            kept[:] = [shown(output), *(probe(leaf.grad) for leaf in leaves)]
        for leaf in leaves:
            leaf.grad = None

    def result() -> Tensor:
        probing.clear()
        return torch.cat(kept)

    return Prepared(call, result)


def probe(values: Tensor | None) -> Tensor:
    """A sample of a few hundred elements, scaled to unit size."""
    if values is None:
        return torch.zeros(0)
    flat = values.detach().flatten()
    sample = flat[:: max(1, flat.numel() // 500)][:500].double().cpu()
    norm: Tensor = sample.norm()
    return sample / norm.clamp(min=1e-30)


def load(module: str, package: str) -> Any:
    """Import a peer's module. Raises Unavailable if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"{package} is not installed here ({error})") from error


@dataclass(frozen=True)
class Row:
    """One way to solve a case.

    make: prepares (inputs, compilation, tuning) outside the timed region and returns the timed
        call. If the call returns a tensor, it must agree with the tensor of the case's first row
        that returns one, to within `Case.agree`.
    kind: "ours", "peer", or "floor" (bare work that no implementation can avoid).
    flops, bytes, tokens: work of one call, for TFLOP/s, GB/s and tokens/s.
    output_bytes: bytes of the call's allocated outputs, not counted as extra memory.
    agree: replaces `Case.agree`, for a row that computes in fewer bits.
    """

    name: str
    kind: str
    make: Callable[[], Callable[[], Tensor | None] | Prepared]
    flops: float | None = None
    bytes: float | None = None
    output_bytes: int = 0
    tokens: int | None = None
    agree: float | None = None


@dataclass(frozen=True)
class Goal:
    """Limit on a row's cost: `at_most` times that of `baseline`; without one, in s or bytes."""

    text: str
    row: str
    at_most: float
    baseline: str | None = None
    measure: str = "time"  # or "extra_memory"


@dataclass(frozen=True)
class Case:
    """One problem. `settings` are recorded: every size, dtype and option that decides the work.

    calls: calls in one timed region, for calls of microseconds (on a GPU, one CUDA graph).
    repeats: largest number of timed regions per row; fewer if they are long.
    """

    name: str
    settings: Mapping[str, Any]
    rows: Sequence[Row]
    goals: Sequence[Goal] = ()
    calls: int = 1
    repeats: int = 50
    agree: float = 2e-2


@dataclass
class Outcome:
    """Measurements of one row, or the reason why there are none."""

    row: Row
    times_s: list[float] = field(default_factory=list)
    extra_bytes: int | None = None
    missing: str | None = None
    wrong: str | None = None

    @property
    def median_s(self) -> float:
        return statistics.median(self.times_s) if self.times_s else math.nan

    def quantile_s(self, fraction: float) -> float:
        if not self.times_s:
            return math.nan
        ordered = sorted(self.times_s)
        return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))]


def measure(case: Case, device: torch.device, budget_s: float) -> list[Outcome]:
    """Measure the times of a case's rows, in alternating order, and their extra memory."""
    outcomes, calls = [], {}
    expected: Tensor | None = None
    for row in case.rows:
        outcome = Outcome(row)
        outcomes.append(outcome)
        try:
            made = row.make()
            call = made.call if isinstance(made, Prepared) else made
            result = call()
            if isinstance(made, Prepared):
                result = made.result()
        except Unavailable as reason:
            outcome.missing = str(reason)
            continue
        except Exception as error:
            # A failed peer is a row of the table; a failure of ours fails the run.
            if row.kind != "peer":
                raise
            outcome.missing = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            )
            continue
        if isinstance(result, Tensor):
            value = result.detach().double().cpu()
            expected = value if expected is None else expected
            outcome.wrong = _disagreement(value, expected, row.agree or case.agree)
        del result, made
        outcome.extra_bytes = max(0, extra_memory(call, device) - row.output_bytes)
        batch = _batched(call, case.calls, device)
        if batch is not call:
            batch()
        calls[row.name] = (outcome, batch)
    _alternate(list(calls.values()), case, device, budget_s)
    return outcomes


def _disagreement(value: Tensor, expected: Tensor, tolerance: float) -> str | None:
    if value.shape != expected.shape:
        return f"result has shape {tuple(value.shape)}, and the first row's {tuple(expected.shape)}"
    error = (value - expected).norm().item() / max(expected.norm().item(), 1e-300)
    return None if error <= tolerance else f"result differs by {error:.1e} from the first row's"


def _alternate(
    calls: list[tuple[Outcome, Callable[[], object]]],
    case: Case,
    device: torch.device,
    budget_s: float,
) -> None:
    """Time every row once per round, alternating the direction, until the budget is spent.

    A peer that took more than SLOW times our time in two rounds is skipped from then on, so that
    the close rows get more rounds.
    """
    deadline = time.perf_counter() + budget_s
    scratch = None
    if device.type == "cuda":
        scratch = torch.empty(256 << 20, dtype=torch.uint8, device=device)
    for turn in range(case.repeats):
        if turn >= MIN_ROUNDS and time.perf_counter() > deadline:
            break
        ours = [min(o.times_s) for o, _ in calls if o.row.kind == "ours" and o.times_s]
        for outcome, call in calls if turn % 2 == 0 else reversed(calls):
            slow = turn >= 2 and ours and min(outcome.times_s) > SLOW * min(ours)
            if slow and outcome.row.kind == "peer":
                continue
            if scratch is not None:
                scratch.zero_()  # evicts the next call's inputs from L2
            outcome.times_s.append(_time_once(call, device) / case.calls)


def _time_once(call: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        start_s = time.perf_counter()
        call()
        return time.perf_counter() - start_s
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # While the device sleeps, the host enqueues the work, so that launches are not timed.
    torch.cuda._sleep(2_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    elapsed_ms: float = start.elapsed_time(end)
    return elapsed_ms / 1e3


def _batched(call: Callable[[], object], calls: int, device: torch.device) -> Callable[[], object]:
    """One call that makes `calls` calls; on a GPU it replays a graph, which avoids launch costs."""
    if calls == 1:
        return call
    if device.type != "cuda":

        def repeat() -> None:
            for _ in range(calls):
                call()

        return repeat
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return graph.replay


def extra_memory(call: Callable[[], object], device: torch.device) -> int:
    """Peak memory of a call in bytes, beyond what was allocated before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result
        return torch.cuda.max_memory_allocated() - before
    # Resident memory also counts the scratch memory of libraries below torch.
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak to the present size
    before = _status_bytes("VmRSS")
    result = call()
    del result
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


LONG_PRODUCT_S = 0.05
"""A product of this many seconds is long enough to measure a CPU's rate; no larger one is tried."""


def ceilings(device: torch.device, tiny: bool = False) -> dict[str, float]:
    """Highest measured rates of this device: TFLOP/s of a large matrix product by dtype, GB/s of a
    copy. CPUs without bfloat16 products are slow at large ones and get smaller ones.
    """
    largest = 256 if tiny else 8192 if device.type == "cuda" else 2048
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        size = 256 if device.type == "cpu" else largest
        while True:
            a = torch.randn(size, size, device=device).to(dtype)
            b = torch.randn(size, size, device=device).to(dtype)
            time_s = _best(functools.partial(torch.matmul, a, b), device)
            if size == largest or time_s > LONG_PRODUCT_S:
                break
            size *= 2
        found[f"matmul_{str(dtype).removeprefix('torch.')}_tflops"] = 2 * size**3 / time_s / 1e12
    length = (1 << 20) if tiny else (1 << 32) if device.type == "cuda" else (1 << 28)
    source = torch.empty(length, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    time_s = _best(lambda: target.copy_(source), device)
    found["copy_gb_per_s"] = 2 * length / time_s / 1e9
    return found


def _best(call: Callable[[], object], device: torch.device) -> float:
    call()
    return min(_time_once(call, device) for _ in range(5))
