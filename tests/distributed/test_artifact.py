"""Artifacts: their manifest, loading on every layout, and rejected ones."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.checkpoint_jobs import make_trainer, poison, small_model
from helpers.ranks import run_ranks
from helpers.stored import unequal

from nemocascade.megatron.artifact import (
    Provenance,
    artifact_model,
    load_artifact_weights,
    read_artifact,
    read_artifact_together,
    verify_artifact,
    write_artifact,
)
from nemocascade.megatron.checkpoint import CheckpointError
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig
from nemocascade.runtime.world import World
from nemocascade.train.trainer import Trainer
from nemocascade.types import Artifact

MADE_BY: dict[str, Any] = {
    "stage": "sft",
    "step": 12,
    "recipe": {"steps": 12, "data": {"path": ["a.jsonl"]}},
    "data": {"documents": 3},
    "scores": {"heldout_loss": 1.25},
    "parent": "runs/base/artifact",
    "parent_digest": "ab" * 32,
}


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


@pytest.fixture(scope="module")
def trainer(world: World) -> Trainer:
    return make_trainer({"seed": 1}, world)


@pytest.fixture
def artifact(world: World, trainer: Trainer, tmp_path: Path) -> Artifact:
    tokenizer = tmp_path / "my.model"
    tokenizer.write_bytes(b"pieces")
    folder = tmp_path / "artifact"
    return write_artifact(folder, world, trainer.chunks, Provenance(**MADE_BY), tokenizer=tokenizer)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in trainer.modules[0].state_dict().items() if v is not None}


def test_it_says_what_made_it(artifact: Artifact) -> None:
    again = read_artifact(artifact.folder)
    assert again == artifact
    for name, value in MADE_BY.items():
        assert getattr(again, name) == value
    assert artifact_model(again) == small_model("relu2")
    assert again.precision == "fp32"
    assert again.tokenizer_path is not None
    assert again.tokenizer_path.name == "tokenizer.model"
    assert again.tokenizer_path.read_bytes() == b"pieces"


def test_weights_of_the_same_size_are_verified_by_their_hash(artifact: Artifact) -> None:
    assert verify_artifact(artifact.folder) == artifact
    path = artifact.folder / "rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert read_artifact(artifact.folder) == artifact
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors was altered"):
        verify_artifact(artifact.folder)


def test_a_tokenizer_json_brings_its_companions(
    world: World, trainer: Trainer, tmp_path: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "other.json"):
        (tmp_path / name).write_text("{}")
    written = write_artifact(
        tmp_path / "artifact",
        world,
        trainer.chunks,
        Provenance(**MADE_BY),
        tokenizer=tmp_path / "tokenizer.json",
    )
    names = {p.name for p in written.folder.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert "other.json" not in names


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_and_main_parameters_follow(
    artifact: Artifact, world: World, trainer: Trainer, precision: str, distributed: bool
) -> None:
    job = {"seed": 2, "precision": precision, "distributed": distributed}
    other = make_trainer(job, world)
    load_artifact_weights(artifact, world, other.chunks, other.optimizer)
    expected = weights(trainer)
    for name, value in weights(other).items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
    # A step of no length writes the optimizer's own copy of the weights back.
    for chunk in other.chunks:
        chunk.zero_grad_buffer()
    other.optimizer.zero_grad()
    other.optimizer.step(0.0)
    for name, value in weights(other).items():
        assert torch.equal(value, expected[name].to(value.dtype)), name


@pytest.mark.parametrize("shape", ["relu2", "swiglu", "tied"])
def test_nothing_is_drawn_where_weights_are_loaded(
    shape: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without initial values, loading fills every weight, and the generators stay as they are."""
    draws: list[str] = []
    for name in ("normal_", "uniform_"):
        draw = getattr(torch.Tensor, name)

        def counting(self: torch.Tensor, *args: Any, _draw: Any = draw, **kw: Any) -> torch.Tensor:
            draws.append(_draw.__name__)
            drawn: torch.Tensor = _draw(self, *args, **kw)
            return drawn

        monkeypatch.setattr(torch.Tensor, name, counting)
    first = make_trainer({"shape": shape, "seed": 1}, world)
    assert {"normal_", "uniform_"} <= set(draws)
    artifact = write_artifact(tmp_path / "artifact", world, first.chunks, Provenance(**MADE_BY))
    draws.clear()
    before = torch.get_rng_state()
    job = {"shape": shape, "seed": 1, "precision": "bf16", "initialise": False}
    other = make_trainer(job, world)
    assert not draws
    assert torch.equal(torch.get_rng_state(), before)
    poison(other)
    load_artifact_weights(artifact, world, other.chunks, other.optimizer)
    expected = weights(first)
    for name, value in weights(other).items():
        assert torch.equal(value, expected[name].to(value.dtype)), name
    assert all(bool(t.isfinite().all()) for t in other.optimizer.state_tensors())


def test_a_run_named_in_place_of_its_artifact_is_told(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="not a complete artifact; name the folder artifact of"
    ):
        read_artifact(tmp_path)
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=rf"is missing: .*; name {tmp_path}/artifact"):
        read_artifact(tmp_path)
    with pytest.raises(CheckpointError, match=r"is missing"):
        read_artifact(tmp_path / "artifact" / "manifest.json")


def test_damage_is_rejected(artifact: Artifact, world: World, trainer: Trainer) -> None:
    path = artifact.folder / "tokenizer.model"
    path.write_bytes(b"Pieces")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model was altered"):
        read_artifact(artifact.folder)
    path.write_bytes(b"pieces")
    data = artifact.folder / "rank_00000.safetensors"
    changed = bytearray(data.read_bytes())
    changed[-1] ^= 1
    data.write_bytes(changed)
    opened = read_artifact(artifact.folder)
    fresh = make_trainer({"seed": 2}, world)
    with pytest.raises(CheckpointError, match=r"rank_00000\.safetensors was altered"):
        load_artifact_weights(opened, world, fresh.chunks)


def test_another_model_and_a_changed_artifact_are_rejected(
    artifact: Artifact, world: World, trainer: Trainer
) -> None:
    wider = make_trainer({"model": {"mlp_width": 64}}, world)
    with pytest.raises(CheckpointError, match=r"model\.mlp_width is 64 in this run and 48"):
        load_artifact_weights(artifact, world, wider.chunks)
    made_by = {**MADE_BY, "step": 13}
    newer = write_artifact(artifact.folder, world, trainer.chunks, Provenance(**made_by))
    assert newer.digest != artifact.digest
    with pytest.raises(CheckpointError, match="another artifact than the one that was opened"):
        load_artifact_weights(artifact, world, trainer.chunks)


def test_unknown_model_settings_are_rejected(artifact: Artifact) -> None:
    from dataclasses import replace

    strange = replace(artifact, model={**artifact.model, "num_eyes": 3})
    with pytest.raises(CheckpointError, match=r"model\.num_eyes is a setting this program"):
        artifact_model(strange)


def copy_artifact(source: str, target: str, parallel: dict[str, Any]) -> None:
    """Read an artifact into a fresh model on this layout and write it from there."""
    world = start_world(ParallelConfig(**parallel), EngineConfig(timeout_s=300))
    trainer = make_trainer({"seed": 5}, world)
    load_artifact_weights(read_artifact(Path(source)), world, trainer.chunks)
    write_artifact(Path(target), world, trainer.chunks, Provenance(**MADE_BY))


def test_other_layouts_read_and_write_the_same_weights(artifact: Artifact, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    arguments = {"source": str(artifact.folder), "target": str(target)}
    run_ranks(copy_artifact, 2, {**arguments, "parallel": {"tp": 2, "ep": 2}})
    assert (target / "rank_00001.safetensors").exists()
    assert unequal(target, artifact.folder) == []
    layout = json.loads((target / "manifest.json").read_text())["layout"]
    assert (layout["world"], layout["tp"], layout["ep"]) == (2, 2, 2)


class CountedFile(io.FileIO):
    """A file that counts the bytes that are read, in `counts`, by the name of the file."""

    counts: ClassVar[dict[str, int]] = {}

    def _count(self, number: int) -> None:
        name = Path(str(self.name)).name
        self.counts[name] = self.counts.get(name, 0) + number

    def readinto(self, buffer: Any) -> int:
        found = super().readinto(buffer)
        self._count(found)
        return found

    def read(self, size: int | None = -1) -> bytes:
        found = super().read(-1 if size is None else size)
        self._count(len(found))
        return found

    def readall(self) -> bytes:
        found = super().readall()
        self._count(len(found))
        return found


def count_reads() -> dict[str, int]:
    """Count all bytes that this process reads by paths, and reject reads by memory maps."""
    from nemocascade.megatron.checkpoint import storage

    plain = Path.open

    def counted(self: Path, mode: str = "r", buffering: int = -1, **settings: Any) -> Any:
        if "w" in mode or "a" in mode:
            return plain(self, mode, buffering, **settings)
        raw = CountedFile(self)
        if buffering == 0:
            return raw
        file = io.BufferedReader(raw)
        return file if "b" in mode else io.TextIOWrapper(file, encoding=settings.get("encoding"))

    def rejected(*_: Any, **__: Any) -> None:
        raise AssertionError("a load maps no file: its bytes would be read again")

    replaced: list[tuple[Any, str, Any]]
    replaced = [(Path, "open", counted), (storage, "safe_open", rejected)]
    for owner, name, function in replaced:
        setattr(owner, name, function)
    return CountedFile.counts


def bytes_read(folder: str, layouts: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Bytes that this rank reads of each file to load an artifact on each layout."""
    from helpers.ranks import join_group

    from nemocascade.megatron.checkpoint import streaming

    # Files of several rounds.
    for name in ("CHUNK_BYTES", "SMALLEST_CHUNK"):
        setattr(streaming, name, 3000)
    counts, base = count_reads(), folder
    found: list[dict[str, int]] = []
    for number, layout in enumerate(layouts):
        join_group(f"world {number}")
        world = start_world(ParallelConfig(**layout), EngineConfig(precision="fp32"))
        fresh = make_trainer({"seed": 2, "initialise": False}, world)
        poison(fresh)
        counts.clear()
        artifact = read_artifact_together(Path(folder), world)
        load_artifact_weights(artifact, world, fresh.chunks, fresh.optimizer)
        found.append(dict(counts))
        # The manifest covers every byte, so equal files are equal weights.
        again = Path(f"{base}.{number}")
        write_artifact(again, world, fresh.chunks, Provenance(**MADE_BY))
        # The next layout reads what several ranks wrote.
        folder = str(again)
        world.close()
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_storage_is_read_once(ranks: int, world: World, trainer: Trainer, tmp_path: Path) -> None:
    """Hashes count too. Small files apart, which are as large as the tiny model's weights."""
    folder = tmp_path / "artifact"
    tokenizer = tmp_path / "my.model"
    tokenizer.write_bytes(b"pieces" * 1000)
    made_by = Provenance(**MADE_BY)
    write_artifact(folder, world, trainer.chunks, made_by, tokenizer=tokenizer)
    layouts: list[dict[str, Any]] = (
        [{}, {"ep": 2}, {"tp": 2, "ep": 2}]
        if ranks == 2
        else [{}, {"ep": 2}, {"tp": 2, "ep": 2}, {"pp": 2}, {"tp": 2, "etp": 2}]
    )
    each = run_ranks(bytes_read, ranks, {"folder": str(folder), "layouts": layouts})
    source = folder
    for number, layout in enumerate(layouts):
        counts = [found[number] for found in each]
        for part in source.glob("*.safetensors"):
            read = [found.get(part.name, 0) for found in counts]
            assert sum(read) <= 1.1 * part.stat().st_size, (layout, part.name)
            assert sum(read) == max(read) == part.stat().st_size, (layout, part.name)
        if number == 0:
            assert sum(found.get("tokenizer.model", 0) for found in counts) <= 2 * 6000
        source = Path(f"{folder}.{number}")
        assert unequal(folder, source) == [], layout


def load_damaged(folder: str) -> list[str]:
    """The problems that this rank is told when it loads an artifact."""
    world = start_world(ParallelConfig(tp=2), EngineConfig(precision="fp32", timeout_s=300))
    fresh = make_trainer({"seed": 2, "initialise": False}, world)
    try:
        load_artifact_weights(read_artifact_together(Path(folder), world), world, fresh.chunks)
    except CheckpointError as error:
        return error.problems
    finally:
        world.close()
    return []


@pytest.mark.parametrize("name", ["rank_00000.safetensors", "index.json", "tokenizer.model"])
def test_every_rank_rejects_what_is_damaged(artifact: Artifact, name: str) -> None:
    path = artifact.folder / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    every = run_ranks(load_damaged, 2, {"folder": str(artifact.folder)})
    assert every[0] == every[1] == [f"{name} was altered: its sha256 does not match the manifest"]
