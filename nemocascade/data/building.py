"""Tokenises a data set in shards that processes make independently, and joins them to one folder.

While OUTPUT is built, the folder OUTPUT.build holds

    plan.json             the settings, the sources, and the rows of each shard
    parts/00012.*         counts, bad rows and columns of a finished shard
    folder/tokens/        the tokens of the shards
    jobs/                 logs and states of the jobs

A shard's rows are parts of one file (`row_parts`) or several whole files. Which rows a shard holds
depends on the files and the settings only, so the bytes of OUTPUT depend neither on the number of
processes nor on where a build was interrupted.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nemocascade.data import synthetic
from nemocascade.data.built import differing_settings
from nemocascade.data.cache import cache_key, file_state, report_sources
from nemocascade.data.cache_files import (
    TOKENS,
    ColumnWriter,
    FileWriter,
    check_sizes,
    read_manifest,
    sync_folder,
    write_json,
)
from nemocascade.data.formats import Format, row_fields
from nemocascade.data.readers import find_sources, read_chunks
from nemocascade.data.tokenization import ChunkTokenizer, source_formats
from nemocascade.data.tokenizer import Tokenizer, load_tokenizer
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime import row_files
from nemocascade.runtime.files import naming
from nemocascade.runtime.row_errors import BadRows, DataError
from nemocascade.runtime.row_files import RowChunk
from nemocascade.runtime.row_parts import lines_of_part, parts_of

PLAN = "plan.json"
"""Name of the plan in the work folder of a build."""

Extent = tuple[int, int, int]
"""Rows of one source: its index, and a part's start and stop; 0 and 0 = the whole source."""


@dataclass(frozen=True)
class BuildPlan:
    """Everything that the shards of a build depend on."""

    key: dict[str, Any]
    config: DataConfig
    seed: int
    tokenizer: str
    sources: list[str]
    formats: list[Format]
    shards: list[list[Extent]]
    sizes: list[int]
    """Bytes of each shard's rows; 0 for synthetic ones."""

    def write(self, work: Path) -> None:
        """Write the plan to `work`/plan.json."""
        write_json(work / PLAN, asdict(self))


def work_folder(output: Path) -> Path:
    """Folder of a build that is not finished."""
    return output.with_name(f"{output.name}.build")


def read_plan(work: Path) -> BuildPlan:
    """Read the plan in a work folder."""
    stored = json.loads((work / PLAN).read_bytes())
    config: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in stored["config"].items()
    }
    return BuildPlan(**{**stored, "config": DataConfig(**config)})


def plan_build(
    output: Path, config: DataConfig, tokenizer: Tokenizer, *, seed: int, size: int
) -> BuildPlan:
    """Plan the build of OUTPUT, or resume the plan in its work folder.

    size: bytes of rows in a shard; an old plan keeps its own. Only `data.max_bad_rows` may differ
    from the settings of an interrupted build.
    Raises DataError if other settings or the files have changed since, and for unreadable data.
    """
    work = work_folder(output)
    report_sources(config, config.path)
    sources = find_sources(config.path)
    key = build_key(config, tokenizer, seed)
    if (work / PLAN).is_file():
        old = read_plan(work)
        if old.key != key:
            found = list(differing_settings(old.key, config, tokenizer, seed=seed))
            said = "; ".join(found) or "the files of data.path have changed"
            raise DataError(
                f"{work} is an unfinished build with other settings: {said}. Set them as before, "
                "delete the folder, or choose another --output"
            )
        # Names of the files may depend on the working directory.
        path = str(Path(tokenizer.path).resolve())
        plan = replace(old, config=config, sources=sources, tokenizer=path)
    else:
        shards, sizes = _cut(sources, config, size)
        plan = BuildPlan(
            key=key,
            config=config,
            seed=seed,
            tokenizer=str(Path(tokenizer.path).resolve()),
            sources=sources,
            formats=source_formats(sources, config, seed=seed),
            shards=shards,
            sizes=sizes,
        )
    (work / "parts").mkdir(parents=True, exist_ok=True)
    (work / "folder" / "tokens").mkdir(parents=True, exist_ok=True)
    plan.write(work)
    return plan


def build_key(config: DataConfig, tokenizer: Tokenizer, seed: int) -> dict[str, Any]:
    """Return everything that a built folder depends on, as plain JSON."""
    key = cache_key(config, config.path, tokenizer, seed=seed)
    return key | {"non_thinking_path": list(config.non_thinking_path)}


def _cut(
    sources: Sequence[str], config: DataConfig, shard_bytes: int
) -> tuple[list[list[Extent]], list[int]]:
    """Extents and bytes of each shard: parts of large files, and groups of small ones."""
    shards: list[list[Extent]] = []
    sizes: list[int] = []
    for index, name in enumerate(sources):
        made = name.startswith(synthetic.PREFIX)
        size = 0 if made else Path(name).stat().st_size
        # The first `max_rows` rows are only known when they are read in order.
        parts = [None] if made or config.max_rows else parts_of(name, shard_bytes)
        for part in parts:
            extent = (index, part.start, part.stop) if part else (index, 0, 0)
            more = size // len(parts)
            joined = len(parts) == 1 and shards and shards[-1][-1][2] == 0
            if joined and (config.max_rows or sizes[-1] + more <= shard_bytes):
                shards[-1].append(extent)
                sizes[-1] += more
            else:
                shards.append([extent])
                sizes.append(more)
    return shards, sizes


def is_finished(work: Path, number: int) -> bool:
    """Return True if a shard was tokenised."""
    return _part(work, number, "json").is_file()


def remove_partial_files(work: Path) -> None:
    """Remove the unfinished files of killed processes; none may write to the folder meanwhile."""
    for left in work.rglob("*.partial"):
        left.unlink()


def token_bytes(work: Path) -> int:
    """Bytes of the tokens so far, those of unfinished shards included."""
    total = 0
    for file in (work / "folder" / "tokens").iterdir():
        with suppress(FileNotFoundError):  # renamed at this moment
            total += file.stat().st_size
    return total


def tokenize_shard(work: Path, number: int) -> None:
    """Tokenise the rows of one shard, unless that has been done.

    Raises DataError for unreadable data, for more bad rows than `data.max_bad_rows`, and if the
    tokenizer or the files are no longer the plan's.
    """
    if is_finished(work, number):
        return
    plan = read_plan(work)
    _check_sources(plan, work, number)
    tokenizer = _tokenizer(plan.tokenizer)
    if tokenizer.fingerprint != plan.key["settings"]["tokenizer"]:
        raise DataError(f"{plan.tokenizer} has changed since {work} was planned: build it anew")
    silent = frozenset(plan.key["without_thinking"])
    tokenize = ChunkTokenizer(plan.formats, plan.config, tokenizer, silent)
    # A killed process may have left a partial file of its own.
    partial = _tokens(work, number).with_suffix(f".{os.getpid()}.partial")
    tokens = FileWriter(partial, TOKENS)
    columns = [np.empty((6, 0), "<i8")]
    bad: list[tuple[int, int, str]] = []
    reasoned = 0
    for chunk in map(tokenize, _chunks(plan, number)):
        bad += [(chunk.source, row, reason) for row, reason in chunk.bad]
        if len(bad) > plan.config.max_bad_rows:
            _count_bad(plan, bad, _lines_before(plan, number)).check()
        tokens.append(chunk.tokens)
        source = np.full(len(chunk.lengths), chunk.source)
        digests = chunk.digests.view("<i8")
        columns.append(
            np.stack([chunk.lengths, chunk.trained, chunk.first, chunk.numbers, source, digests])
        )
        reasoned += chunk.reasoned
    _check_sources(plan, work, number)
    entry = tokens.close()
    partial.rename(_tokens(work, number))
    partial = _part(work, number, f"{os.getpid()}.partial")
    with naming(partial), partial.open("wb") as stream:
        np.save(stream, np.concatenate(columns, axis=1))
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(_part(work, number, "npy"))
    found = {"entry": entry, "lines": _lines(plan, number), "bad": bad, "reasoned": reasoned}
    write_json(_part(work, number, "json"), found)


def join_shards(work: Path, output: Path) -> dict[str, Any]:
    """Write the columns of all shards and the manifest, and rename the folder to OUTPUT.

    Returns the manifest. Raises DataError for a shard that is missing, for more bad rows than
    `data.max_bad_rows`, and for no documents.
    """
    plan, folder = read_plan(work), work / "folder"
    if missing := [n for n in range(len(plan.shards)) if not is_finished(work, n)]:
        raise DataError(
            f"{len(missing)} of {len(plan.shards)} shards of {work} are not tokenised, such as "
            f"{missing[0]}: run the same command again"
        )
    # Killed processes may have left partial files.
    names = [_tokens(work, number) for number in range(len(plan.shards))]
    for left in {f for f in folder.rglob("*") if f.is_file()} - {*names}:
        left.unlink()
    bad = BadRows(plan.config.max_bad_rows)
    columns = ColumnWriter(folder, plan.sources, bad)
    shards, files = [], {}
    lines: Counter[int] = Counter()
    for number, extents in enumerate(plan.shards):
        part = json.loads(_part(work, number, "json").read_bytes())
        stored = np.load(_part(work, number, "npy"), allow_pickle=False)
        lengths, trained, first, numbers, sources, digests = stored
        before = lines[extents[0][0]]
        lines[extents[0][0]] += part["lines"]
        columns.append(lengths, trained, first, numbers + before, sources, digests.view("<u8"))
        columns.reasoned += part["reasoned"]
        _count_bad(plan, part["bad"], before, bad)
        name = str(names[number].relative_to(folder))
        files[name] = part["entry"]
        shards.append({"file": name, "documents": len(lengths), "tokens": int(lengths.sum())})
    bad.check()
    check_sizes(folder, files)
    sync_folder(folder / "tokens")
    columns.finish(plan.key, shards, files)
    folder.rename(output)
    sync_folder(output.parent)
    shutil.rmtree(work / "parts")
    (work / PLAN).unlink()
    return read_manifest(output)


def _check_sources(plan: BuildPlan, work: Path, number: int) -> None:
    """Raise DataError if a file of a shard has changed since the plan, whose parts are of bytes."""
    for source, _, _ in plan.shards[number]:
        planned = plan.key["sources"][source]
        if "mtime_ns" not in planned:
            continue
        with row_files.reading(plan.sources[source]):
            found = file_state(plan.sources[source])
        if any(planned[name] != value for name, value in found.items()):
            raise DataError(
                f"{plan.sources[source]} has changed since {work} was planned: delete the folder "
                "and build anew"
            )


def _part(work: Path, number: int, kind: str) -> Path:
    return work / "parts" / f"{number:05d}.{kind}"


def _tokens(work: Path, number: int) -> Path:
    return work / "folder" / "tokens" / f"{number:05d}.bin"


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str) -> Tokenizer:
    return load_tokenizer(path)


def _chunks(plan: BuildPlan, number: int) -> Iterator[RowChunk]:
    """The rows of a shard, in chunks. Lines of a part are numbered from its first."""
    fields, left = row_fields(plan.config), plan.config.max_rows
    for source, start, stop in plan.shards[number]:
        name = plan.sources[source]
        if stop:
            part = range(start, stop)
            yield from row_files.read_chunks(name, source, columns=fields, part=part)
            continue
        for chunk in read_chunks([name], max_rows=left, seed=plan.seed, columns=fields):
            yield replace(chunk, source=source)
            left -= len(chunk.numbers) if left else 0
        if plan.config.max_rows and not left:
            return


def _lines(plan: BuildPlan, number: int) -> int:
    """Lines of a shard that is a part of a JSON Lines file, by which the next parts' rows are
    numbered; 0 for other shards, whose rows have the numbers of their file."""
    source, start, stop = plan.shards[number][0]
    if not stop or row_files.kind_of(Path(plan.sources[source])) == "parquet":
        return 0
    return lines_of_part(plan.sources[source], range(start, stop))


def _lines_before(plan: BuildPlan, number: int) -> int:
    """Lines of the file before a shard; 0 for a shard whose rows have the numbers of their file."""
    source, start, _ = plan.shards[number][0]
    return lines_of_part(plan.sources[source], range(start)) if _lines(plan, number) else 0


def _count_bad(
    plan: BuildPlan,
    rows: Iterable[tuple[int, int, str]],
    before: int,
    into: BadRows | None = None,
) -> BadRows:
    """Count the bad rows of a shard, whose lines come after `before` lines of the file."""
    into = into or BadRows(plan.config.max_bad_rows)
    for source, row, reason in rows:
        into.add(f"{plan.sources[source]}:{row + before}", reason)
    return into
