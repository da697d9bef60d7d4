"""Sources of training rows: data files, folders of them, and synthetic rows."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from nemocascade.data import synthetic
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime import row_files
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import RowPiece, find_files, gather


def find_sources(paths: Sequence[str]) -> list[str]:
    """Return the sources behind `paths`: each is a file's path or a `synthetic:NAME`.

    Folders are walked as in `find_files`. Raises DataError for a path that cannot be read.
    """
    return [
        source
        for name in paths
        for source in ([name] if name.startswith(synthetic.PREFIX) else find_files(name))
    ]


def sources_without_thinking(sources: Sequence[str], config: DataConfig) -> frozenset[int]:
    """Return the indices of the sources that `data.non_thinking_path` names.

    Raises DataError for a path of it that neither `data.path` nor `data.heldout_path` reads.
    """
    if not config.non_thinking_path:
        return frozenset()
    known = {Path(p).resolve() for p in find_sources((*config.path, *config.heldout_path))}
    silent: set[Path] = set()
    for name in config.non_thinking_path:
        files = {Path(p).resolve() for p in find_files(name)}
        if strangers := sorted(map(str, files - known)):
            raise DataError(
                f"data.non_thinking_path names {name}, but data.path does not read "
                f"{', '.join(strangers)}: take it out, or add it to data.path"
            )
        silent |= files
    return frozenset(i for i, name in enumerate(sources) if Path(name).resolve() in silent)


def read_pieces(
    sources: Sequence[str],
    *,
    max_rows: int = 0,
    seed: int = 0,
    heldout: bool = False,
    columns: Collection[str] | None = None,
) -> Iterator[RowPiece]:
    """Yield the rows of `sources` in order, in pieces; at most `max_rows` rows (0 = all).

    seed, heldout: parameters of synthetic rows; files ignore them. columns: see
    `row_files.read_pieces`. Raises DataError if a file as a whole is damaged.
    """
    left = max_rows or None
    for index, name in enumerate(sources):
        if name.startswith(synthetic.PREFIX):
            pieces = _make(name, index, seed=seed, heldout=heldout, rows=left or 0)
        else:
            pieces = row_files.read_pieces(name, index, columns=columns)
        for piece in pieces:
            kept = piece if left is None else piece.first(left)
            yield kept
            if left is not None:
                left -= len(kept.numbers)
                if left == 0:
                    return


def _make(name: str, index: int, *, seed: int, heldout: bool, rows: int) -> Iterator[RowPiece]:
    made = synthetic.synthetic_rows(name, seed=seed, rows=rows, heldout=heldout)
    return gather(((n, json.dumps(row).encode()) for n, row in enumerate(made, start=1)), index)
