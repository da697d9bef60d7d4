"""`nemocascade data build`: the folder, its shards, resuming, and what a stage accepts."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.data import (
    huggingface_tokenizer,
    qa_rows,
    sentencepiece_tokenizer,
    write_jsonl,
)

from nemocascade.data import build_jobs
from nemocascade.data.build_jobs import build, run_build
from nemocascade.data.building import (
    BuildPlan,
    join_shards,
    plan_build,
    tokenize_shard,
    work_folder,
)
from nemocascade.data.built import verify_built
from nemocascade.data.cache import TokenCache, build_cache
from nemocascade.data.cache_files import CacheDamagedError
from nemocascade.data.documents import build_data, open_data
from nemocascade.data.loader import PackedLoader
from nemocascade.data.readers import find_sources
from nemocascade.plan.findings import Preflight
from nemocascade.plan.preflight import check_data, check_files
from nemocascade.recipe import SftRecipe
from nemocascade.recipe.build import BuildSettings, BuildSlurmConfig
from nemocascade.recipe.data import DataConfig, TokenizerConfig
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import read_chunks
from nemocascade.runtime.row_parts import lines_of_part, parts_of
from nemocascade.runtime.run_lock import FolderInUseError, RunLock

SIZE = 2000
"""Bytes of a shard."""


def _build(output: Path, config: DataConfig, *, size: int = SIZE, seed: int = 1) -> Path:
    """Build a folder in this process, the last shard first."""
    plan = plan_build(output, config, sentencepiece_tokenizer(), seed=seed, size=size)
    for number in reversed(range(len(plan.shards))):
        tokenize_shard(work_folder(output), number)
    join_shards(work_folder(output), output)
    return output


def _mixed(folder: Path) -> str:
    """Rows in files of every kind: parts of large files, groups of small ones."""
    folder.mkdir()
    rows = qa_rows(120)
    write_jsonl(folder / "a.jsonl", ["", *rows[:50], "", "  "])
    for i in range(5):
        write_jsonl(folder / f"b{i}.jsonl", rows[50 + 2 * i : 52 + 2 * i])
    (folder / "c.json").write_text(json.dumps(rows[60:80]))
    table = pyarrow.Table.from_pylist(rows[80:100])
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=3)
    write_jsonl(folder / "e.jsonl", rows[100:])
    with pyarrow.CompressedOutputStream(folder / "f.jsonl.zst", "zstd") as stream:
        stream.write((folder / "e.jsonl").read_bytes())
    return str(folder)


def _documents(cache: TokenCache) -> list[tuple[list[int], list[bool], str]]:
    found = (cache.document(i) for i in range(len(cache)))
    return [(d.tokens.tolist(), d.trained.tolist(), d.source) for d in found]


@pytest.mark.parametrize("max_rows", [0, 150])
def test_a_folder_holds_what_a_stage_reads_from_the_rows(tmp_path: Path, max_rows: int) -> None:
    paths = (_mixed(tmp_path / "rows"), *["synthetic:arithmetic"] * (max_rows > 0))
    config = DataConfig(path=paths, heldout_rows=5, max_rows=max_rows)
    folder = _build(tmp_path / "out", config)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    assert (len(shards) > 8) == (not max_rows)
    built = replace(config, path=(str(folder),))
    tokenizer = sentencepiece_tokenizer()
    raw = build_data(config, tokenizer, tmp_path / "cache", seed=1)
    expected = _documents(raw.train.cache)
    assert len(expected) == (max_rows or 140)
    for data in (
        build_data(built, tokenizer, tmp_path / "none", seed=1),
        open_data(built, tokenizer, tmp_path / "none", seed=1),
    ):
        assert _documents(data.train.cache) == expected
        assert data.train.fingerprint == raw.train.fingerprint
        for name in ("trained", "first_trained", "lengths"):
            mine, theirs = getattr(data.train.cache, name), getattr(raw.train.cache, name)
            assert np.array_equal(mine, theirs)
        assert data.heldout is not None
        assert raw.heldout is not None
        assert data.heldout.indices.tolist() == raw.heldout.indices.tolist()
    assert not (tmp_path / "none").exists()
    assert not list(work_folder(folder).rglob("*.bin"))


def test_packs_are_those_of_the_rows_and_a_run_goes_on_with_either(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", qa_rows(400))
    config = DataConfig(
        path=(str(path),), capacity=300, sequences_per_step=4, balance_group=4, heldout_rows=0
    )
    folder = _build(tmp_path / "out", config)
    loaders = []
    for paths in (config.path, (str(folder),)):
        used = replace(config, path=paths)
        data = build_data(used, sentencepiece_tokenizer(), tmp_path / "cache", seed=1)
        loaders.append(PackedLoader(data.train, used, seed=3, prefetch=False))
    for _ in range(12):
        for one, other in zip(*(loader.next_step() for loader in loaders), strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.token_weight.tolist() == other.token_weight.tolist()
            assert one.cu_seqlens.tolist() == other.cu_seqlens.tolist()
            assert one.document_ids == other.document_ids
    loaders[1].load_state_dict(loaders[0].state_dict())


@pytest.mark.parametrize("size", [4, 7, 50, 999, 10_000])
@pytest.mark.parametrize("end", ["\n", ""])
def test_parts_of_lines_hold_each_row_once(tmp_path: Path, size: int, end: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\ufeff" + "\n".join(['{"a": 1}', "", "{}", "x" * 40, "\r", "[]"]) + end)
    whole = [(n, line) for p in read_chunks(str(path)) for n, line in _lines(p)]
    found: list[tuple[int, bytes]] = []
    before = 0
    for part in parts_of(str(path), size):
        chunks = read_chunks(str(path), part=part)
        found += [(before + n, line) for p in chunks for n, line in _lines(p)]
        if part is not None:
            before += lines_of_part(str(path), part)
            assert before == lines_of_part(str(path), range(part.stop))
    assert found == whole
    assert before in (0, 6)


def _lines(chunk: Any) -> list[tuple[int, bytes]]:
    return list(zip(chunk.numbers, chunk.lines, strict=True))


def _edit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _touch(file: Path) -> None:
    os.utime(file, ns=(1, 1))


def test_only_files_that_changed_are_doubted_and_verify_reads_all(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", qa_rows(60))
    config = DataConfig(path=(str(path),), heldout_rows=0)
    folder = _build(tmp_path / "out", config)
    built, tokenizer = replace(config, path=(str(folder),)), sentencepiece_tokenizer()

    def opened() -> int:
        return len(build_data(built, tokenizer, tmp_path / "c").train)

    some = folder / "tokens" / "00002.bin"
    stat = some.stat()
    _edit(some)
    os.utime(some, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    # The same size and time: nothing is read, so nothing is seen, but by --verify.
    assert opened() == 60
    with pytest.raises(CacheDamagedError, match=r"00002\.bin does not match the sha256"):
        verify_built(folder)
    _edit(some)
    _touch(some)
    with pytest.raises(CacheDamagedError, match=r"1 files .* tokens/00002\.bin: .*--verify True"):
        opened()
    assert verify_built(folder)["documents"] == 60
    assert opened() == 60
    manifest = (folder / "manifest.json").read_text()
    (tmp_path / "00002.bin").write_bytes(some.read_bytes())
    for outside in ("../00002.bin", str(tmp_path / "00002.bin")):
        text = manifest.replace("tokens/00002.bin", outside)
        (folder / "manifest.json").write_text(text)
        with pytest.raises(CacheDamagedError, match="not a complete token cache"):
            opened()
    (folder / "manifest.json").write_text(manifest)
    os.truncate(some, 8)
    with pytest.raises(CacheDamagedError, match=r"00002\.bin has 8 bytes, its manifest says"):
        opened()
    some.unlink()
    with pytest.raises(CacheDamagedError, match="not a complete token cache"):
        opened()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"thinking": False}, "data.thinking is False here and True in the folder"),
        ({"format": "qa"}, "data.format is qa here and auto in the folder"),
        ({"max_rows": 7}, "data.max_rows is 7 here and 0 in the folder"),
        ({"system_field": "s"}, "data.system_field is s here and empty in the folder"),
        ({"non_thinking_path": ()}, r"data.non_thinking_path is empty here and .*b\.jsonl in the"),
    ],
)
def test_a_stage_with_other_settings_is_rejected_by_name(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    paths = tuple(str(write_jsonl(tmp_path / f"{n}.jsonl", qa_rows(9))) for n in "ab")
    config = DataConfig(path=paths, thinking=True, non_thinking_path=paths[1:], heldout_rows=0)
    folder = _build(tmp_path / "out", config)
    here = replace(config, path=(str(folder),))
    tokenizer = sentencepiece_tokenizer()
    # The folder alone suffices: the rows may be elsewhere.
    for name in paths:
        Path(name).unlink()
    assert len(open_data(here, tokenizer, tmp_path).train) == 18
    for get in (build_data, open_data):
        with pytest.raises(DataError, match=said):
            get(replace(here, **change), tokenizer, tmp_path)
    with pytest.raises(DataError, match=r"tokenizer is \w{12} here and \w{12} in the folder"):
        open_data(here, huggingface_tokenizer(), tmp_path)


def test_preflight_checks_a_folder_without_its_rows(tmp_path: Path) -> None:
    paths = tuple(str(write_jsonl(tmp_path / f"{n}.jsonl", qa_rows(9))) for n in "ab")
    config = DataConfig(path=paths, thinking=True, non_thinking_path=paths[1:], heldout_rows=0)
    folder = _build(tmp_path / "out", config)
    Path(paths[1]).unlink()
    recipe = SftRecipe(
        run_dir=str(tmp_path / "run"),
        data=replace(config, path=(str(folder),)),
        tokenizer=TokenizerConfig(path=sentencepiece_tokenizer().path),
    )

    def problems(recipe: SftRecipe) -> list[str]:
        found = Preflight()
        check_files(recipe, found)
        check_data(recipe, found)
        return found.problems

    assert problems(recipe) == []
    other = replace(recipe, data=replace(recipe.data, thinking=False))
    assert "data.thinking is False here" in problems(other)[0]
    bare = replace(recipe, tokenizer=TokenizerConfig())
    assert "name the tokenizer that it was built with" in problems(bare)[0]
    _touch(folder / "offsets.bin")
    assert "such as offsets.bin" in problems(recipe)[0]


def test_a_cache_may_be_named_as_a_folder(tmp_path: Path) -> None:
    paths = tuple(str(write_jsonl(tmp_path / f"{n}.jsonl", qa_rows(9))) for n in "ab")
    config = DataConfig(path=paths, thinking=True, non_thinking_path=paths[1:], heldout_rows=0)
    tokenizer = sentencepiece_tokenizer()
    cache = build_cache(tmp_path / "c", config, config.path, tokenizer, seed=1)
    here = replace(config, path=(str(cache.path),))
    assert len(open_data(here, tokenizer, tmp_path, seed=1).train) == 18
    with pytest.raises(DataError, match=r"data\.non_thinking_path is empty here"):
        open_data(replace(here, non_thinking_path=()), tokenizer, tmp_path, seed=1)


def test_a_folder_is_read_alone_and_only_for_its_tokens(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", qa_rows(30))
    config = DataConfig(path=(str(path),), heldout_rows=0)
    folder = str(_build(tmp_path / "out", config))
    tokenizer = sentencepiece_tokenizer()
    with pytest.raises(DataError, match=r"is a whole data set, but .*rows\.jsonl is named beside"):
        build_data(replace(config, path=(folder, str(path))), tokenizer, tmp_path / "c")
    with pytest.raises(DataError, match="holds tokens, no rows"):
        find_sources([folder])
    held = replace(config, path=(folder,), heldout_path=(str(path),))
    with pytest.raises(DataError, match=r"rows\.jsonl: in data\.path and in data\.heldout_path"):
        build_data(held, tokenizer, tmp_path / "c")
    other = write_jsonl(tmp_path / "other.jsonl", qa_rows(4))
    held = replace(config, path=(folder,), heldout_path=(str(other),))
    data = build_data(held, tokenizer, tmp_path / "c")
    assert data.heldout is not None
    assert (len(data.train), len(data.heldout)) == (30, 4)


@pytest.mark.parametrize("fmt", ["auto", "qa"])
def test_bad_rows_are_rejected_as_in_a_stage(tmp_path: Path, fmt: Any) -> None:
    rows: list[Any] = qa_rows(90)
    for at in (40, 41, 80):
        rows[at] = {"question": "q"}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = DataConfig(path=(str(path),), format=fmt)
    tokenizer = sentencepiece_tokenizer()
    for limit in (0, 1):
        limited = replace(config, max_bad_rows=limit)
        with pytest.raises(DataError) as mine:
            _build(tmp_path / "out", replace(limited, max_bad_rows=limit))
        with pytest.raises(DataError) as theirs:
            build_cache(tmp_path / "c", limited, config.path, tokenizer)
        assert str(theirs.value).splitlines()[1:] == [
            f"  {path}:{n}: no field 'answer'; the row has ['question']" for n in (41, 42, 81)
        ]
        assert set(str(mine.value).splitlines()[1:]) <= set(str(theirs.value).splitlines()[1:])
        assert f"data.max_bad_rows is {limit}: correct them" in str(mine.value)
    # No shard has so many, all together have.
    with pytest.raises(DataError, match=r"3 bad rows, data\.max_bad_rows is 2(.|\n)*:81: no field"):
        _build(tmp_path / "out", replace(config, max_bad_rows=2))
    # A higher limit resumes where the build failed.
    folder = _build(tmp_path / "out", replace(config, max_bad_rows=3))
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["bad_rows"], manifest["documents"]) == (3, 87)
    with pytest.raises(DataError, match="3 bad rows"):
        open_data(replace(config, path=(str(folder),), heldout_rows=0), tokenizer, tmp_path)


def test_an_unfinished_build_keeps_its_settings_and_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", qa_rows(60))
    config = DataConfig(path=(str(path),))
    tokenizer = sentencepiece_tokenizer()
    plan = plan_build(tmp_path / "out", config, tokenizer, seed=1, size=SIZE)
    assert len(plan.shards) > 3
    tokenize_shard(work_folder(tmp_path / "out"), 1)
    with pytest.raises(DataError, match=rf"of {len(plan.shards)} shards .* not tokenised"):
        join_shards(work_folder(tmp_path / "out"), tmp_path / "out")
    again = plan_build(tmp_path / "out", config, tokenizer, seed=1, size=10 * SIZE)
    assert json.dumps(again.shards) == json.dumps(plan.shards)
    with pytest.raises(DataError, match=r"other settings: data\.max_rows is 5 here and 0"):
        plan_build(tmp_path / "out", replace(config, max_rows=5), tokenizer, seed=1, size=SIZE)
    write_jsonl(path, qa_rows(61))
    with pytest.raises(DataError, match=r"the files of data\.path have changed"):
        plan_build(tmp_path / "out", config, tokenizer, seed=1, size=SIZE)


def test_an_unfinished_build_may_be_resumed_from_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", qa_rows(60))
    tokenizer = sentencepiece_tokenizer()
    monkeypatch.chdir(tmp_path)
    config = DataConfig(path=("rows.jsonl",))
    plan_build(tmp_path / "out", config, tokenizer, seed=1, size=SIZE)
    tokenize_shard(work_folder(tmp_path / "out"), 0)
    monkeypatch.chdir("/")
    assert _build(tmp_path / "out", DataConfig(path=(str(path),))).is_dir()


def test_rows_that_change_after_the_plan_are_not_tokenised(tmp_path: Path) -> None:
    """A task of an array may start hours after the plan, whose parts are ranges of bytes."""
    path = write_jsonl(tmp_path / "rows.jsonl", qa_rows(60))
    plan_build(
        tmp_path / "out",
        DataConfig(path=(str(path),)),
        sentencepiece_tokenizer(),
        seed=1,
        size=SIZE,
    )
    work = work_folder(tmp_path / "out")
    tokenize_shard(work, 0)
    write_jsonl(path, qa_rows(61))
    with pytest.raises(DataError, match=r"rows\.jsonl has changed since .* delete the folder"):
        tokenize_shard(work, 1)
    path.unlink()
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read: .*No such file"):
        tokenize_shard(work, 1)


def _content(folder: Path) -> dict[str, bytes]:
    files = (f for f in folder.rglob("*") if f.is_file() and f.name != "times.json")
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def test_a_build_of_one_process_is_that_of_its_shards_in_any_order(tmp_path: Path) -> None:
    config = DataConfig(path=(_mixed(tmp_path / "rows"),))
    one = _build(tmp_path / "one", config)
    plan = plan_build(tmp_path / "two", config, sentencepiece_tokenizer(), seed=1, size=SIZE)
    work = work_folder(tmp_path / "two")
    (work / "folder" / "tokens" / "00001.99999.partial").write_bytes(b"left by a killed process")
    for number in range(len(plan.shards)):
        tokenize_shard(work, number)
    join_shards(work, tmp_path / "two")
    assert _content(one) == _content(tmp_path / "two")


def test_a_killed_command_is_resumed_to_the_same_bytes(tmp_path: Path) -> None:
    pytest.importorskip("datatrove")
    rows = qa_rows(60)
    rows[0] = {"question": "q " * 400_000, "answer": "a"}
    path = write_jsonl(tmp_path / "rows.jsonl", rows * 6)
    output = tmp_path / "out"
    command = [sys.executable, "-m", "nemocascade.cli", "data", "build", "--shard-mib", "1"]
    command += ["--data.path", str(path), "--output", str(output)]
    command += ["--tokenizer.path", sentencepiece_tokenizer().path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    two = [*command, "--workers", "2"]
    started = subprocess.Popen(two, env=environment, start_new_session=True)
    parts = work_folder(output) / "parts"
    deadline = time.monotonic() + 100
    while not (parts.is_dir() and any(parts.glob("*.json"))):
        assert started.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not output.exists()
    finished = len(list(parts.glob("*.json")))
    done = subprocess.run(
        [*command, "--workers", "1"],
        env=environment,
        check=False,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert f"{360:,} documents" in done.stdout
    assert f"5 shards of 0.00 GiB, {5 - finished} of them to tokenise" in done.stderr
    assert not work_folder(output).exists()
    whole = _build(tmp_path / "whole", DataConfig(path=(str(path),)), size=1 << 20)
    assert _content(output) == _content(whole)


def test_a_killed_worker_ends_the_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool of processes would wait for its result for ever."""
    monkeypatch.setattr(build_jobs, "POLL_S", 0.05)
    monkeypatch.setattr(build_jobs, "GRACE_S", 0.2)
    path = write_jsonl(tmp_path / "rows.jsonl", qa_rows(60))
    config = DataConfig(path=(str(path),))
    plan = plan_build(tmp_path / "out", config, sentencepiece_tokenizer(), seed=1, size=SIZE)

    ended: list[subprocess.Popen[bytes]] = []

    def run_pool() -> None:
        other, worker = (
            subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(100)  # {name}"])
            for name in ("a program", "forkserver")
        )
        for process in (other, worker):
            time.sleep(0.7)
            ended.append(process)
            process.kill()
            process.wait()
        threading.Event().wait(20)

    with (
        pytest.raises(DataError, match=r"a worker process was killed, .* the same command resumes"),
        build_jobs.watching(plan, work_folder(tmp_path / "out")),
    ):
        run_pool()
    assert len(ended) == 2, "not for the other program"


def _settings(output: Path, rows: Path, **slurm: Any) -> BuildSettings:
    return BuildSettings(
        output=str(output),
        data=DataConfig(path=(str(rows),)),
        tokenizer=TokenizerConfig(path=sentencepiece_tokenizer().path),
        shard_mib=1,
        slurm=BuildSlurmConfig(**slurm),
    )


def test_a_folder_is_built_by_one_process(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", qa_rows(60))
    settings = _settings(tmp_path / "out", path)
    work = work_folder(tmp_path / "out")
    lock = RunLock(work)
    lock.acquire()
    try:
        with pytest.raises(FolderInUseError, match=r"out\.build is in use .* another --output"):
            build(settings, sentencepiece_tokenizer())
    finally:
        lock.release()
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("rows/out", "is inside .*rows, whose files are rows of data.path"),
        ("file/out", "cannot be written .*Not a directory.*choose another --output"),
    ],
)
def test_an_output_that_cannot_be_is_named(tmp_path: Path, output: str, said: str) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "file").touch()
    write_jsonl(tmp_path / "rows" / "a.jsonl", qa_rows(9))
    with pytest.raises(DataError, match=said):
        build(_settings(tmp_path / output, tmp_path / "rows"), sentencepiece_tokenizer())
    assert [p.name for p in (tmp_path / "rows").iterdir()] == ["a.jsonl"]


def test_partial_files_of_killed_processes_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They would fill the disk, and count as progress."""
    path = write_jsonl(tmp_path / "rows.jsonl", qa_rows(60))
    settings = _settings(tmp_path / "out", path)
    work = work_folder(tmp_path / "out")
    plan_build(tmp_path / "out", settings.data, sentencepiece_tokenizer(), seed=1, size=SIZE)
    left = [work / "folder" / "tokens" / "00000.99.partial", work / "parts" / "00000.99.partial"]
    for file in left:
        file.touch()
    found: list[bool] = []

    def run(_workers: int, plan: BuildPlan, work: Path) -> None:
        found.extend(file.exists() for file in left)
        for number in range(len(plan.shards)):
            tokenize_shard(work, number)

    monkeypatch.setattr(build_jobs, "_run_here", run)
    assert build(settings, sentencepiece_tokenizer())["documents"] == 60  # type: ignore[index]
    assert found == [False, False]
    assert not work.exists()


def test_slurm_gets_an_array_and_a_job_that_joins_and_both_only_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("datatrove")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"question": "q " * 300_000, "answer": "a"}] * 5)
    programs, sent = tmp_path / "bin", tmp_path / "sent"
    programs.mkdir()
    sent.mkdir()
    for name, text in (
        ("sbatch", f'n=$(ls {sent} | wc -l); cp "${{@: -1}}" {sent}/$n; echo "$@" >> {sent}/$n; '
         'echo Submitted batch job 4$n'),
        ("squeue", f"cat {tmp_path}/queue"),
    ):  # fmt: skip
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    settings = _settings(tmp_path / "out", path, partition="cpu", tasks=2, account="lab", qos="")
    assert "is not built yet" in run_build(settings, settings.tokenizer.path)
    scripts = [(sent / str(i)).read_text() for i in range(len(list(sent.iterdir())))]
    array, join = (s for s in scripts if "launch_pickled_pipeline" in s)
    kill = "kill-on-invalid-dep=yes"
    for line in ("partition=cpu", "array=0-2%2", "account=lab", "mem-per-cpu=2G", kill):
        assert f"#SBATCH --{line}\n" in array
    assert "qos" not in array
    assert "--dependency=afterok:40" in join
    assert f"#SBATCH --{kill}\n" in join
    (tmp_path / "queue").write_text("40_0 RUNNING\n")
    caplog.set_level(logging.INFO, "nemocascade")
    logging.getLogger("nemocascade").propagate = True
    tokenize_shard(work_folder(tmp_path / "out"), 1)
    build(settings, sentencepiece_tokenizer())
    assert len(list(sent.iterdir())) == len(scripts)
    assert "jobs in the queue: 40_0 RUNNING" in caplog.text
    assert "1 of 3 shards" in caplog.text
    # Processes of this machine do not build beside the array either.
    assert build(_settings(tmp_path / "out", path), sentencepiece_tokenizer()) is None
    squeue = programs / "squeue"
    for text in ("echo 'Unable to contact slurm controller' >&2; exit 1", ""):
        squeue.write_text(f"#!/bin/bash\n{text}\n") if text else squeue.unlink()
        if not text:
            monkeypatch.setenv("PATH", str(programs))
        with pytest.raises(DataError, match=r"squeue does not say if jobs 4\d"):
            build(settings, sentencepiece_tokenizer())
    squeue.write_text("#!/bin/bash\necho 'error: Invalid job id specified' >&2; exit 1\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    build(settings, sentencepiece_tokenizer())
    assert len(list(sent.iterdir())) == 2 * len(scripts)
