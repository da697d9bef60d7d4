"""Sharded storage: any tiling reads any other, and all damage to a folder is detected."""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nemocascade.megatron.checkpoint import CheckpointError, clean_leftovers, storage, streaming
from nemocascade.megatron.checkpoint.boxes import Box, boxes_of_range, first_overlap
from nemocascade.megatron.checkpoint.errors import NonFiniteWeightsError, storage_problem
from nemocascade.megatron.checkpoint.folder import (
    MANIFEST,
    digest_of,
    read_folder,
    read_manifest,
)
from nemocascade.megatron.checkpoint.index import (
    DTYPE_NAMES,
    Index,
    index_from_json,
    index_to_json,
    merge_indices,
)
from nemocascade.megatron.checkpoint.storage import (
    Reader,
    TensorShard,
    covering_problem,
    write_shards,
)
from nemocascade.megatron.checkpoint.streaming import FolderStream
from nemocascade.megatron.checkpoint.weights import fill
from nemocascade.megatron.checkpoint.writing import write_folder
from nemocascade.megatron.world import start_world
from nemocascade.recipe import EngineConfig, ParallelConfig
from nemocascade.runtime.world import World


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), EngineConfig(precision="fp32"))
    yield world
    world.close()


def random_tiling(rng: random.Random, shape: tuple[int, ...], cuts: int) -> list[Box]:
    """The whole of `shape` cut `cuts` times, each time one box across one axis."""
    boxes = [Box((0,) * len(shape), shape)]
    for _ in range(cuts):
        box = boxes.pop(rng.randrange(len(boxes)))
        axes = [i for i, n in enumerate(box.size) if n > 1]
        if not axes:
            boxes.append(box)
            continue
        axis = rng.choice(axes)
        at = rng.randrange(1, box.size[axis])
        rest = list(box.offset)
        rest[axis] += at
        low, high = list(box.size), list(box.size)
        low[axis], high[axis] = at, box.size[axis] - at
        boxes += [Box(box.offset, tuple(low)), Box(tuple(rest), tuple(high))]
    return boxes


def strided(values: torch.Tensor) -> torch.Tensor:
    """The same values in memory with gaps, as a slice of a fused weight has them."""
    if not values.ndim:
        return values.clone()
    buffer = torch.empty([2 * n + 1 for n in values.shape], dtype=values.dtype)
    view = buffer[tuple(slice(1, None, 2) for _ in values.shape)]
    return view.copy_(values)


def random_tensor(rng: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    values = torch.randint(0, 100, shape, generator=generator)
    return values.to(dtype) if not dtype.is_floating_point else (values / 7).to(dtype)


def shards_of(key: str, full: torch.Tensor, tiling: list[Box]) -> list[TensorShard]:
    return [TensorShard(key, tuple(full.shape), b, strided(full[b.slices()])) for b in tiling]


@pytest.mark.parametrize("seed", range(12))
def test_any_tiling_reads_any_other(
    seed: int, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    # Copies of a few elements, so that every tensor is written and read in many of them.
    limit = rng.choice([64, 256, 1 << 20])
    monkeypatch.setattr(storage, "CHUNK_BYTES", limit)
    monkeypatch.setattr(streaming, "CHUNK_BYTES", limit)
    monkeypatch.setattr(streaming, "SMALLEST_CHUNK", limit)
    shapes = [(), (1,), (13,), (7, 9), (4, 6, 5), (3, 1, 4, 2)]
    tensors = {
        f"w{i}": random_tensor(rng, shape, rng.choice(list(DTYPE_NAMES)))
        for i, shape in enumerate(shapes)
    }
    ranks: list[list[TensorShard]] = [[], [], []]
    for key, full in tensors.items():
        for shard in shards_of(key, full, random_tiling(rng, tuple(full.shape), 6)):
            rng.choice(ranks).append(shard)
    written = [write_shards(tmp_path, f"{i}.safetensors", p) for i, p in enumerate(ranks)]
    index, problems = merge_indices([w.index for w in written])
    assert problems == []
    names = {w.name for w in written}
    assert index_from_json(json.loads(json.dumps(index_to_json(index))), names) == index
    with Reader(tmp_path, index) as reader:
        for key, full in tensors.items():
            for box in random_tiling(rng, tuple(full.shape), 5):
                memory = strided(torch.zeros(box.size, dtype=full.dtype))
                shard = TensorShard(key, tuple(full.shape), box, memory)
                assert covering_problem(index, shard) is None
                reader.read_into(shard)
                assert torch.equal(memory, full[box.slices()])
    files = {w.name: {"sha256": w.sha256, "bytes": w.size} for w in written}
    wanted = [
        TensorShard(key, tuple(full.shape), b, strided(torch.zeros(b.size, dtype=full.dtype)))
        for key, full in tensors.items()
        for b in random_tiling(rng, tuple(full.shape), 5)
    ]
    stream = FolderStream(tmp_path, world, files, index)
    assert stream.open() == []
    assert stream.fill(wanted, [[(p.key, p.box) for p in wanted]]) == []
    for shard in wanted:
        assert torch.equal(shard.tensor, tensors[shard.key][shard.box.slices()])


def test_files_are_plain_safetensors_and_hashes_are_of_the_file(tmp_path: Path) -> None:
    import hashlib

    full = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    shards = [
        *shards_of("a", full, [Box((0, 0), (3, 4))]),
        *shards_of("s", torch.tensor(7.5), [Box((), ())]),
    ]
    written = write_shards(tmp_path, "f.safetensors", shards)
    data = (tmp_path / "f.safetensors").read_bytes()
    assert (written.size, written.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    tensors = load_file(tmp_path / "f.safetensors")
    assert torch.equal(tensors["a@0,0"], full)
    assert tensors["s@"] == 7.5


def test_flat_ranges_become_boxes() -> None:
    for shape in [(), (5,), (2, 3), (3, 4, 2), (2, 1, 3, 2)]:
        count = math.prod(shape)
        flat = torch.arange(count).reshape(shape)
        for start, stop in itertools.combinations(range(count + 1), 2):
            boxes = boxes_of_range(shape, start, stop)
            values = [flat[b.slices()].reshape(-1) for b in boxes]
            assert torch.cat(values).tolist() == list(range(start, stop))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_split_keeps_row_major_order_and_the_bound() -> None:
    full = torch.arange(4 * 5 * 6).reshape(4, 5, 6)
    whole = Box((0, 0, 0), (4, 5, 6))
    for limit in (1, 4, 6, 13, 30, 45, 1000):
        boxes = whole.split(limit)
        assert torch.cat([full[b.slices()].reshape(-1) for b in boxes]).tolist() == list(range(120))
        assert all(b.volume <= limit for b in boxes)


def test_overlaps_and_gaps_are_found(tmp_path: Path) -> None:
    full = torch.zeros(4, 4)
    left, right = Box((0, 0), (4, 2)), Box((0, 2), (4, 2))
    assert first_overlap([left, right]) is None
    assert first_overlap([left, Box((3, 1), (1, 1))]) is not None

    def problems(*boxes: Box) -> str:
        parts = []
        for i, box in enumerate(boxes):
            parts.append(write_shards(tmp_path, f"{i}.safetensors", shards_of("w", full, [box])))
        return "; ".join(merge_indices([p.index for p in parts])[1])

    assert problems(left, right) == ""
    assert "8 of 16 elements" in problems(left)
    assert "overlap" in problems(left, Box((0, 1), (4, 3)))


FIELDS: dict[str, Any] = {
    "step": 1,
    "optimizer_step": 1,
    "precision": "fp32",
    "model": {},
    "model_sha256": "",
    "layout": {},
}
FULL = {
    "model/a": torch.arange(24.0).reshape(6, 4),
    "model/b": torch.arange(5, dtype=torch.bfloat16),
}


def whole_shards(tensors: dict[str, torch.Tensor]) -> list[TensorShard]:
    return [
        TensorShard(k, tuple(t.shape), Box((0,) * t.ndim, tuple(t.shape)), t.clone())
        for k, t in tensors.items()
    ]


@pytest.fixture
def folder(world: World, tmp_path: Path) -> Path:
    path = tmp_path / "step_00000001"
    write_folder(path, world, "checkpoint", whole_shards(FULL), {"extra.json": b'{"x": 1}'}, FIELDS)
    return path


def read_back(folder: Path, world: World, tensors: dict[str, torch.Tensor]) -> list[TensorShard]:
    shards = whole_shards({k: torch.zeros_like(t) for k, t in tensors.items()})
    manifest, index = read_folder(folder, world, "checkpoint")
    fill(folder, world, manifest["files"], index, shards, [])
    return shards


def error_of(folder: Path, world: World, tensors: dict[str, torch.Tensor] = FULL) -> str:
    with pytest.raises(CheckpointError) as error:
        read_back(folder, world, tensors)
    return str(error.value)


def test_a_whole_folder_is_read_back(folder: Path, world: World) -> None:
    for shard in read_back(folder, world, FULL):
        assert torch.equal(shard.tensor, FULL[shard.key])


NAMES = ["rank_00000.safetensors", "index.json", "extra.json", MANIFEST]


@pytest.mark.parametrize("name", NAMES)
def test_every_altered_byte_is_an_error(folder: Path, world: World, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    rng = random.Random(0)
    for position in {0, len(data) - 1, *(rng.randrange(len(data)) for _ in range(12))}:
        changed = bytearray(data)
        changed[position] ^= 1
        path.write_bytes(changed)
        assert name in error_of(folder, world), position
    path.write_bytes(data)
    read_back(folder, world, FULL)


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_truncated_files_are_errors(folder: Path, world: World, name: str) -> None:
    path = folder / name
    data = path.read_bytes()
    path.write_bytes(data[:-3])
    assert name in error_of(folder, world)
    path.unlink()
    assert f"{name} is missing" in error_of(folder, world)


def test_all_broken_parts_are_named_at_once(folder: Path, world: World) -> None:
    (folder / "extra.json").unlink()
    (folder / "index.json").write_bytes(b"{}")
    data = bytearray((folder / "rank_00000.safetensors").read_bytes())
    data[-1] ^= 255
    (folder / "rank_00000.safetensors").write_bytes(data)
    (folder / "rank_00009.safetensors").write_bytes(b"?")
    message = error_of(folder, world)
    for part in ("extra.json is missing", "index.json has", "rank_00000.safetensors was altered"):
        assert part in message
    assert "rank_00009.safetensors is foreign" in message


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest and make its digest right again."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["digest"]
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps({**manifest, "digest": digest_of(manifest)}))


def test_unknown_versions_and_other_kinds_are_errors(folder: Path, world: World) -> None:
    rewrite_manifest(folder, lambda m: m.update(version=99))
    assert "version 99, this program reads" in error_of(folder, world)
    rewrite_manifest(folder, lambda m: m.update(version=1, kind="artifact"))
    assert "kind 'artifact', not 'checkpoint'" in error_of(folder, world)


def resign(folder: Path, name: str, data: bytes) -> None:
    """Replace a file, and make the manifest right again, as an attacker would."""
    (folder / name).write_bytes(data)
    record = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    rewrite_manifest(folder, lambda m: m["files"].update({name: record}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda i: i["files"].__setitem__(0, "../other/rank_00000.safetensors"),
            "not a file of this",
        ),
        (lambda i: i["files"].__setitem__(0, "/etc/passwd"), "not a file of this folder"),
        (lambda i: i.pop("files"), "not an index of tensors"),
        (lambda i: i["tensors"]["model/a"].update(shape="x"), "index.json: "),
        (lambda i: i["tensors"]["model/a"].update(shape=[7, 4]), "24 of 28 elements"),
        (lambda i: i["tensors"]["model/a"].update(dtype="F7"), "'F7' is not a dtype"),
        (lambda i: i["tensors"]["model/a"]["pieces"][0].update(file=5), "not an index of tensors"),
        (lambda i: i["tensors"].update({"model/a": None}), "not an index of tensors"),
        (lambda i: i["tensors"]["model/a"]["pieces"][0].update(name="gone"), "cannot be read"),
        (lambda i: i["tensors"]["model/a"].update(shape=[6.0, 4]), "not an index of tensors"),
        (lambda i: i["tensors"]["model/a"].update(shape=[True, 24]), "not an index of tensors"),
        (lambda i: i["tensors"]["model/a"].update(shape=[-6, -4]), "not an index of tensors"),
        (lambda i: i["tensors"]["model/a"].update(shape=[2**64]), "not an index of tensors"),
        (lambda i: i["tensors"]["model/a"].update(dtype=[]), "'[]' is not a dtype"),
        (
            lambda i: i["tensors"]["model/a"]["pieces"][0].update(size="64"),
            "not an index of tensors",
        ),
    ],
)
def test_a_malformed_index_is_an_error(
    folder: Path, world: World, change: Callable[[Any], object], said: str
) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    resign(folder, "index.json", json.dumps(index).encode())
    assert said in error_of(folder, world)


@pytest.mark.parametrize("data", [b"", b"[]", b"[" * 10_000, b"\xff", b"{}"])
def test_what_is_not_an_index_is_an_error(folder: Path, world: World, data: bytes) -> None:
    resign(folder, "index.json", data)
    assert "index.json: " in error_of(folder, world)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 64, (8).to_bytes(8, "little") + b'{"a": 1', b"\0" * 8]
)
def test_a_malformed_weights_file_is_an_error(folder: Path, world: World, data: bytes) -> None:
    resign(folder, "rank_00000.safetensors", data)
    assert "rank_00000.safetensors: tensor" in error_of(folder, world)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h.pop("model/a@0,0"), "the file has no tensor 'model/a@0,0'"),
        (lambda h: h["model/a@0,0"].update(shape=[4, 6]), "not of the shape that the index says"),
        (lambda h: h["model/a@0,0"].update(dtype="I32"), "not of the shape that the index says"),
        (lambda h: h["model/a@0,0"].update(data_offsets=[8, 104]), "is at byte 8, not at 0"),
        (lambda h: h["model/a@0,0"].update(data_offsets=[0, 96.0]), "is at byte 0"),
        (lambda h: h["model/a@0,0"].update(data_offsets=7), "cannot be read"),
        (lambda h: h.update(x=None), "cannot be read"),
        (lambda h: h.update(x={"dtype": "U8", "shape": [9], "data_offsets": [0, 0]}), ""),
    ],
)
def test_a_header_that_is_not_that_of_the_index_is_an_error(
    folder: Path, world: World, change: Callable[[dict[str, Any]], object], said: str
) -> None:
    data = (folder / "rank_00000.safetensors").read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    data = len(text).to_bytes(8, "little") + text + data[end:]
    resign(folder, "rank_00000.safetensors", data)
    if said:
        assert said in error_of(folder, world)
    else:
        read_back(folder, world, FULL)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.pop("files"), "lists no files"),
        (lambda m: m.update(files=[]), "lists no files"),
        (lambda m: m["files"].update({"../x": {"sha256": "", "bytes": 0}}), "file '../x'"),
        (lambda m: m["files"].update({"index.json": 3}), "wrong entry for the file 'index.json'"),
        (lambda m: m["files"].update({"x" * 300: {"sha256": "", "bytes": 0}}), "file 'xxx"),
        (lambda m: m["files"].update({"": {"sha256": "", "bytes": 0}}), "file ''"),
        (lambda m: m["files"].update({"\0": {"sha256": "", "bytes": 0}}), r"file '\x00'"),
        (lambda m: m["files"].update({"\ud83d": {"sha256": "", "bytes": 0}}), r"file '\ud83d'"),
        (lambda m: m.update(layout=7), "layout(7), which is of another type"),
        (lambda m: m.pop("step"), "has no 'step'"),
    ],
)
def test_a_malformed_manifest_is_an_error(
    folder: Path, world: World, change: Callable[[Any], object], said: str
) -> None:
    rewrite_manifest(folder, change)
    assert said in error_of(folder, world)


def test_a_manifest_with_nan_is_altered(folder: Path, world: World) -> None:
    path = folder / "manifest.json"
    path.write_text(path.read_text().replace('"step": 1', '"step": NaN'))
    assert "was altered" in error_of(folder, world)


def test_a_full_disk_names_the_file(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nemocascade.megatron.checkpoint.storage.os.fsync", full)
    found = r"No space left on device.*rank_00000\.safetensors"
    with pytest.raises(CheckpointError, match=found) as caught:
        write_folder(folder, world, "checkpoint", whole_shards(FULL), {}, FIELDS)
    assert caught.value.exit_code == 75, "a job starts again"


@pytest.mark.parametrize(
    ("code", "wanted"),
    [(errno.EIO, 75), (errno.ESTALE, 75), (errno.EDQUOT, 75), (errno.EACCES, 2), (errno.ENOENT, 2)],
)
def test_an_error_of_the_file_system_that_may_pass_asks_for_a_further_start(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch, code: int, wanted: int
) -> None:
    read = Path.read_text

    def broken(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == "manifest.json":
            raise OSError(code, os.strerror(code), str(path))
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", broken)
    with pytest.raises(CheckpointError) as caught:
        read_folder(folder, world, "checkpoint")
    assert caught.value.exit_code == wanted


@pytest.mark.parametrize("first", [1, 2], ids=["header", "data"])
@pytest.mark.parametrize(("code", "wanted"), [(errno.EIO, 75), (errno.EACCES, 2)])
def test_so_does_one_that_is_met_in_the_weights(
    folder: Path, world: World, monkeypatch: pytest.MonkeyPatch, first: int, code: int, wanted: int
) -> None:
    manifest, index = read_folder(folder, world, "checkpoint")
    opened, opens = Path.open, itertools.count(1)

    def broken(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.suffix == ".safetensors" and next(opens) >= first:
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", broken)
    with pytest.raises(CheckpointError, match=os.strerror(code)) as caught:
        fill(folder, world, manifest["files"], index, whole_shards(FULL), [])
    assert caught.value.exit_code == wanted


def test_one_lasting_problem_ends_the_job() -> None:
    passing = storage_problem("rank 1: EIO", OSError(errno.EIO, "EIO"))
    problems = pickle.loads(pickle.dumps([passing, "rank 2: its shards do not tile"]))
    assert CheckpointError("here", problems[:1]).exit_code == 75
    assert CheckpointError("here", problems).exit_code == 2
    assert NonFiniteWeightsError("here", ["NaN"]).exit_code == 3


def test_every_differing_tensor_is_named(folder: Path, world: World) -> None:
    other = {"model/a": torch.zeros(6, 5), "model/c": torch.zeros(2)}
    message = error_of(folder, world, other)
    assert "model/b is foreign" in message
    assert "model/c is missing" in message
    assert "model/a has shape [6, 4], this run needs [6, 5]" in message
    halved = {**FULL, "model/b": FULL["model/b"].float()}
    assert "model/b has dtype BF16, this run needs F32" in error_of(folder, world, halved)


def test_an_error_changes_nothing(folder: Path, world: World) -> None:
    manifest, index = read_folder(folder, world, "checkpoint")
    shards = whole_shards({**FULL, "model/c": torch.zeros(2)})
    for shard in shards:
        shard.tensor.fill_(3)
    with pytest.raises(CheckpointError):
        fill(folder, world, manifest["files"], index, shards, [])
    assert all(bool((p.tensor == 3).all()) for p in shards)


def test_a_part_that_no_file_holds_is_an_error(tmp_path: Path) -> None:
    half = shards_of("w", torch.zeros(4, 4), [Box((0, 0), (2, 4))])
    index: Index = write_shards(tmp_path, "f.safetensors", half).index
    wanted = TensorShard("w", (4, 4), Box((1, 0), (2, 4)), torch.zeros(2, 4))
    problem = covering_problem(index, wanted)
    assert problem is not None
    assert "4 of the 8 elements" in problem


def test_a_failed_save_leaves_the_old_folder(folder: Path, world: World) -> None:
    before = read_manifest(folder, "checkpoint")
    torn = shards_of("w", torch.zeros(4, 4), [Box((0, 0), (2, 4))])
    with pytest.raises(CheckpointError, match="8 of 16 elements"):
        write_folder(folder, world, "checkpoint", torn, {}, {"step": 2})
    assert read_manifest(folder, "checkpoint") == before
    assert clean_leftovers(folder.parent) == []


def test_replacing_a_folder(folder: Path, world: World) -> None:
    changed = {k: t + 1 for k, t in FULL.items()}
    write_folder(folder, world, "checkpoint", whole_shards(changed), {}, {**FIELDS, "step": 2})
    assert read_manifest(folder, "checkpoint")["step"] == 2
    assert not (folder / "extra.json").exists()
    for shard in read_back(folder, world, FULL):
        assert torch.equal(shard.tensor, changed[shard.key])
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_leftovers_are_cleaned(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step_00000002").mkdir()
    (tmp_path / ".tmp-step_00000002" / "rank_00000.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-latest").write_bytes(b"step")
    (tmp_path / "step_00000001").mkdir()
    assert clean_leftovers(tmp_path) == [".tmp-latest", ".tmp-step_00000002"]
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
