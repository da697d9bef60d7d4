"""Files and settings by which other programs serve a model as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemocascade.data.errors import TokenizerError
from nemocascade.data.sentencepiece_json import sentencepiece_to_json
from nemocascade.data.tokenizer import Tokenizer, load_artifact_tokenizer
from nemocascade.data.tokenizer_files import TOKEN_NAMES, read_settings, token_text, without_prefix
from nemocascade.runtime.logging import LOGGER
from nemocascade.types import Artifact

_GENERATION = "generation_config.json"
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def serving_of(artifact: Artifact) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files by name, and settings of `config.json`, that belong to an artifact's exported weights.

    With them, transformers renders and tokenises conversations as this project does, and
    generation stops at the end of a turn. The files are the tokenizer, its settings, its chat
    template and the generation settings; settings beside the tokenizer's file are kept.

    Raises TokenizerError if the tokenizer cannot be used. That of a model which was only imported
    stays as it is, with a warning.
    """
    # If omitted, these would be the numbers of another vocabulary.
    settings: dict[str, Any] = dict.fromkeys(_IDS)
    if artifact.context_length:
        settings["max_position_embeddings"] = artifact.context_length
    if artifact.tokenizer_path is None:
        return {}, {} if artifact.stage == "convert" else settings
    try:
        tokenizer = load_artifact_tokenizer(artifact)
    except TokenizerError as error:
        if artifact.stage != "convert":
            raise
        LOGGER.warning("the tokenizer is exported as it came: %s", error)
        return {}, {}
    ids = (tokenizer.bos_id, tokenizer.end_of_turn_id, tokenizer.pad_id)
    settings |= zip(_IDS, ids, strict=True)
    files = {
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": _json(_tokenizer_settings(tokenizer, artifact.context_length)),
        "chat_template.jinja": tokenizer.template.source.encode(),
    }
    generation = read_settings(artifact.folder / _GENERATION)
    known = generation.get("eos_token_id", [])
    ends = [*tokenizer.end_ids, *(known if isinstance(known, list) else [known])]
    generation |= zip(_IDS, ids, strict=True)
    generation["eos_token_id"] = list(dict.fromkeys(ends))
    return {**files, _GENERATION: _json(generation)}, settings


def _tokenizer_json(tokenizer: Tokenizer) -> bytes:
    path = Path(tokenizer.path)
    if path.suffix == ".json":
        data = path.read_bytes()
        spec = json.loads(data)
        changed = without_prefix(spec)
        return data if changed == spec else json.dumps(changed, ensure_ascii=False).encode()
    # Think and tool tags are part of the text that parsers of replies read.
    ids = {*tokenizer.end_ids, tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id}
    special = {t for t, i in tokenizer.special_tokens.items() if i in ids or t == "<|im_start|>"}
    return sentencepiece_to_json(path, special).encode()


def _tokenizer_settings(tokenizer: Tokenizer, context_length: int) -> dict[str, Any]:
    settings = {
        "clean_up_tokenization_spaces": False,
        **tokenizer.config,
        # It takes tokenizer.json as it is; classes of models change prefixes and spaces.
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    # The template has a file of its own, and code of the folder is not needed.
    for name in ("chat_template", "auto_map", "add_prefix_space"):
        settings.pop(name, None)
    if context_length:
        settings["model_max_length"] = context_length
    ids = (tokenizer.bos_id, tokenizer.end_of_turn_id, tokenizer.pad_id)
    made = {
        name: tokenizer.decode([number])
        for name, number in zip(TOKEN_NAMES[:3], ids, strict=True)
        if number is not None
    }
    given = {name: token_text(settings.get(name)) for name in TOKEN_NAMES}
    return settings | made | {name: text for name, text in given.items() if text}


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True) + "\n").encode()
