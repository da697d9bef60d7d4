"""The token cache: content, keys, damage, killed builds, bad rows, worker processes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from helpers.data import (
    GSM8K_TEST,
    huggingface_tokenizer,
    needs_gsm8k,
    qa_rows,
    sentencepiece_tokenizer,
    write_jsonl,
)

from nemocascade.data import cache as cache_module
from nemocascade.data import cache_files
from nemocascade.data.cache import TokenCache, build_cache, open_cache
from nemocascade.data.cache_files import CacheDamagedError
from nemocascade.data.chat_template import encode
from nemocascade.data.documents import DocumentSet, build_data, open_data, split_heldout
from nemocascade.data.formats import parse_row
from nemocascade.data.tokenization import read_conversations
from nemocascade.data.tokenizer_training import train_tokenizer
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.row_errors import BadRows, DataError

CONFIG = DataConfig()


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", qa_rows(60))


def _build(tmp_path: Path, path: Path, config: DataConfig = CONFIG, **more: Any) -> TokenCache:
    return build_cache(tmp_path / "cache", config, [str(path)], sentencepiece_tokenizer(), **more)


def _open(tmp_path: Path, path: Path, config: DataConfig = CONFIG) -> TokenCache:
    return open_cache(tmp_path / "cache", config, [str(path)], sentencepiece_tokenizer())


def test_documents_are_the_rendered_rows(tmp_path: Path, rows_file: Path) -> None:
    cache = _build(tmp_path, rows_file)
    assert len(cache) == 60
    for i, row in enumerate(qa_rows(60)):
        tokenizer = sentencepiece_tokenizer()
        segments = tokenizer.template.render(parse_row(row, "qa", CONFIG), thinking=False)
        ids, trained = encode(segments, tokenizer)
        document = cache.document(i)
        assert document.tokens.tolist() == ids
        assert document.trained.tolist() == trained
        assert document.source == f"{rows_file}:{i + 1}"
        assert (cache.lengths[i], cache.trained[i]) == (len(ids), sum(trained))
        assert cache.document(i, 5).tokens.tolist() == ids[:5]
    assert cache.manifest["tokens"] == cache.lengths.sum()
    assert cache.manifest["trained_tokens"] == cache.trained.sum()


def test_a_document_is_untrained_up_to_its_first_trained_token(
    tmp_path: Path, rows_file: Path
) -> None:
    cache = _build(tmp_path, rows_file)
    documents = DocumentSet(cache, np.arange(60)[::-1])
    first = cache.document(3).trained.tolist().index(True)
    for capacity in (first, first + 1, 70, 200):
        found = documents.untrained(replace(CONFIG, capacity=capacity))
        kept = documents.trained_tokens(np.arange(60), capacity)
        assert found.tolist() == np.flatnonzero(kept == 0).tolist()
        assert (56 in found) == (capacity <= first)
        assert not len(documents.untrained(replace(CONFIG, capacity=capacity, over_long="drop")))


def test_parquet_gives_what_jsonl_gives(tmp_path: Path) -> None:
    chat = [
        {
            "messages": [
                {"role": "user", "content": r["question"]},
                {"role": "assistant", "content": r["answer"]},
            ]
        }
        for r in qa_rows(20)
    ]
    fingerprints = set()
    for name, rows in (("qa", qa_rows(20)), ("chat", chat)):
        plain = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        columns = tmp_path / f"{name}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), columns)
        fingerprints |= {_build(tmp_path, path).fingerprint for path in (plain, columns)}
    assert len(fingerprints) == 1


def test_worker_processes_give_the_same_documents(tmp_path: Path) -> None:
    rows: list[Any] = [*qa_rows(700), "{", *qa_rows(700)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = replace(CONFIG, max_bad_rows=1)
    alone = build_cache(tmp_path / "1", config, [str(path)], sentencepiece_tokenizer(), workers=1)
    both = build_cache(tmp_path / "2", config, [str(path)], sentencepiece_tokenizer(), workers=2)
    assert alone.fingerprint == both.fingerprint
    assert alone.manifest["bad_examples"] == both.manifest["bad_examples"]


def test_a_cache_is_made_once(
    tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _build(tmp_path, rows_file)
    monkeypatch.setattr(cache_module, "tokenize_chunks", None)
    assert _build(tmp_path, rows_file).path == first.path
    assert _open(tmp_path, rows_file).fingerprint == first.fingerprint


@pytest.mark.parametrize(
    "change",
    [
        {"thinking": True},
        {"max_rows": 3},
        {"format": "qa"},
        {"question_field": "answer", "answer_field": "question"},
    ],
)
def test_settings_are_part_of_the_key(
    tmp_path: Path, rows_file: Path, change: dict[str, Any]
) -> None:
    one, other = _build(tmp_path, rows_file), _build(tmp_path, rows_file, replace(CONFIG, **change))
    assert one.path != other.path


def test_files_tokenizer_and_seed_are_part_of_the_key(tmp_path: Path, rows_file: Path) -> None:
    first = _build(tmp_path, rows_file).path
    other = build_cache(tmp_path / "cache", CONFIG, [str(rows_file)], huggingface_tokenizer()).path
    stat = rows_file.stat()
    os.utime(rows_file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    touched = _build(tmp_path, rows_file).path
    assert len({first, other, touched}) == 3
    config = replace(CONFIG, max_rows=20)
    made = [
        build_cache(
            tmp_path, config, ["synthetic:arithmetic"], sentencepiece_tokenizer(), seed=s, heldout=h
        )
        for s, h in ((1, False), (2, False), (1, True))
    ]
    assert len({c.path for c in made}) == len({c.fingerprint for c in made}) == 3


def _flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def _edit_manifest(folder: Path, removed: str) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest[removed]
    (folder / "manifest.json").write_text(json.dumps(manifest))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of the tokens": lambda folder: _flip_a_bit(folder / "tokens.bin"),
    "a bit of the offsets": lambda folder: _flip_a_bit(folder / "offsets.bin"),
    "the end of a file": lambda folder: os.truncate(folder / "tokens.bin", 100),
    "a file": lambda folder: (folder / "trained.bin").unlink(),
    "the manifest": lambda folder: (folder / "manifest.json").write_text("{"),
    "the manifest's counts": lambda folder: _edit_manifest(folder, "bad_rows"),
    "the manifest's levels": lambda folder: (folder / "manifest.json").write_text("[" * 3000),
    "the manifest's entries": lambda folder: (folder / "manifest.json").write_text(
        json.dumps(
            {
                **json.loads((folder / "manifest.json").read_text()),
                "files": dict.fromkeys(cache_files.COLUMNS, 5),
            }
        )
    ),
    "the manifest's shards": lambda folder: _edit_manifest(folder, "shards"),
    "the manifest's files": lambda folder: (folder / "manifest.json").write_text('{"files": {}}'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_made_anew_and_said_so(
    tmp_path: Path, rows_file: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    first = _build(tmp_path, rows_file)
    fingerprint, manifest = first.fingerprint, first.manifest
    DAMAGE[damage](first.path)
    if not damage.startswith("a bit"):
        with pytest.raises(CacheDamagedError):
            _open(tmp_path, rows_file)
    caplog.set_level(logging.WARNING)
    again = _build(tmp_path, rows_file)
    assert "it is made anew" in caplog.text
    assert (again.fingerprint, again.manifest) == (fingerprint, manifest)


def test_blocks_are_hashed_each(
    tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_files, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(cache_files, "READ_BYTES", 256)
    cache = _build(tmp_path, rows_file)
    data = (cache.path / "tokens.bin").read_bytes()
    blocks = [data[i : i + 1024] for i in range(0, len(data), 1024)]
    expected = [hashlib.sha256(block).hexdigest() for block in blocks]
    assert len(expected) > 3
    assert cache.manifest["files"]["tokens.bin"] == {"bytes": len(data), "sha256": expected}


def test_reasoning_that_is_omitted_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for thinking in (True, False):
        config = replace(CONFIG, max_rows=20, thinking=thinking)
        paths = ["synthetic:arithmetic"]
        cache = build_cache(tmp_path, config, paths, sentencepiece_tokenizer())
        assert cache.manifest["documents_with_reasoning"] == 20
        assert ("reasoning of 20 documents is omitted" in caplog.text) != thinking


def test_sources_are_rendered_without_reasoning_by_name(tmp_path: Path) -> None:
    """One source thinks, one does not; the same rows, in worker processes too."""
    turns = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
    ]
    for name in ("chat", "agents/swe"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", [{"messages": turns}] * 3)
    paths = (str(tmp_path / "chat.jsonl"), str(tmp_path / "agents"))
    config = replace(CONFIG, path=paths, thinking=True)
    silent = replace(config, non_thinking_path=(str(tmp_path / "agents"),))
    tokenizer = sentencepiece_tokenizer()

    def documents(config: DataConfig, **more: Any) -> list[str]:
        cache = build_cache(tmp_path / "cache", config, paths, tokenizer, **more)
        return [tokenizer.decode(cache.document(i).tokens.tolist()) for i in range(6)]

    assert all("two and two" in text for text in documents(config))
    found = documents(silent)
    assert ["two and two" in text for text in found] == [True] * 3 + [False] * 3
    assert all("<think></think>" in text for text in found[3:])
    # Thinking is off for all: the names change nothing.
    off = replace(silent, thinking=False)
    assert not any("two and two" in text for text in documents(off))


def test_a_source_without_reasoning_must_be_read(tmp_path: Path, rows_file: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", qa_rows(3))
    config = replace(CONFIG, path=(str(rows_file),), thinking=True, non_thinking_path=(str(other),))
    with pytest.raises(DataError, match=r"non_thinking_path names .*other\.jsonl, but data\.path"):
        _build(tmp_path, rows_file, config)
    heldout = replace(config, heldout_path=(str(other),))
    assert len(_build(tmp_path, rows_file, heldout)) == 60


def test_an_absent_cache_cannot_be_opened(tmp_path: Path, rows_file: Path) -> None:
    with pytest.raises(CacheDamagedError, match="not a complete token cache"):
        _open(tmp_path, rows_file)


BUILD_AND_DIE = """
import os, signal, sys
from pathlib import Path
from nemocascade.data import cache
from nemocascade.data.tokenizer import load_tokenizer
from nemocascade.recipe.data import DataConfig
sync = os.fsync
def fsync(handle, calls=[]):
    sync(handle)
    calls.append(1)
    if len(calls) == int(sys.argv[4]):
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = fsync
cache.build_cache(sys.argv[1], DataConfig(), [sys.argv[2]], load_tokenizer(sys.argv[3]))
"""


@pytest.mark.parametrize("syncs", [1, 10])
def test_a_killed_build_leaves_no_cache_and_its_rest_is_removed(
    tmp_path: Path, rows_file: Path, syncs: int, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = [str(tmp_path / "cache"), str(rows_file), sentencepiece_tokenizer().path]
    command = [sys.executable, "-c", BUILD_AND_DIE, *arguments, str(syncs)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run(command, env=environment, check=False, capture_output=True)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()
    assert [p.name.split(".")[1][:8] for p in (tmp_path / "cache").iterdir()] == ["building"]
    with pytest.raises(CacheDamagedError):
        _open(tmp_path, rows_file)
    if syncs == 1:
        # A restarted container may give the same process number again.
        (left,) = (tmp_path / "cache").iterdir()
        left.rename(left.with_name(f"{left.name.rpartition('-')[0]}-{os.getpid()}"))
    caplog.set_level(logging.WARNING)
    assert len(_build(tmp_path, rows_file)) == 60
    assert "left by a build that was killed" in caplog.text
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_a_full_disk_names_the_file(
    tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("nemocascade.data.cache_files.os.fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        _build(tmp_path, rows_file)
    assert Path(caught.value.filename).name == "tokens.bin"
    with pytest.raises(OSError, match="No space left") as caught:
        train_tokenizer(DataConfig(path=(str(rows_file),)), 400, tmp_path / "small.model")
    assert Path(caught.value.filename).name.startswith("small.model")


def test_a_faster_builder_wins(
    tmp_path: Path, rows_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another machine on the same disk finishes while this one still writes."""
    write: Callable[..., None] = cache_files.write_files

    def write_twice(*arguments: Any) -> None:
        chunks = list(arguments[3])
        for _ in range(2):
            write(*arguments[:3], chunks, *arguments[4:])

    monkeypatch.setattr(cache_module, "write_files", write_twice)
    assert len(_build(tmp_path, rows_file)) == 60
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_bad_rows_are_named_and_rejected_even_from_a_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Any] = [*qa_rows(3), "{", {"question": "q"}, {"question": "", "answer": "a"}]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    lax = replace(CONFIG, max_bad_rows=3)
    caplog.set_level(logging.WARNING)
    cache = _build(tmp_path, path, lax)
    assert len(cache) == 3
    assert [e.split(": ")[0] for e in cache.manifest["bad_examples"]] == [
        f"{path}:{i}" for i in (4, 5, 6)
    ]
    assert "skipped 3 bad rows" in caplog.text
    strict = replace(CONFIG, max_bad_rows=2)
    for get in (_build, _open):
        with pytest.raises(DataError, match=rf"3 bad rows(.|\n)*{path}:5: no field 'answer'"):
            get(tmp_path, path, strict)
    with pytest.raises(DataError, match=rf"3 bad rows(.|\n)*{path}:5: no field 'answer'"):
        build_cache(tmp_path / "new", strict, [str(path)], sentencepiece_tokenizer())
    assert not list((tmp_path / "new").iterdir())


@pytest.mark.parametrize(
    ("rows", "fmt", "complaint"),
    [
        ([], "auto", r"no row can be read \(the file is empty\)"),
        (["{"], "auto", r"no row can be read \(row 1: not JSON"),
        (["", [1]], "auto", r"no row can be read \(row 2: rows must be objects\)"),
        ([], "qa", r"rows\.jsonl: no row can be read \(the file is empty\)"),
        ([{"prompt": "a"}], "auto", r"rows.jsonl:1: no known format"),
    ],
)
def test_data_without_documents_is_rejected(
    tmp_path: Path, rows: list[Any], fmt: Any, complaint: str
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=complaint):
        _build(tmp_path, path, replace(CONFIG, format=fmt))


def test_a_file_named_twice_is_read_twice_and_reported(
    tmp_path: Path, rows_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [str(rows_file), str(rows_file)]
    assert len(build_cache(tmp_path, CONFIG, names, sentencepiece_tokenizer())) == 120
    assert f"{rows_file} is read 2 times" in caplog.text


def test_files_of_different_formats_stand_side_by_side(tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", qa_rows(2))
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    write_jsonl(folder / "b.jsonl", [{"messages": turns}])
    assert len(_build(tmp_path, folder)) == 3


def test_heldout_rows_are_taken_out_evenly(tmp_path: Path, rows_file: Path) -> None:
    cache = _build(tmp_path, rows_file)
    train, heldout = split_heldout(cache, 6)
    assert heldout is not None
    assert heldout.indices.tolist() == [5, 15, 25, 35, 45, 55]
    assert sorted([*train.indices, *heldout.indices]) == list(range(60))
    assert heldout.source(1) == f"{rows_file}:16"
    assert split_heldout(cache, 0)[1] is None
    with pytest.raises(DataError, match=r"heldout_rows \(60\) takes all of the 60"):
        split_heldout(cache, 60)


def test_stage_data_is_opened_as_it_was_built(tmp_path: Path, rows_file: Path) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", qa_rows(7))
    for config, sizes in (
        (DataConfig(path=(str(rows_file),), heldout_rows=4), (56, 4)),
        (DataConfig(path=(str(rows_file),), heldout_path=(str(other),)), (60, 7)),
    ):
        built = build_data(config, sentencepiece_tokenizer(), tmp_path / "cache")
        opened = open_data(config, sentencepiece_tokenizer(), tmp_path / "cache")
        assert built.heldout is not None
        assert opened.heldout is not None
        assert (len(built.train), len(built.heldout)) == sizes
        assert built.train.fingerprint == opened.train.fingerprint
        assert built.heldout.fingerprint == opened.heldout.fingerprint


def test_heldout_synthetic_rows_are_others(tmp_path: Path) -> None:
    name = "synthetic:arithmetic"
    config = DataConfig(path=(name,), heldout_path=(name,), max_rows=200)
    data = build_data(config, sentencepiece_tokenizer(), tmp_path)
    assert data.heldout is not None
    texts = [
        {tuple(s.document(i).tokens.tolist()) for i in range(200)}
        for s in (data.train, data.heldout)
    ]
    assert len(texts[0] | texts[1]) == 400


def test_training_on_the_heldout_file_is_rejected(tmp_path: Path, rows_file: Path) -> None:
    config = DataConfig(path=(str(tmp_path),), heldout_path=(str(rows_file),))
    with pytest.raises(DataError, match=r"rows.jsonl: in data.path and in data.heldout_path"):
        build_data(config, sentencepiece_tokenizer(), tmp_path / "cache")
    with pytest.raises(DataError, match=r"data.path is empty"):
        build_data(DataConfig(), sentencepiece_tokenizer(), tmp_path / "cache")


def test_the_manifest_is_plain_json_and_nothing_else_is_read(
    tmp_path: Path, rows_file: Path
) -> None:
    cache = _build(tmp_path, rows_file)
    assert json.loads((cache.path / "manifest.json").read_text())["documents"] == 60
    sizes = {f.name: f.stat().st_size for f in cache.path.iterdir()}
    assert sizes["tokens.bin"] == 4 * cache.lengths.sum()
    assert sizes["offsets.bin"] == 8 * 61


@needs_gsm8k
def test_gsm8k_masks_cover_the_answers(tmp_path: Path) -> None:
    config = DataConfig(path=(str(GSM8K_TEST),), max_rows=300)
    tokenizer = train_tokenizer(config, 1024, tmp_path / "t.model")
    cache = build_cache(tmp_path, config, config.path, tokenizer)
    answers = [json.loads(line)["answer"] for line in GSM8K_TEST.read_text().splitlines()[:300]]
    for i, answer in enumerate(answers):
        document = cache.document(i)
        trained = document.tokens[document.trained].tolist()
        assert tokenizer.decode(trained) == f"{answer}<|im_end|>"
    conversations = list(read_conversations([str(GSM8K_TEST)], config, BadRows(0)))
    assert len(conversations) == 300
    assert np.all(cache.trained < cache.lengths)
