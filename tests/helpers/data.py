"""Small tokenizers, rows and caches shared by the data tests."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from nemocascade.data.chat_template import ChatTemplate, Segment
from nemocascade.data.own_template import OWN_TEMPLATE
from nemocascade.data.readers import read_chunks
from nemocascade.data.synthetic import synthetic_rows
from nemocascade.data.tokenizer import CONTROL_TAGS, Tokenizer, load_tokenizer
from nemocascade.data.tokenizer_training import train_sentencepiece
from nemocascade.runtime.row_errors import BadRows, RowError

SHARED_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
GSM8K_TRAIN = SHARED_DATA / "gsm8k_train.jsonl"
GSM8K_TEST = SHARED_DATA / "gsm8k_test.jsonl"

needs_gsm8k = pytest.mark.skipif(
    not (GSM8K_TRAIN.is_file() and GSM8K_TEST.is_file()), reason=f"no GSM8K in {SHARED_DATA}"
)


def words() -> list[str]:
    """Text to train small tokenizers on."""
    rows = synthetic_rows("synthetic:arithmetic", seed=3, rows=300)
    return [m["content"] for row in rows for m in row["messages"]]


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="nemocascade_data_")


@functools.cache
def sentencepiece_tokenizer() -> Tokenizer:
    """About 500 pieces."""
    return load_tokenizer(train_sentencepiece(words(), 500, Path(_folder().name) / "small.model"))


@functools.cache
def huggingface_tokenizer() -> Tokenizer:
    """Byte-level pieces; the think tags are added tokens that are not special, as Qwen has them."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(
        words(),
        tokenizers.trainers.BpeTrainer(
            vocab_size=500,
            special_tokens=["<|endoftext|>", *CONTROL_TAGS[:2]],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model.add_tokens([tokenizers.AddedToken(tag, special=False) for tag in CONTROL_TAGS[2:]])
    folder = Path(_folder().name) / "huggingface"
    folder.mkdir()
    model.save(str(folder / "tokenizer.json"))
    config = {
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


@functools.cache
def own_template() -> ChatTemplate:
    """The project's template."""
    return ChatTemplate(OWN_TEMPLATE, CONTROL_TAGS)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any] | str]) -> Path:
    """Rows as JSON; a string is written as it stands."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def qa_rows(count: int) -> list[dict[str, str]]:
    """Different questions of very different lengths."""
    return [
        {"question": f"What is {i} and {i}? " * (1 + i * i % 17), "answer": f"It is {2 * i}."}
        for i in range(count)
    ]


def text_of(segments: Iterable[Segment]) -> str:
    """The rendered text as one string."""
    return "".join(s.text for s in segments)


def read_rows(sources: Sequence[str], bad: BadRows, **limits: Any) -> Iterator[tuple[str, Any]]:
    """(`file:line`, row) of all sources in order. Rows that cannot be read are counted in `bad`."""
    for chunk in read_chunks(sources, **limits):
        for number, row in chunk.rows():
            place = f"{sources[chunk.source]}:{number}"
            if isinstance(row, RowError):
                bad.add(place, str(row))
            else:
                yield place, row
        bad.check()
