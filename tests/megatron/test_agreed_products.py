"""The way of bf16 products is one for a job, and stays in a resumed run."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from nemocascade_kernels.common import products
from nemocascade_kernels.common.fastest import MeasuredChoice

from nemocascade.megatron.products import FILE, settle_products
from nemocascade.recipe import EngineConfig, ParallelConfig, RecipeError
from nemocascade.runtime.watchdog import Watchdog
from nemocascade.runtime.world import World

BF16 = EngineConfig(precision="bf16")
ALL = products.WAYS["sums"]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A process that has chosen nothing, with all ways; its measurement finds the list's entry."""
    fastest = ["mkl"]
    monkeypatch.delenv(products.VARIABLE, raising=False)
    monkeypatch.setattr(products, "_used", {})
    monkeypatch.setattr(products, "limitation", lambda kind, way: None)
    monkeypatch.setattr(
        products,
        "_measured",
        lambda kind: MeasuredChoice(
            fastest[0] if kind == "sums" else "torch", {"mkl": 0.1}, "measured"
        ),
    )
    return fastest


def world_of(
    rank: int = 0, *, offers: Sequence[Sequence[str]] = (ALL, ALL), main: Any = None
) -> World:
    """A rank of two. offers: the sums of both. main: what the main rank broadcasts."""

    class OneOfTwo(World):
        def broadcast_object(self, value: Any, src: int = 0) -> Any:
            return value if self.is_main or value is None else main

        def all_gather_object(self, value: Any) -> list[Any]:
            return [{"sums": sums, "products": ("torch", "float")} for sums in offers]

    groups: Any = None
    watch = Watchdog()
    return OneOfTwo(rank, 2, torch.device("cpu"), ParallelConfig(), groups, watch)


def settle(run_dir: Path, world: World | None = None, **settings: Any) -> str:
    settle_products(run_dir, world or world_of(), BF16, keeps=settings.get("keeps", True))
    return products.choice("sums").way


def test_a_resumed_run_keeps_the_way_when_the_cache_is_gone(
    tmp_path: Path, machine: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settle(tmp_path) == "mkl"
    monkeypatch.setattr(products, "_used", {})
    machine[0] = "float"  # what another measurement would find
    assert settle(tmp_path) == "mkl"
    assert products.choice("sums").source == str(tmp_path / FILE)
    monkeypatch.setattr(products, "_used", {})
    assert settle(tmp_path / "another run", keeps=False) == "float"
    assert not (tmp_path / "another run").exists()


def test_every_rank_uses_that_of_the_main_rank(tmp_path: Path, machine: list[str]) -> None:
    machine[0] = "float"  # this rank's own finding
    found = {"source": "the main rank", "seconds": {"onednn": 0.1}}
    main = {"sums": {"way": "onednn", **found}, "products": {"way": "float", **found}}
    assert settle(tmp_path, world_of(rank=1, main=main)) == "onednn"
    assert products.choice("products").way == "float"
    assert not list(tmp_path.iterdir())


def test_a_way_that_a_rank_does_not_have_is_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert settle(tmp_path, world_of(offers=[ALL, ("onednn", "float")])) == "onednn"
    assert "mkl (measured) is unavailable on some ranks, onednn is used" in caplog.text
    assert json.loads((tmp_path / FILE).read_text()) == {"sums": "onednn", "products": "torch"}


def test_the_variable_overrides_the_run_folder_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    settle(tmp_path)
    monkeypatch.setattr(products, "_used", {})
    monkeypatch.setenv(products.VARIABLE, "float")
    with caplog.at_level(logging.WARNING):
        assert settle(tmp_path) == "float"
    assert "instead of the mkl that the run began with" in caplog.text
    monkeypatch.setattr(products, "_used", {})
    monkeypatch.setenv(products.VARIABLE, "abacus")
    with pytest.raises(RecipeError, match="'abacus' is no way of bf16 products"):
        settle(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"sums": "abacus", "products": "torch"}'])
def test_a_damaged_file_is_reported(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / FILE).write_text(text)
    with caplog.at_level(logging.WARNING):
        assert settle(tmp_path) == "mkl"
    assert "the ways are chosen anew" in caplog.text
    assert json.loads((tmp_path / FILE).read_text()) == {"sums": "mkl", "products": "torch"}


def test_nothing_is_measured_in_fp32(tmp_path: Path) -> None:
    settle_products(tmp_path, world_of(), EngineConfig(precision="fp32"), keeps=True)
    assert not products._used
    assert not list(tmp_path.iterdir())
