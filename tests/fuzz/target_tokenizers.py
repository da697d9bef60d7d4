"""Files of tokenizers: sentencepiece models, tokenizer.json, tokenizer_config.json, templates."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from fuzz.harness import Target
from fuzz.mutations import TEXTS, Choices, json_bytes, mutated, spoiled
from helpers.data import huggingface_tokenizer, sentencepiece_tokenizer

from nemocascade.data.errors import TokenizerError
from nemocascade.data.tokenizer import load_tokenizer

Files = dict[str, bytes]

SPECIAL = {"content": "<|im_end|>", "special": True, "lstrip": False}
CONFIGS: tuple[Any, ...] = (
    {"bos_token": None, "eos_token": SPECIAL, "pad_token": "<|endoftext|>"},
    {"chat_template": "{{ messages[0].content }}", "eos_token": "<|im_end|>"},
    {"chat_template": [{"name": "default", "template": "a"}, {"name": "rag", "template": "b"}]},
)
PARTS: tuple[Any, ...] = (
    {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"}]},
    {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"},
    {"type": "Split", "pattern": {"Regex": "(a|a)*$"}, "behavior": "Isolated", "invert": False},
    None,
)


@functools.cache
def _specs() -> tuple[Any, ...]:
    """A small tokenizer.json in two forms."""
    spec = json.loads(Path(huggingface_tokenizer().path).read_bytes())
    vocabulary = spec["model"]["vocab"]
    kept = dict(sorted(vocabulary.items(), key=lambda item: item[1])[:300])
    small = {**spec, "model": {**spec["model"], "vocab": kept, "merges": []}}
    small["added_tokens"] = [t for t in spec["added_tokens"] if t["id"] < len(kept)]
    words = {**small, "model": {"type": "WordLevel", "vocab": kept, "unk_token": "a"}}
    return small, words


@functools.cache
def _model() -> bytes:
    return Path(sentencepiece_tokenizer().path).read_bytes()


def _huggingface(choices: Choices) -> Files:
    spec = choices.of(_specs())
    top = {key: value for key, value in spec.items() if key != "model"}
    model = {key: value for key, value in spec["model"].items() if key != "vocab"}
    # The vocabulary is large: it is changed at its ends.
    vocabulary = dict(spec["model"]["vocab"])
    for _ in range(choices.below(3)):
        key = choices.of(list(vocabulary) or [""])
        vocabulary[choices.of((key, *TEXTS))] = choices.of((0, 1, -1, 2**31, 2**33, 1.5, None, "a"))
        if choices.chance(20):
            vocabulary.clear()
    made = mutated(choices, [{**top, "model": {**model, "vocab": "@vocabulary@"}}])
    if isinstance(made, dict) and choices.chance(3):
        made[choices.of(("normalizer", "pre_tokenizer", "decoder", "post_processor"))] = mutated(
            choices, PARTS
        )
    data = json_bytes(made).replace(b'"@vocabulary@"', json_bytes(vocabulary))
    files = {"tokenizer.json": spoiled(choices, data)}
    if choices.chance(2):
        files["tokenizer_config.json"] = spoiled(choices, json_bytes(mutated(choices, CONFIGS)))
    if choices.chance(6):
        files["chat_template.jinja"] = spoiled(choices, choices.of(TEXTS).encode(errors="replace"))
    return files


def _sentencepiece(choices: Choices) -> Files:
    data = _model()
    for _ in range(1 + choices.below(4)):
        at = choices.below(1 << 16) * len(data) >> 16
        at = choices.of((at, choices.below(64)))
        size = 1 + choices.below(64)
        data = choices.of(
            (
                data[:at] + bytes([choices.below(256)]) + data[at + 1 :],
                data[:at] + data[at + size :],
                data[:at] + data[at : at + size] * 3 + data[at + size :],
                data[:at],
                data[:at] + b"\xff" * size + data[at + size :],
            )
        )
    return {"tokenizer.model": data}


def _load(files: Files, folder: Path) -> None:
    for name, data in files.items():
        (folder / name).write_bytes(data)
    tokenizer = load_tokenizer(folder)
    for text in ("", " a\n<|im_end|>\0", "e\u0301\U0001f600", "word " * 20):
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert not set(ids) & set(tokenizer.special_tokens.values())
        tokenizer.decode(tokenizer.encode(text, allow_special=True)).encode()
    for token in (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.end_of_turn_id):
        assert token is None or 0 <= token < tokenizer.vocab_size
    assert isinstance(tokenizer.chat_template, str | None)


TARGETS = (
    Target("tokenizer.json", _huggingface, _load, (TokenizerError,), share=6),
    Target("sentencepiece model", _sentencepiece, _load, (TokenizerError,), share=3),
)
