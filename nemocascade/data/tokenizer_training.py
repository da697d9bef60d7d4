"""Training of a sentencepiece tokenizer on the text that a model will see."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

from nemocascade.data.chat_template import ChatTemplate
from nemocascade.data.errors import TokenizerError
from nemocascade.data.own_template import OWN_TEMPLATE
from nemocascade.data.readers import find_sources
from nemocascade.data.tokenization import read_conversations
from nemocascade.data.tokenizer import CONTROL_TAGS, Tokenizer, load_tokenizer
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.files import naming
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import BadRows

MAX_CHARACTERS = 200_000_000
SMALLEST_VOCABULARY = 4 + len(CONTROL_TAGS) + 256
"""Fixed pieces: unknown, begin, end, padding, the template's tags, and one piece per byte."""


def train_tokenizer(
    config: DataConfig,
    vocab_size: int,
    output: str | Path,
    *,
    seed: int = 0,
    max_characters: int = MAX_CHARACTERS,
) -> Tokenizer:
    """Train on the rendered conversations of `config.path`, write `output`, and open it.

    seed: seed of synthetic rows. max_characters: reading stops after this many, since more text
    hardly changes the pieces.

    Raises DataError for bad data and TokenizerError if the vocabulary is too small.
    """
    bad = BadRows(config.max_bad_rows)
    texts = _texts(config, seed, bad)
    file = train_sentencepiece(_at_most(texts, max_characters), vocab_size, output)
    if bad.count:
        LOGGER.warning("%s", bad.summary())
    return load_tokenizer(file)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, output: str | Path) -> Path:
    """Train byte-pair pieces on `texts` and write the model to `output`, which must end in .model.

    vocab_size: maximum number of ids. If the texts yield fewer, the vocabulary is smaller and a
        warning is logged.

    Spaces, line breaks and digits are separate pieces. A character without a piece becomes its
    bytes, so every text can be encoded and is decoded unchanged. The template's tags are single
    pieces. The same texts give the same file.

    Raises TokenizerError if `vocab_size` is too small for the fixed pieces.
    """
    path = Path(output)
    if path.suffix != ".model":
        raise TokenizerError(f"{path}: a sentencepiece model's name must end in .model")
    if vocab_size < SMALLEST_VOCABULARY:
        raise TokenizerError(
            f"vocabulary of {vocab_size}: bytes and tags alone are {SMALLEST_VOCABULARY}; "
            "set tokenizer.train_vocab_size higher"
        )
    sentences = list(texts)
    try:
        model = _train(sentences, vocab_size)
    except RuntimeError as error:
        # The library reports the largest possible vocabulary only after it has tried.
        possible = re.search(r"Please set it to a value <= (\d+)", str(error))
        if not possible:
            raise TokenizerError(f"no tokenizer can be made of these texts: {error}") from None
        largest = int(possible.group(1))
        LOGGER.warning("the texts give %d pieces, not %d: so many are made", largest, vocab_size)
        model = _train(sentences, largest)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with naming(partial), partial.open("wb") as stream:
        stream.write(model)
        stream.flush()
        os.fsync(stream.fileno())
    partial.rename(path)
    return path


def _train(sentences: list[str], vocab_size: int) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=0.9999,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        split_digits=True,
        user_defined_symbols=list(CONTROL_TAGS),
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=3,
        # Longer sentences would be dropped silently.
        max_sentence_length=1 << 30,
        minloglevel=2,
    )
    return model.getvalue()


def _texts(config: DataConfig, seed: int, bad: BadRows) -> Iterator[str]:
    """Yield the text between the template's tags, which are pieces already."""
    template = ChatTemplate(OWN_TEMPLATE, CONTROL_TAGS)
    for _, conversation in read_conversations(find_sources(config.path), config, bad, seed=seed):
        for segment in template.render(conversation, thinking=config.thinking):
            if not segment.control and segment.text:
                yield segment.text


def _at_most(texts: Iterable[str], characters: int) -> Iterator[str]:
    for text in texts:
        yield text
        characters -= len(text)
        if characters <= 0:
            return
