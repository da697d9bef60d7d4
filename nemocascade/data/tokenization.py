"""Tokenisation of rows to flat arrays: parse, render, tokenise, in worker processes if asked."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from hashlib import blake2b
from multiprocessing import get_context
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nemocascade.data.chat_template import Conversation, encode
from nemocascade.data.formats import Format, detect_format, parse_row, row_fields
from nemocascade.data.readers import read_chunks
from nemocascade.data.tokenizer import Tokenizer, load_tokenizer
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.row_errors import BadRows, DataError, RowError
from nemocascade.runtime.row_files import RowChunk

TRAINED_BIT = np.uint32(1 << 31)


@dataclass(frozen=True)
class TokenizedChunk:
    """Tokenised documents of one chunk: D documents with n tokens in total.

    tokens:  [n] uint32, token id; the top bit is set where the token is trained.
    lengths: [D] int64, tokens.
    trained: [D] int64, trained tokens.
    first: [D] int64, position of the first trained token; the length where nothing is trained.
    numbers: [D] int64, row in its source.
    digests: [D] uint64, hash of the document's words.
    reasoned: number of documents whose row has reasoning, rendered or not.
    bad: (row, reason) of the rows that could not be parsed.
    """

    source: int
    tokens: NDArray[np.uint32]
    lengths: NDArray[np.int64]
    trained: NDArray[np.int64]
    first: NDArray[np.int64]
    numbers: NDArray[np.int64]
    digests: NDArray[np.uint64]
    reasoned: int
    bad: list[tuple[int, str]]


class ChunkTokenizer:
    """Tokenises chunks. It holds everything that the result depends on."""

    def __init__(
        self,
        formats: Sequence[Format],
        config: DataConfig,
        tokenizer: Tokenizer,
        silent: Collection[int] = (),
    ) -> None:
        """formats: the format of each source. silent: sources that are rendered without reasoning
        although `config.thinking` is on."""
        self._formats = formats
        self._silent = silent
        self._config = config
        self._tokenizer = tokenizer

    def __call__(self, chunk: RowChunk) -> TokenizedChunk:
        words: list[NDArray[np.uint32]] = []
        trained_counts, firsts, numbers, digests, bad = [], [], [], [], []
        reasoned = 0
        thinking = self._config.thinking and chunk.source not in self._silent
        for number, row in chunk.rows():
            try:
                if isinstance(row, RowError):
                    raise row
                conversation = parse_row(row, self._formats[chunk.source], self._config)
                segments = self._tokenizer.template.render(conversation, thinking=thinking)
            # A DataError is the template's: it rejects the conversation.
            except (RowError, DataError) as error:
                bad.append((number, str(error)))
                continue
            ids, trained = encode(segments, self._tokenizer)
            flags = np.array(trained, dtype=np.bool_)
            words.append(np.array(ids, dtype=np.uint32) | flags * TRAINED_BIT)
            digests.append(blake2b(words[-1].tobytes(), digest_size=8).digest())
            trained_counts.append(int(flags.sum()))
            firsts.append(int(flags.argmax()) if flags.any() else len(flags))
            numbers.append(number)
            reasoned += any(m.reasoning for m in conversation.messages)
        return TokenizedChunk(
            chunk.source,
            np.concatenate(words) if words else np.zeros(0, dtype=np.uint32),
            np.array([len(w) for w in words], dtype=np.int64),
            np.array(trained_counts, dtype=np.int64),
            np.array(firsts, dtype=np.int64),
            np.array(numbers, dtype=np.int64),
            np.frombuffer(b"".join(digests), dtype="<u8"),
            reasoned,
            bad,
        )


def tokenize_chunks(
    chunks: Iterable[RowChunk],
    formats: Sequence[Format],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    silent: Collection[int] = (),
    workers: int = 1,
) -> Iterator[TokenizedChunk]:
    """Tokenise `chunks` in order, in `workers` processes if more than one.

    silent: see `ChunkTokenizer`.
    """
    if workers <= 1:
        yield from map(ChunkTokenizer(formats, config, tokenizer, silent), chunks)
        return
    pool = ProcessPoolExecutor(
        workers,
        # A fork of a process that has threads of torch or NCCL can hang.
        mp_context=get_context("spawn"),
        initializer=_start_worker,
        initargs=(formats, config, tokenizer.path, silent),
    )
    with pool:
        pending: deque[Future[TokenizedChunk]] = deque()
        try:
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                # Bounded, so that reading does not fill the memory.
                if len(pending) >= 4 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_tokenize: Callable[[RowChunk], TokenizedChunk] | None = None
"""The worker process's tokenizer; a pool's initialiser can only leave it in a global."""


def _start_worker(
    formats: Sequence[Format], config: DataConfig, tokenizer: str, silent: Collection[int]
) -> None:
    global _tokenize
    _tokenize = ChunkTokenizer(formats, config, load_tokenizer(tokenizer), silent)


def _work(chunk: RowChunk) -> TokenizedChunk:
    assert _tokenize is not None
    return _tokenize(chunk)


def source_formats(
    sources: Sequence[str], config: DataConfig, *, seed: int = 0, heldout: bool = False
) -> list[Format]:
    """Return each source's format: the setting, or the format of its first readable row.

    Raises DataError for a source without rows, or whose first row fits no format.
    """
    if config.format != "auto":
        return [config.format] * len(sources)
    formats: list[Format] = []
    for name in sources:
        chunks = read_chunks([name], seed=seed, heldout=heldout, columns=row_fields(config))
        rows = (row for chunk in chunks for row in chunk.rows())
        formats.append(_first_format(rows, name, config))
    return formats


def read_sources(
    sources: Sequence[str], config: DataConfig, *, seed: int = 0, heldout: bool = False
) -> tuple[list[Format], Iterator[RowChunk]]:
    """Formats of the sources, as `source_formats`, and the chunks of their rows, in order."""
    chunks = read_chunks(
        sources,
        max_rows=config.max_rows,
        seed=seed,
        heldout=heldout,
        columns=row_fields(config),
    )
    return source_formats(sources, config, seed=seed, heldout=heldout), chunks


def read_conversations(
    sources: Sequence[str],
    config: DataConfig,
    bad: BadRows,
    *,
    seed: int = 0,
    heldout: bool = False,
) -> Iterator[tuple[str, Conversation]]:
    """Yield (`file:line`, conversation) of all sources in order; bad rows are counted in `bad`."""
    formats, chunks = read_sources(sources, config, seed=seed, heldout=heldout)
    for chunk in chunks:
        for number, row in chunk.rows():
            place = f"{sources[chunk.source]}:{number}"
            try:
                if isinstance(row, RowError):
                    raise row
                conversation = parse_row(row, formats[chunk.source], config)
            except RowError as error:
                bad.add(place, str(error))
                continue
            yield place, conversation
        bad.check()


def _first_format(rows: Iterator[tuple[int, Any]], name: str, config: DataConfig) -> Format:
    reason = ""
    for number, row in rows:
        if isinstance(row, dict):
            try:
                return detect_format(row, config)
            except RowError as error:
                raise DataError(f"{name}:{number}: {error}") from None
        if not reason:
            said = str(row) if isinstance(row, RowError) else "rows must be objects"
            reason = f"row {number}: {said}"
    raise DataError(f"{name}: no row can be read ({reason}); take it out of data.path")
