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
    CacheDamagedError,
    map_column,
    read_manifest,
    write_files,
)
from nemocascade.data.chat_template import SEGMENTS_VERSION
from nemocascade.data.formats import row_fields
from nemocascade.data.readers import find_sources, sources_without_thinking
from nemocascade.data.tokenization import (
    TRAINED_BIT,
    read_sources,
    tokenize_pieces,
)
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import BadRows
from nemocascade.runtime.row_files import report_skipped
from nemocascade.types import Document

CACHE_VERSION = 2
PARALLEL_BYTES = 32 << 20
"""Smaller inputs are tokenised in the calling process: starting workers would take longer."""


class TokenCache:
    """Documents of an open cache, read through memory maps."""

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._tokens = map_column(path, "tokens.bin")
        self._offsets = map_column(path, "offsets.bin")
        self._numbers = map_column(path, "numbers.bin")
        self._sources = map_column(path, "sources.bin")
        self.trained: NDArray[np.int64] = map_column(path, "trained.bin")
        """[D] int64: trained tokens of each document."""
        self.lengths: NDArray[np.int64] = np.diff(self._offsets)
        """[D] int64: tokens of each document."""

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def fingerprint(self) -> str:
        """Hash of the tokens and masks; it does not depend on the files they were read from."""
        files = self.manifest["files"]
        blocks = [*files["tokens.bin"]["sha256"], *files["offsets.bin"]["sha256"]]
        return hashlib.sha256("".join(blocks).encode()).hexdigest()

    def source(self, index: int) -> str:
        """`file:line` of a document."""
        return f"{self.manifest['sources'][self._sources[index]]}:{self._numbers[index]}"

    def words(self, index: int, limit: int | None = None) -> NDArray[np.uint32]:
        """The document's words as stored (token id and trained bit), at most `limit` of them."""
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        return self._tokens[start : end if limit is None else min(end, start + limit)]

    def document(self, index: int, limit: int | None = None) -> Document:
        """Return document `index`, truncated to its first `limit` tokens."""
        words = self.words(index, limit)
        return Document(
            tokens=torch.from_numpy((words & ~TRAINED_BIT).astype(np.int32)),
            trained=torch.from_numpy((words & TRAINED_BIT) != 0),
            source=self.source(index),
        )


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
            sources.append({"name": name, "seed": seed, "heldout": heldout})
        else:
            stat = os.stat(name)
            absolute = str(Path(name).resolve())
            sources.append({"path": absolute, "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns})
    return {
        "version": CACHE_VERSION,
        "template": tokenizer.template.digest,
        "segments": SEGMENTS_VERSION,
        "synthetic": synthetic.VERSION,
        "tokenizer": tokenizer.fingerprint,
        "sources": sources,
        "format": config.format,
        "fields": [config.question_field, config.answer_field, config.system_field],
        "thinking": config.thinking,
        "without_thinking": sorted(silent),
        "max_rows": config.max_rows,
    }


def build_cache(
    folder: str | Path,
    config: DataConfig,
    paths: Sequence[str],
    tokenizer: Tokenizer,
    *,
    seed: int = 0,
    heldout: bool = False,
    workers: int | None = None,
) -> TokenCache:
    """Open the cache of `paths` under `folder`; build it first if it is absent or damaged.

    One process per machine calls this. The others call `open_cache` after it has returned.

    workers: tokenising processes; None = one per core when the input is large. Workers import the
        main script, so it must then guard its entry with `if __name__ == "__main__"`.

    Raises DataError for unreadable data, for no documents, and for more bad rows than
    `config.max_bad_rows`.
    """
    for name in paths:
        if not name.startswith(synthetic.PREFIX):
            report_skipped(name, row_fields(config))
    key = cache_key(config, paths, tokenizer, seed=seed, heldout=heldout)
    path = _folder_of(Path(folder), key)
    if path.exists():
        try:
            return _open(path, config, hashes=True)
        except CacheDamagedError as error:
            LOGGER.warning("%s; it is made anew", error)
            shutil.rmtree(path)
    sources = find_sources(paths)
    for name, times in Counter(sources).items():
        if times > 1:
            LOGGER.warning("%s is read %d times: data.path names it so often", name, times)
    formats, pieces = read_sources(sources, config, seed=seed, heldout=heldout)
    if workers is None:
        size = sum(s.get("bytes", 0) for s in key["sources"])
        workers = len(os.sched_getaffinity(0)) if size >= PARALLEL_BYTES else 1
    silent = key["without_thinking"]
    for source in silent:
        LOGGER.info(
            "%s: rendered without reasoning, as data.non_thinking_path says", sources[source]
        )
    tokenized = tokenize_pieces(pieces, formats, config, tokenizer, silent=silent, workers=workers)
    write_files(path, key, sources, tokenized, BadRows(config.max_bad_rows))
    cache = _open(path, config, hashes=False)
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
    return _open(_folder_of(Path(folder), key), config, hashes=False)


def _folder_of(folder: Path, key: dict[str, Any]) -> Path:
    return folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:24]


def _open(path: Path, config: DataConfig, *, hashes: bool) -> TokenCache:
    manifest = read_manifest(path, hashes=hashes)
    # The limit may be lower now than when the cache was built: bad rows fail here as in the build.
    bad = BadRows(config.max_bad_rows, manifest["bad_rows"], manifest["bad_examples"])
    bad.check()
    if bad.count:
        LOGGER.warning("%s: %s", path, bad.summary())
    reasoned = manifest["documents_with_reasoning"]
    if reasoned and not config.thinking:
        LOGGER.warning(
            "%s: the reasoning of %d documents is left out, data.thinking is off", path, reasoned
        )
    return TokenCache(path, manifest)
