"""Data settings: files, their format, the tokenizer, packing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemocascade.recipe.paths import InputPath, OutputPath, RowPaths
from nemocascade.recipe.rules import Count, Natural, Tokens


@dataclass(frozen=True)
class TokenizerConfig:
    """Settings of the tokenizer."""

    path: InputPath = ""
    """A sentencepiece `.model` or a Hugging Face `tokenizer.json`. Empty: at the first start, train
    a sentencepiece model on the training files and store it in the run folder."""

    train_vocab_size: Count = 2048
    """Vocabulary size of the sentencepiece model that is trained when `path` is empty."""


@dataclass(frozen=True)
class DataConfig:
    """Training documents and how they are packed."""

    path: RowPaths = ()
    """JSON Lines (`.jsonl`) or JSON arrays (`.json`), also with `.gz` or `.zst`, Parquet files, or
    folders of them. `synthetic:NAME` makes rows from the seed instead of reading a file. A folder
    of `nemocascade data build`, named alone, holds tokens instead of rows."""

    hub: tuple[str, ...] = ()
    """Data sets beside `path`, by hub name or local folder: `name:split`, `name:config:split` or
    `name@revision:split`. The package `datasets` loads them."""

    format: Literal["auto", "messages", "qa", "nemotron", "sharegpt"] = "auto"
    """`messages`: a list of chat turns. `qa`: a question and an answer field. `nemotron`: the
    released Nemotron-Cascade rows. `sharegpt`: `conversations` of `from` and `value`. `auto`
    detects the format from each file's first row."""

    question_field: str = "question"
    """`qa` rows: name of the field with the user's turn."""

    answer_field: str = "answer"
    """`qa` rows: name of the field with the assistant's turn."""

    system_field: str = ""
    """`qa` rows: name of the field with the system turn; empty = none."""

    heldout_path: RowPaths = ()
    """Files for the held-out loss. Empty: `heldout_rows` rows are split off the training set."""

    heldout_hub: tuple[str, ...] = ()
    """Data sets beside `heldout_path`, named as in `hub`."""

    heldout_rows: Natural = 64
    """Rows split off the training set for the held-out loss when `heldout_path` is empty."""

    max_rows: Natural = 0
    """Read at most this many rows; 0 = all. Useful for trial runs."""

    thinking: bool = False
    """Render reasoning (`<think>`) for rows that have it."""

    non_thinking_path: RowPaths = ()
    """Files of `path` and `heldout_path`, or folders of them, whose rows are rendered without
    reasoning although `thinking` is on, such as trajectories of agents that act without it."""

    capacity: Tokens = 262_144
    """Tokens in one packed sequence (micro-batch)."""

    sequences_per_step: Count = 64
    """Packed sequences in one optimizer step, over all data-parallel ranks."""

    over_long: Literal["truncate", "drop", "refuse"] = "truncate"
    """Treatment of documents longer than `capacity`. They are always counted."""

    balance_group: Count = 16
    """Number of consecutive packed sequences with balanced work, so that ranks that run them side
    by side finish together. The order depends on the data only, not on the number of ranks."""

    max_bad_rows: Natural = 0
    """Number of unparsable rows that are skipped; one more is an error. 0 = none is skipped."""

    cache_dir: OutputPath = ""
    """Folder of the tokenised documents. Empty: `RUN/cache`."""
