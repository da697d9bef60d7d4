"""Sources of training rows: data files, folders of them, and synthetic rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from nemocascade.data import synthetic
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime import row_files
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import RowChunk, find_files, gather, is_built


def find_sources(paths: Sequence[str]) -> list[str]:
    """Return the sources behind `paths`: each is a file's path or a `synthetic:NAME`.

    Folders are walked as in `find_files`. Raises DataError for a path that cannot be read.
    """
    return [
        source
        for name in paths
        for source in ([name] if name.startswith(synthetic.PREFIX) else find_files(name))
    ]


def files_read(paths: Sequence[str]) -> set[Path]:
    """Return the resolved paths of the files behind `paths`, and of those that a built folder was
    made of. Raises DataError for a path that cannot be read."""
    found = {Path(p).resolve() for p in find_sources([p for p in paths if not is_built(p)])}
    for folder in filter(is_built, paths):
        try:
            key = json.loads(Path(folder, "manifest.json").read_bytes())["key"]
            found |= {Path(source["path"]) for source in key["sources"] if "path" in source}
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise DataError(f"{folder}: its manifest is damaged ({error!r})") from error
    return found


def files_named(name: str, config: DataConfig) -> set[Path]:
    """Return the resolved paths of the data files at a path of `data.non_thinking_path`.

    The files that a built folder was made of need not exist any more.
    """
    if not Path(name).exists() and any(map(is_built, config.path)):
        return {Path(name).resolve()}
    return {Path(p).resolve() for p in find_files(name)}


def sources_without_thinking(sources: Sequence[str], config: DataConfig) -> frozenset[int]:
    """Return the indices of the sources that `data.non_thinking_path` names.

    Raises DataError for a path of it that neither `data.path` nor `data.heldout_path` reads.
    """
    if not config.non_thinking_path:
        return frozenset()
    known = files_read((*config.path, *config.heldout_path))
    silent: set[Path] = set()
    for name in config.non_thinking_path:
        files = files_named(name, config)
        if strangers := sorted(map(str, files - known)):
            raise DataError(
                f"data.non_thinking_path names {name}, but data.path does not read "
                f"{', '.join(strangers)}: take it out, or add it to data.path"
            )
        silent |= files
    return frozenset(i for i, name in enumerate(sources) if Path(name).resolve() in silent)


def read_chunks(
    sources: Sequence[str],
    *,
    max_rows: int = 0,
    seed: int = 0,
    heldout: bool = False,
    columns: Collection[str] | None = None,
) -> Iterator[RowChunk]:
    """Yield the rows of `sources` in order, in chunks; at most `max_rows` rows (0 = all).

    seed, heldout: parameters of synthetic rows; files ignore them. columns: see
    `row_files.read_chunks`. Raises DataError if a file as a whole is damaged.
    """
    left = max_rows or None
    for index, name in enumerate(sources):
        if name.startswith(synthetic.PREFIX):
            chunks = _make(name, index, seed=seed, heldout=heldout, rows=left or 0)
        else:
            chunks = row_files.read_chunks(name, index, columns=columns)
        for chunk in chunks:
            kept = chunk if left is None else chunk.first(left)
            yield kept
            if left is not None:
                left -= len(kept.numbers)
                if left == 0:
                    return


def _make(name: str, index: int, *, seed: int, heldout: bool, rows: int) -> Iterator[RowChunk]:
    made = synthetic.synthetic_rows(name, seed=seed, rows=rows, heldout=heldout)
    return gather(((n, json.dumps(row).encode()) for n, row in enumerate(made, start=1)), index)
