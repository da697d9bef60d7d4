"""Products of bfloat16 matrices that are summed in float32, and the choice of their way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from nemocascade_kernels import Nll, linear_policy_loss
from nemocascade_kernels.common import fastest, products
from nemocascade_kernels.testing import PoisonedMemory

SIZES = [(96, 40, 24), (1, 1, 1), (7, 65, 129), (513, 130, 70), (2051, 9, 516), (0, 3, 5)]


@pytest.fixture(params=products.WAYS["sums"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A way of sums that this process uses."""
    if reason := products.limitation("sums", request.param):
        pytest.skip(reason)
    monkeypatch.setattr(products, "_used", {})
    products.use("sums", request.param, "the test", {})
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "nemocascade_kernels"


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_way_sums_in_float32(way: str, sizes: tuple[int, int, int]) -> None:
    rows, m, n = sizes
    generator = torch.Generator().manual_seed(rows)
    # A slice: the rows of left are farther apart than they are long.
    left = torch.randn(rows, m + 3, generator=generator).bfloat16()[:, :m]
    right = torch.randn(rows, n, generator=generator).bfloat16()
    exact = left.double().t() @ right.double()
    scale = max(float(exact.abs().max()), 1.0) if exact.numel() else 1.0
    with PoisonedMemory():
        total = torch.empty(m, n)
        products.add_product(total, left, right, first=True)
        assert float((total.double() - exact).abs().max()) < 1e-6 * scale
        products.add_product(total, left, right, first=False)
    assert float((total.double() - 2 * exact).abs().max()) < 2e-6 * scale


def test_a_sum_by_tiles_does_not_depend_on_the_threads() -> None:
    if reason := products.limitation("sums", "onednn"):
        pytest.skip(reason)
    left, right = (torch.randn(700, n).bfloat16() for n in (300, 600))
    threads, sums = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            sums.append(torch.zeros(300, 600))
            products._SUMS["onednn"](sums[-1], left, right, True)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(sums[0], sums[1])
    assert torch.equal(sums[0], sums[2])


@pytest.mark.parametrize("way", products.WAYS["products"])
@pytest.mark.parametrize("sizes", [(5, 7, 3), (40, 2100, 2050), (1, 1, 1), (3, 0, 2)], ids=str)
def test_every_product_rounds_once(
    way: str, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_used", {})
    products.use("products", way, "the test", {})
    m, depth, n = sizes
    generator = torch.Generator().manual_seed(m)
    left = torch.randn(m, depth, generator=generator).bfloat16()
    right = torch.randn(n, depth, generator=generator).bfloat16().t()
    with PoisonedMemory():
        out = torch.empty(m, n, dtype=torch.bfloat16)
        assert products.multiply(left, right, out) is out
        assert torch.equal(products.multiply(left, right), out)
    exact = left.double() @ right.double()
    # Half a unit in the last place, and what a sum in float32 may lose to cancellation.
    assert ((out.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-4).all()


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_head_adds_to_main_grad_without_rounding(way: str, backend: str) -> None:
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 16, generator=generator).bfloat16() for n in (90, 70))
    target = torch.randint(70, (90,), generator=generator)
    sums = []
    for dtype in (torch.bfloat16, torch.float32):
        leaf = weight.to(dtype).requires_grad_()
        leaf.main_grad = torch.zeros(70, 16)
        objective = Nll(torch.ones(90))
        linear_policy_loss(
            hidden.to(dtype), leaf, target, objective, accumulate_main_grad=True, backend=backend
        )
        sums.append(leaf.main_grad)
    # bfloat16 logits differ by 1 %; but a sum that was rounded to bfloat16 has its bits.
    torch.testing.assert_close(sums[0], sums[1], rtol=0.05, atol=0.2)
    assert (sums[0].bfloat16().float() != sums[0]).float().mean() > 0.9


def sleeper(seconds: float, calls: list[float]) -> Callable[[], None]:
    def call() -> None:
        calls.append(seconds)
        time.sleep(seconds)

    return call


def test_the_fastest_way_is_measured_once_and_kept(folder: Path) -> None:
    calls: list[float] = []
    ways = {"slow": sleeper(0.02, calls), "fast": sleeper(0.001, calls)}
    first = fastest.choose("test", ways)
    assert (first.way, first.source) == ("fast", "measured now")
    assert first.seconds["slow"] is not None
    assert first.seconds["slow"] >= 0.02
    calls.clear()
    again = fastest.choose("test", ways)
    [file] = folder.iterdir()
    assert not calls
    assert (again.way, again.source, again.seconds) == ("fast", str(file), first.seconds)


def test_noise_does_not_decide(folder: Path) -> None:
    """Between ways of nearly the same speed, the order of preference decides."""
    calls: list[float] = []
    ways = {"preferred": sleeper(0.0105, calls), "other": sleeper(0.01, calls)}
    assert fastest.choose("test", ways).way == "preferred"


def test_another_machine_is_measured_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []
    ways = {"a": sleeper(0.0, calls)}
    for key in ("cpu", "features", "threads", "torch", "nemocascade_kernels"):
        calls.clear()
        monkeypatch.setattr(fastest, "machine", lambda key=key: {key: "other"})
        assert fastest.choose("test", ways).source == "measured now"
        assert calls
    assert len(list(folder.iterdir())) == 5


def test_what_a_measurement_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    found = fastest.machine()
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["ONEDNN_MAX_CPU_ISA"] == "AVX2"
    assert found.keys() > {"cpu", "features", "nemocascade_kernels"}


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"key": {}, "way": "a", "seconds": {"a": 1.0}}', '{"way": "gone"}']
)
def test_a_damaged_file_is_written_anew(folder: Path, damage: str) -> None:
    ways = {"a": sleeper(0.0, [])}
    fastest.choose("test", ways)
    [file] = folder.iterdir()
    intact = json.loads(file.read_text())
    file.write_text(damage)
    assert fastest.choose("test", ways).source == "measured now"
    assert json.loads(file.read_text())["key"] == intact["key"]
    assert fastest.choose("test", ways).source == str(file)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert fastest.choose("test", {"a": sleeper(0.0, [])}).way == "a"


def test_the_first_of_several_writers_decides(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process kept its choice while this one was measuring: both use that one."""
    ways = {"a": sleeper(0.0, []), "b": sleeper(0.0, [])}
    measure = fastest.measure

    def overtaken(ways: dict[str, Callable[[], object]]) -> dict[str, float | None]:
        monkeypatch.setattr(fastest, "measure", lambda ways: {"a": 1.0, "b": 0.1})
        assert fastest.choose("test", ways).way == "b"
        return {**measure(ways), "a": 0.1, "b": 1.0}

    monkeypatch.setattr(fastest, "measure", overtaken)
    assert fastest.choose("test", ways).way == "b"
    assert len(list(folder.iterdir())) == 1


def test_a_way_that_fails_is_out(folder: Path) -> None:
    def broken() -> None:
        raise RuntimeError("illegal instruction")

    found = fastest.choose("test", {"broken": broken, "a": sleeper(0.0, [])})
    assert (found.way, found.seconds["broken"]) == ("a", None)
    with pytest.raises(RuntimeError, match="no way of other works on this machine: tried broken"):
        fastest.choose("other", {"broken": broken})


def test_the_variable_names_ways(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(products, "_used", {})
    monkeypatch.setattr(products, "_measured", lambda kind: fastest.MeasuredChoice("mkl", {}, kind))
    monkeypatch.setenv(products.VARIABLE, "float")
    for kind in products.WAYS:
        assert products.choice(kind) == fastest.MeasuredChoice("float", {}, products.VARIABLE)
    monkeypatch.setattr(products, "_used", {})
    monkeypatch.setenv(products.VARIABLE, "torch")
    assert products.choice("products").way == "torch"
    assert products.choice("sums").source == "sums", "torch is no way of sums: they are measured"
    monkeypatch.setattr(products, "_used", {})
    monkeypatch.setenv(products.VARIABLE, "float, fast")
    with pytest.raises(ValueError, match="BF16_PRODUCTS: 'fast' is no way of bf16 products: name"):
        products.choice("sums")
    monkeypatch.setenv(products.VARIABLE, "mkl")
    rejected = {"mkl": "no MKL"}
    monkeypatch.setattr(products, "limitation", lambda kind, way: rejected.get(way))
    with pytest.raises(ValueError, match="'mkl' is unavailable, no MKL: name one of"):
        products.choice("sums")


def test_processes_share_the_choice(folder: Path) -> None:
    """Two processes that start at once end with one file and one way."""
    code = "from nemocascade_kernels.common import products; print(products.choice('sums').way)"
    environment = {k: v for k, v in os.environ.items() if k != products.VARIABLE}
    started = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    ]
    shown = {process.communicate()[0] for process in started}
    assert len(shown) == 1
    if len(products.available("sums")) > 1:
        [file] = folder.iterdir()
        assert json.loads(file.read_text())["way"].encode() in shown.pop()
