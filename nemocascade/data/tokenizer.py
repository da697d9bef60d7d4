"""Tokenizers: sentencepiece models and Hugging Face `tokenizer.json`."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from nemocascade.data.chat_template import ChatTemplate, Conversation, encode
from nemocascade.data.errors import TokenizerError
from nemocascade.data.own_template import OWN_TEMPLATE
from nemocascade.data.tokenizer_files import (
    TOKEN_NAMES,
    jinja_source,
    read_settings,
    token_text,
    without_prefix,
)
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Artifact, Message, Tool

CONTROL_TAGS = (
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
"""Tags of the project's chat template; each is one token in a tokenizer trained here."""

REQUIRED_TAGS = CONTROL_TAGS[:2]

_PROBE = "  a\n\n\tb é 1 "

_SHORT = 16

# Appended to a serialised sentencepiece model. Protocol buffers merge a repeated sub-message field
# by field, so these bytes set normalizer_spec (field 3) { add_dummy_prefix (3): false,
# remove_extra_whitespaces (4): false } and leave the rest of the model unchanged.
_VERBATIM = bytes([0x1A, 0x04, 0x18, 0x00, 0x20, 0x00])


class Tokenizer(ABC):
    """Tokenizer interface, independent of the library behind it.

    Special tokens are handled here, so that both libraries treat them alike.
    """

    path: str
    """File the tokenizer was read from."""

    fingerprint: str
    """sha256 of that file, in hex."""

    vocab_size: int
    """Highest id plus one."""

    special_tokens: dict[str, int]
    """Ids of control tokens: template tags, begin, end, padding. Text is encoded to one of them
    only with `allow_special`."""

    bos_id: int | None
    eos_id: int | None
    pad_id: int
    """Padding of a packed batch; its loss weight is 0, so any id will do."""

    end_ids: tuple[int, ...]
    """Tokens that end an assistant turn by the chat template, where generation stops."""

    end_of_turn_id: int
    """The first of `end_ids`: it ends a turn without calls."""

    chat_template: str | None
    """Jinja source of `chat_template.jinja` or `tokenizer_config.json` beside the file, if any."""

    template: ChatTemplate
    """The tokenizer's own template; without one, the project's."""

    config: dict[str, Any]
    """Content of `tokenizer_config.json` beside the file, or empty."""

    def __init__(self, path: Path, data: bytes, specials: Mapping[str, int]) -> None:
        self.path = str(path)
        self.fingerprint = hashlib.sha256(data).hexdigest()
        self.special_tokens = dict(sorted(specials.items(), key=lambda item: item[1]))
        self.config = read_settings(path.with_name("tokenizer_config.json"))
        self.chat_template = jinja_source(path, self.config)
        missing = [tag for tag in REQUIRED_TAGS if tag not in specials]
        if missing and self.chat_template is None:
            raise TokenizerError(
                f"{path}: no chat template, and no token {' and '.join(missing)}, by which the "
                "project's template closes turns: add chat_template.jinja, use a tokenizer with "
                "ChatML tokens, or train one with `nemocascade tokenizer`"
            )
        tokens = {name: token_text(self.config.get(name)) for name in TOKEN_NAMES}
        try:
            self.template = ChatTemplate(
                OWN_TEMPLATE if self.chat_template is None else self.chat_template,
                specials,
                {name: text for name, text in tokens.items() if text},
            )
        except DataError as error:
            raise TokenizerError(f"{path}: {error}") from None
        self.end_ids = tuple(specials[end] for end in self.template.ends)
        self.end_of_turn_id = self.end_ids[0]
        self._short_text = functools.lru_cache(maxsize=4096)(self._without_special)
        self._special_ids = frozenset(specials.values())
        self._names = {i: t for t, i in self.special_tokens.items()}
        # Longest first, so that a token which is a prefix of another does not hide it.
        texts = sorted(filter(None, specials), key=len, reverse=True)
        self._any_special = re.compile("(" + "|".join(map(re.escape, texts)) + ")")

    @property
    def stop_tokens(self) -> tuple[tuple[int], ...]:
        """`end_ids` as sequences of one token, for sampling up to the end of a turn."""
        return tuple((end,) for end in self.end_ids)

    def prompt_ids(
        self, messages: Sequence[Message], tools: Sequence[Tool] = (), *, thinking: bool
    ) -> list[int]:
        """Token ids of a conversation up to the assistant's next turn.

        Raises DataError if the chat template rejects it.
        """
        conversation = Conversation(tuple(messages), tuple(tools))
        return encode(self.template.render_prompt(conversation, thinking=thinking), self)[0]

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Encode `text` without adding begin or end tokens.

        Without `allow_special`, text that looks like a special token becomes ordinary tokens.
        """
        if not allow_special:
            return list(self._ordinary(text))
        ids: list[int] = []
        for i, part in enumerate(self._any_special.split(text)):
            ids += [self.special_tokens[part]] if i % 2 else self._ordinary(part)
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Decode `ids`; special tokens become their text, or are skipped."""
        parts: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if i in self._names:
                parts += [self._decode_text(run), "" if skip_special else self._names[i]]
                run = []
            else:
                run.append(i)
        return "".join([*parts, self._decode_text(run)])

    def _ordinary(self, text: str) -> list[int]:
        """Encode `text` to ordinary tokens only. The list may be cached: do not change it."""
        # Most runs of a rendered conversation belong to the template, such as `user\n`. For them,
        # the cache is much faster than a call of the library.
        return self._short_text(text) if len(text) <= _SHORT else self._without_special(text)

    def _without_special(self, text: str) -> list[int]:
        ids = self._encode_text(text)
        if self._special_ids.isdisjoint(ids):
            return ids
        # The text contains a special token's text. Cut each after its first character, so that no
        # part contains a whole one.
        ids, start = [], 0
        while found := self._any_special.search(text, start):
            cut = found.start() + 1
            ids += self._encode_text(text[start:cut])
            start = cut
        ids += self._encode_text(text[start:])
        if self._special_ids.isdisjoint(ids):
            return ids
        # The library's normalisation produces a special token from other characters.
        return [i for character in text for i in self._encode_text(character)]

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Encode text with the library, which may still recognise special tokens in it."""

    @abstractmethod
    def _decode_text(self, ids: list[int]) -> str:
        """Decode ids that include no special token."""


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece `.model`. Spaces are kept verbatim: no prefix is added, none are merged."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data + _VERBATIM)
        except RuntimeError as error:
            raise TokenizerError(f"{path}: not a sentencepiece model ({error})") from None
        self.vocab_size = self._model.vocab_size()
        pieces = {self._model.id_to_piece(i): i for i in range(self.vocab_size)}
        super().__init__(
            path,
            data,
            {p: i for p, i in pieces.items() if p in CONTROL_TAGS or self._model.is_control(i)},
        )
        self.bos_id = _valid(self._model.bos_id())
        self.eos_id = _valid(self._model.eos_id())
        pad = _valid(self._model.pad_id())
        self.pad_id = self.end_of_turn_id if pad is None else pad

    def _encode_text(self, text: str) -> list[int]:
        return self._model.encode(text) if text else []

    def _decode_text(self, ids: list[int]) -> str:
        return self._model.decode(ids) if ids else ""


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face `tokenizer.json`. `tokenizer_config.json` beside it names bos, eos and pad."""

    def __init__(self, path: Path) -> None:
        data = path.read_bytes()
        try:
            spec = without_prefix(json.loads(data))
            self._model = tokenizers.Tokenizer.from_str(json.dumps(spec))
        # The tokenizers library raises a bare Exception for anything it cannot read.
        except Exception as error:
            raise TokenizerError(f"{path}: not a Hugging Face tokenizer.json ({error})") from None
        self._model.no_padding()
        self._model.no_truncation()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        added = self._model.get_added_tokens_decoder()
        # The unknown token is produced by ordinary text and controls nothing.
        unknown = getattr(self._model.model, "unk_token", None)
        specials = {t.content: i for i, t in added.items() if t.special and t.content != unknown}
        specials |= {tag: vocabulary[tag] for tag in CONTROL_TAGS if tag in vocabulary}
        taken = {i: t for t, i in specials.items()}
        for token, i in vocabulary.items():
            if taken.get(i, token) != token:
                raise TokenizerError(
                    f"{path}: {token!r} has id {i}, which is that of {taken[i]!r}: text would "
                    "become a control token; give each its own id"
                )
        super().__init__(path, data, specials)
        ids = {name: vocabulary.get(token_text(self.config.get(name))) for name in TOKEN_NAMES}
        self.bos_id, self.eos_id = ids["bos_token"], ids["eos_token"]
        pad = ids["pad_token"]
        self.pad_id = self.end_of_turn_id if pad is None else pad

    def _encode_text(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            return list(self._model.encode(text, add_special_tokens=False).ids)
        # For example, a character outside of the vocabulary where it has no unknown token.
        except Exception as error:
            raise TokenizerError(f"{self.path}: cannot encode {text[:80]!r}: {error}") from None

    def _decode_text(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False) if ids else ""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a sentencepiece `.model`, a `tokenizer.json`, or a folder with one of them.

    A warning is logged if decoding does not return the encoded text unchanged.

    Raises TokenizerError if the file is absent, broken or of another kind, if its chat template
    cannot be used, or if it has none and no tokens `<|im_start|>` and `<|im_end|>`.
    """
    file = Path(path)
    if file.is_dir():
        names = ("tokenizer.json", "tokenizer.model")
        found = [file / name for name in names if (file / name).is_file()]
        if not found:
            raise TokenizerError(f"{file}: the folder holds neither {' nor '.join(names)}")
        file = found[0]
    if not file.is_file():
        raise TokenizerError(f"{file}: no such tokenizer file; set tokenizer.path")
    kinds = {".json": HuggingFaceTokenizer, ".model": SentencePieceTokenizer}
    if file.suffix not in kinds:
        raise TokenizerError(f"{file}: a tokenizer is a sentencepiece .model or a tokenizer.json")
    try:
        tokenizer = kinds[file.suffix](file)
        back = tokenizer.decode(tokenizer.encode(_PROBE))
    except TokenizerError:
        raise
    # The libraries accept some files with which they then fail on any text, in many ways.
    except Exception as error:
        raise TokenizerError(f"{file}: it cannot be used as a tokenizer: {error}") from error
    if back != _PROBE:
        LOGGER.warning("%s changes text: %r comes back as %r", file, _PROBE, back)
    return tokenizer


def load_artifact_tokenizer(artifact: Artifact) -> Tokenizer:
    """Read an artifact's tokenizer. A warning is logged if the artifact was trained on the text of
    another chat template. Raises TokenizerError as `load_tokenizer`."""
    tokenizer = load_tokenizer(str(artifact.tokenizer_path))
    check_template(artifact, tokenizer)
    return tokenizer


def check_template(artifact: Artifact, tokenizer: Tokenizer) -> None:
    """Log a warning if `artifact` was trained on the text of another template than `tokenizer`'s.

    A model that was only imported is taken to know the template that came with it.
    """
    if artifact.stage != "convert" and artifact.template != tokenizer.template.digest:
        LOGGER.warning(
            "%s was trained with another chat template (%s) than the one of %s (%s): its prompts "
            "look different from those it was trained on",
            artifact.folder,
            (artifact.template or "not recorded")[:12],
            tokenizer.path,
            tokenizer.template.digest[:12],
        )


def check_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise TokenizerError if the model's `vocab_size` rows cannot hold every id."""
    if tokenizer.vocab_size > vocab_size:
        raise TokenizerError(
            f"{tokenizer.path} has ids up to {tokenizer.vocab_size - 1}, model.vocab_size is "
            f"{vocab_size}: set --model.vocab_size to at least {tokenizer.vocab_size}"
        )


def _valid(token: int) -> int | None:
    return token if token >= 0 else None
