"""On-disk cache of tokenised documents.

A cache is a folder. Its name is the hash of everything it was made from: files, settings,
tokenizer and template. `cache_files` describes its content.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from nemocascade.data import synthetic
from nemocascade.data.cache_files import (
    COLUMNS,
    TOKENS,
    CacheDamagedError,
    Progress,
    check_hashes,
    check_sizes,
    map_file,
    read_manifest,
    write_files,
)
from nemocascade.data.chat_template import SEGMENTS_VERSION
from nemocascade.data.formats import row_fields
from nemocascade.data.readers import find_sources, sources_without_thinking
from nemocascade.data.tokenization import (
    TRAINED_BIT,
    read_sources,
    tokenize_chunks,
)
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import BadRows
from nemocascade.runtime.row_files import report_skipped
from nemocascade.types import Document

CACHE_VERSION = 3
PARALLEL_BYTES = 32 << 20
"""Smaller inputs are tokenised in the calling process: starting workers would take longer."""
MAX_MAPS = 16_384
"""Most shards that are mapped at a time: Linux allows 65,530 maps in a process."""


class TokenCache:
    """Tokenised documents, read through memory maps."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        columns = {name: map_file(path / name, dtype) for name, dtype in COLUMNS.items()}
        self._offsets = columns["offsets.bin"]
        self._numbers, self._sources = columns["numbers.bin"], columns["sources.bin"]
        self._shards = manifest["shards"]
        self._ends = np.cumsum([shard["documents"] for shard in self._shards])
        self._starts = np.cumsum([0, *(shard["tokens"] for shard in self._shards)])
        self._maps: dict[int, NDArray[np.uint32]] = {}
        if not self._ends[-1] == len(self._numbers) == len(self._offsets) - 1:
            raise CacheDamagedError(f"{path}: its shards are not those of its index")
        self.trained: NDArray[np.int64] = columns["trained.bin"]
        """[D] int64: trained tokens of each document."""
        self.first_trained: NDArray[np.int64] = columns["first.bin"]
        """[D] int64: position of the first trained token of each document."""
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)
        """[D] int64: tokens of each document."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and masks; it does not depend on the files they were read from, nor
        on the shards."""
        files = self.manifest["files"]
        blocks = [*files["digests.bin"]["sha256"], *files["offsets.bin"]["sha256"]]
        return hashlib.sha256("".join(blocks).encode()).hexdigest()

    def source(self, index: int) -> str:
        """`file:line` of a document."""
        return f"{self.manifest['sources'][self._sources[index]]}:{self._numbers[index]}"

    def words(self, index: int, limit: int | None = None) -> NDArray[np.uint32]:
        """The document's words as stored (token id and trained bit), at most `limit` of them."""
        shard = int(np.searchsorted(self._ends, index, side="right"))
        start, end = (int(at - self._starts[shard]) for at in self._offsets[index : index + 2])
        return self._map(shard)[start : end if limit is None else min(end, start + limit)]

    def _map(self, shard: int) -> NDArray[np.uint32]:
        found = self._maps.get(shard)
        if found is None:
            if len(self._maps) >= MAX_MAPS:
                self._maps.clear()
            found = map_file(self.path / self._shards[shard]["file"], TOKENS)
            self._maps[shard] = found
        return found

    def document(self, index: int, limit: int | None = None) -> Document:
        """Return document `index`, truncated to its first `limit` tokens."""
        words = self.words(index, limit)
        return Document(
            tokens=torch.from_numpy((words & ~TRAINED_BIT).astype(np.int32)),
            trained=torch.from_numpy((words & TRAINED_BIT) != 0),
            source=self.source(index),
        )


def token_settings(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings that decide the tokens and masks of given rows, as plain JSON by name."""
    return {
        "token format": [CACHE_VERSION, SEGMENTS_VERSION],
        "tokenizer": tokenizer.fingerprint,
        "chat template": tokenizer.template.digest,
        "data.format": config.format,
        "data.question_field": config.question_field,
        "data.answer_field": config.answer_field,
        "data.system_field": config.system_field,
        "data.thinking": config.thinking,
        "data.max_rows": config.max_rows,
    }


def file_state(path: str) -> dict[str, int]:
    """Size and modification time of a file of rows: it has changed if either has."""
    found = os.stat(path)
    return {"bytes": found.st_size, "mtime_ns": found.st_mtime_ns}


def cache_key(
    config: DataConfig,
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    heldout: bool = False,
) -> dict[str, Any]:
    """Return everything the cache of `paths` depends on, as plain JSON.

    Files count by path, size and modification time, synthetic rows by `seed` and `heldout`.
    """
    sources: list[dict[str, Any]] = []
    names = find_sources(paths)
    silent = sources_without_thinking(names, config) if config.thinking else ()
    for name in names:
        if name.startswith(synthetic.PREFIX):
            made = {"name": name, "seed": seed, "heldout": heldout, "version": synthetic.VERSION}
            sources.append(made)
        else:
            sources.append({"path": str(Path(name).resolve()), **file_state(name)})
    return {
        "settings": token_settings(config, tokenizer),
        "sources": sources,
        "without_thinking": sorted(silent),
    }


def report_sources(config: DataConfig, paths: Sequence[str]) -> None:
    """Log the files and columns of `paths` that are not read, those that are read twice, and those
    that are rendered without reasoning. Raises DataError for a path that cannot be read."""
    for name in paths:
        if not name.startswith(synthetic.PREFIX):
            report_skipped(name, row_fields(config))
    sources = find_sources(paths)
    for name, times in Counter(sources).items():
        if times > 1:
            LOGGER.warning("%s is read %d times: data.path names it several times", name, times)
    for source in sorted(sources_without_thinking(sources, config)) if config.thinking else ():
        LOGGER.info(
            "%s: rendered without reasoning, as data.non_thinking_path says", sources[source]
        )


def build_cache(
    folder: str | Path,
    config: DataConfig,
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    heldout: bool = False,
    workers: int | None = None,
    progress: Progress = lambda _: None,
) -> TokenCache:
    """Open the cache of `paths` under `folder`; build it first if it is absent or damaged.

    A file whose size or modification time has changed since the build is hashed.

    One process per machine calls this. The others call `open_cache` after it has returned.

    workers: tokenising processes; None = one per core when the input is large. Workers import the
        main script, so it must then guard its entry with `if __name__ == "__main__"`.
    progress: called often, with the work done so far.

    Raises DataError for unreadable data, for no documents, and for more bad rows than
    `config.max_bad_rows`.
    """
    report_sources(config, paths)
    key = cache_key(config, paths, tokenizer, seed=seed, heldout=heldout)
    path = _folder_of(Path(folder), key)
    if path.exists():
        try:
            manifest = read_manifest(path)
            if changed := check_sizes(path, manifest["files"]):
                check_hashes(path, manifest["files"], changed, progress)
            return open_documents(path, manifest, config)
        except CacheDamagedError as error:
            LOGGER.warning("%s; it is made anew", error)
            shutil.rmtree(path)
    sources = find_sources(paths)
    formats, chunks = read_sources(sources, config, seed=seed, heldout=heldout)
    if workers is None:
        size = sum(s.get("bytes", 0) for s in key["sources"])
        workers = len(os.sched_getaffinity(0)) if size >= PARALLEL_BYTES else 1
    silent = key["without_thinking"]
    tokenized = tokenize_chunks(chunks, formats, config, tokenizer, silent=silent, workers=workers)
    write_files(path, key, sources, tokenized, BadRows(config.max_bad_rows), progress)
    cache = open_documents(path, read_manifest(path), config)
    LOGGER.info(
        "%s: %d documents, %d tokens, %d trained",
        path,
        len(cache),
        cache.manifest["tokens"],
        cache.manifest["trained_tokens"],
    )
    return cache


def open_cache(
    folder: str | Path,
    config: DataConfig,
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    heldout: bool = False,
) -> TokenCache:
    """Open a cache that `build_cache` has built or checked, with the same arguments.

    Raises CacheDamagedError if it is absent or incomplete.
    """
    key = cache_key(config, paths, tokenizer, seed=seed, heldout=heldout)
    path = _folder_of(Path(folder), key)
    manifest = read_manifest(path)
    check_sizes(path, manifest["files"])
    return open_documents(path, manifest, config)


def _folder_of(folder: Path, key: dict[str, Any]) -> Path:
    return folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def open_documents(path: Path, manifest: dict[str, Any], config: DataConfig) -> TokenCache:
    """Open the documents in a folder, given its manifest.

    Raises DataError for more bad rows than `config.max_bad_rows`.
    """
    # The limit may be lower now than when the cache was built: bad rows fail here as in the build.
    bad = BadRows(config.max_bad_rows, manifest["bad_rows"], manifest["bad_examples"])
    bad.check()
    if bad.count:
        LOGGER.warning("%s: %s", path, bad.summary())
    reasoned = manifest["documents_with_reasoning"]
    if reasoned and not config.thinking:
        LOGGER.warning(
            "%s: the reasoning of %d documents is omitted, data.thinking is off", path, reasoned
        )
    return TokenCache(path, manifest)
