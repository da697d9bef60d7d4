"""Files of a tokenizer: settings, chat template, and changes to a `tokenizer.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemocascade.data.errors import TokenizerError

TOKEN_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
"""Special tokens that `tokenizer_config.json` names and templates may print."""


def read_settings(file: Path) -> dict[str, Any]:
    """Read settings beside a tokenizer's file, empty if there are none. Raises TokenizerError if
    they are not JSON."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file}: not JSON ({error})") from None
    return config if isinstance(config, dict) else {}


def jinja_source(path: Path, config: Mapping[str, Any]) -> str | None:
    """The jinja source beside a tokenizer's file; a file of its own comes before the settings."""
    file = path.with_name("chat_template.jinja")
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except ValueError as error:
            raise TokenizerError(f"{file}: not UTF-8 ({error})") from None
    inline = config.get("chat_template")
    if isinstance(inline, list):
        # A list holds several named templates; "default" is the one for chat.
        named = [t for t in inline if isinstance(t, dict) and t.get("name") == "default"]
        inline = named[-1].get("template") if named else None
    said = path.with_name("tokenizer_config.json")
    if not isinstance(inline, str | None):
        raise TokenizerError(f"{said}: chat_template must be a text, or a list of named ones")
    try:
        (inline or "").encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"{said}: chat_template holds half a character: {error}") from None
    return inline


def token_text(value: object) -> str:
    """Return a token's text; tokenizer_config.json has it as a string or as `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else ""


def without_prefix(spec: dict[str, Any]) -> dict[str, Any]:
    """Remove the settings that add a space before every text.

    Documents are tokenised in segments between special tokens, and a space before each segment
    would be text that nobody wrote.
    """
    parts = {key: _part(spec.get(key)) for key in ("normalizer", "pre_tokenizer", "decoder")}
    return {**spec, **parts}


def _part(part: Any) -> Any:
    if not isinstance(part, dict):
        return part
    prefix = part.get("type") == "Prepend"
    if prefix or (part.get("type") == "Strip" and part.get("content") == " "):
        return None
    part = dict(part)
    if part.get("type") == "Metaspace":
        part["prepend_scheme"] = "never"
    if part.get("type") == "ByteLevel":
        part["add_prefix_space"] = False
    for key in ("normalizers", "pretokenizers", "decoders"):
        if key in part:
            part[key] = [kept for kept in map(_part, part[key]) if kept is not None]
    return part
