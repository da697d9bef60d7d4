"""Training and held-out documents of a stage."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from nemocascade.data.built import open_built
from nemocascade.data.cache import TokenCache, build_cache, open_cache
from nemocascade.data.cache_files import Progress
from nemocascade.data.readers import files_read
from nemocascade.data.synthetic import PREFIX
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import is_built
from nemocascade.types import Document


@dataclass(frozen=True, eq=False)
class DocumentSet:
    """A subset of a cache's documents, numbered from 0.

    indices: [D] int64, index of each document in the cache.
    """

    cache: TokenCache
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """[D] int64, tokens of each document."""
        return self.cache.lengths[self.indices]

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the documents and of their order."""
        text = self.cache.fingerprint.encode() + self.indices.tobytes()
        return hashlib.sha256(text).hexdigest()

    def document(self, number: int, limit: int | None = None) -> Document:
        """Return document `number`, truncated to its first `limit` tokens."""
        return self.cache.document(int(self.indices[number]), limit)

    def source(self, number: int) -> str:
        """`file:line` of a document."""
        return self.cache.source(int(self.indices[number]))

    def trained_tokens(self, numbers: NDArray[np.int64], limit: int) -> NDArray[np.int64]:
        """[n] int64, trained tokens among the first `limit` tokens of each of these documents."""
        counts = self.cache.trained[self.indices[numbers]]
        for i in np.flatnonzero(self.lengths[numbers] > limit):
            counts[i] = int(self.document(int(numbers[i]), limit).trained.sum())
        return counts

    def untrained(self, config: DataConfig) -> NDArray[np.int64]:
        """[n] int64, the documents that truncation to `config.capacity` leaves nothing to train."""
        if config.over_long != "truncate":
            return np.empty(0, np.int64)
        first = self.cache.first_trained[self.indices]
        return np.flatnonzero((self.lengths > config.capacity) & (first >= config.capacity))


@dataclass(frozen=True)
class StageData:
    """Documents of a stage. heldout is None when the settings ask for none."""

    train: DocumentSet
    heldout: DocumentSet | None


def build_data(
    config: DataConfig,
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    seed: int = 0,
    workers: int | None = None,
    progress: Progress = lambda _: None,
) -> StageData:
    """Open the data of a stage, tokenising it first if it is neither built nor in the cache.

    One process per machine calls this while the others wait; they then call `open_data`.

    seed: seed of synthetic rows. workers, progress: see `build_cache`.
    Raises DataError.
    """

    def get(paths: Sequence[str], *, heldout: bool = False) -> TokenCache:
        if folder := built_folder(paths):
            return open_built(folder, config, tokenizer, seed=seed, check=True)
        return build_cache(
            cache_dir,
            config,
            paths,
            tokenizer,
            seed=seed,
            heldout=heldout,
            workers=workers,
            progress=progress,
        )

    return _stage_data(config, get)


def open_data(
    config: DataConfig, tokenizer: Tokenizer, cache_dir: str | Path, *, seed: int = 0
) -> StageData:
    """Open the data that `build_data` built from the same arguments. Raises DataError."""

    def get(paths: Sequence[str], *, heldout: bool = False) -> TokenCache:
        if folder := built_folder(paths):
            return open_built(folder, config, tokenizer, seed=seed, check=False)
        return open_cache(cache_dir, config, paths, tokenizer, seed=seed, heldout=heldout)

    return _stage_data(config, get)


def built_folder(paths: Sequence[str]) -> Path | None:
    """The folder of `nemocascade data build` that `paths` names; None for paths of rows.

    Raises DataError if other paths are named beside it.
    """
    found = list(filter(is_built, paths))
    if found and len(paths) > 1:
        others = ", ".join(p for p in paths if p != found[0])
        raise DataError(
            f"{found[0]} was written by `nemocascade data build` and is a whole data set, but "
            f"{others} is named beside it: build one folder of all rows, and name it alone"
        )
    return Path(found[0]) if found else None


def split_heldout(cache: TokenCache, rows: int) -> tuple[DocumentSet, DocumentSet | None]:
    """Split off `rows` held-out documents, evenly spaced so that every file is represented.

    The choice depends only on the number of documents, so runs with different seeds share the
    held-out set. Raises DataError if no training document would be left.
    """
    total = len(cache)
    if rows >= total:
        raise DataError(
            f"data.heldout_rows ({rows}) takes all of the {total} documents: set it lower, or set "
            "data.heldout_path"
        )
    if rows <= 0:
        return _all_of(cache), None
    taken = (np.arange(rows) * 2 + 1) * total // (2 * rows)
    return DocumentSet(cache, np.delete(np.arange(total), taken)), DocumentSet(cache, taken)


def _stage_data(config: DataConfig, get: Callable[..., TokenCache]) -> StageData:
    if not config.path:
        raise DataError("data.path is empty: name files, folders, or synthetic:arithmetic")
    train = get(paths=config.path)
    if config.heldout_path:
        _check_disjoint(config.path, config.heldout_path)
        heldout = get(paths=config.heldout_path, heldout=True)
        found = StageData(_all_of(train), _all_of(heldout))
    else:
        found = StageData(*split_heldout(train, config.heldout_rows))
    for name, documents in (("training", found.train), ("held-out", found.heldout)):
        if documents is not None and len(documents.untrained(config)) == len(documents):
            raise DataError(
                f"nothing to train: all {len(documents)} {name} documents are truncated to "
                f"data.capacity ({config.capacity}) before their first trained token: raise it"
            )
    return found


def _all_of(cache: TokenCache) -> DocumentSet:
    return DocumentSet(cache, np.arange(len(cache)))


def _check_disjoint(train: Sequence[str], heldout: Sequence[str]) -> None:
    files = files_read([p for p in train if not p.startswith(PREFIX)])
    both = sorted(map(str, files & files_read([p for p in heldout if not p.startswith(PREFIX)])))
    if both:
        raise DataError(
            f"{', '.join(both)}: in data.path and in data.heldout_path; a held-out loss on "
            "training data says nothing"
        )
