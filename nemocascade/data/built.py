"""Folders of `nemocascade data build`: opened by stages whose settings give the same tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemocascade.data.cache import TokenCache, open_documents, token_settings
from nemocascade.data.cache_files import (
    CacheDamagedError,
    check_hashes,
    check_sizes,
    read_manifest,
)
from nemocascade.data.readers import files_named, files_read
from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.data import DataConfig
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import DataError

NO_TOKENIZER = (
    "tokenizer.path is empty, and a built folder of data has no text to train a tokenizer on: name "
    "the tokenizer that it was built with"
)


def open_built(
    path: Path, config: DataConfig, tokenizer: Tokenizer, *, seed: int, check: bool
) -> TokenCache:
    """Open a built folder for a stage, on any rank; no token is read.

    seed: of the stage, which decides synthetic rows. check: compare size and modification time of
    every file with those of its hash; one rank is enough.

    Raises CacheDamagedError for a file that changed, and DataError that names every setting by
    which the stage's tokens would differ from the folder's.
    """
    manifest = read_manifest(path)
    if found := list(differing_settings(manifest["key"], config, tokenizer, seed=seed)):
        raise DataError(
            f"{path} holds the tokens of other settings: {'; '.join(found)}. Set these as the "
            "folder has them, or build a folder with yours"
        )
    if check and (changed := check_sizes(path, manifest["files"])):
        raise CacheDamagedError(
            f"{path}: {len(changed)} files were written or copied after they were hashed, such as "
            f"{min(changed)}: `nemocascade data build --output {path} --verify True` reads all "
            "files and compares their hashes"
        )
    return open_documents(path, manifest, config)


def verify_built(path: Path) -> dict[str, Any]:
    """Read every file of a built folder and compare its hash; returns the folder's manifest.

    The files' modification times are then those that `open_built` expects.
    Raises CacheDamagedError.
    """
    manifest = read_manifest(path)
    check_sizes(path, manifest["files"])
    check_hashes(path, manifest["files"], manifest["files"], LOGGER.info)
    return manifest


def built_digest(path: Path) -> str:
    """Content digest of a built folder, from the hashes in its manifest; no token is read.

    A folder that is moved, or built again from the same rows with the same settings, has the same
    digest. Raises CacheDamagedError for a damaged manifest.
    """
    manifest = read_manifest(path)
    content = {name: manifest[name] for name in ("files", "shards")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def differing_settings(
    key: dict[str, Any], config: DataConfig, tokenizer: Tokenizer, *, seed: int
) -> Iterator[str]:
    """Yield a phrase for each setting with which the tokens would not be those of `key`."""
    built, here = key["settings"], token_settings(config, tokenizer)
    for name, value in here.items():
        if built.get(name) != value:
            yield f"{name} is {_shown(value)} here and {_shown(built.get(name))} in the folder"
    seeds = {source["seed"] for source in key["sources"] if "seed" in source}
    if seeds - {seed}:
        yield f"seed is {seed} here and {', '.join(map(str, sorted(seeds)))} in the folder"
    # The same names mean the same files, even if the folder has moved and the rows have not.
    if config.thinking and list(config.non_thinking_path) != key.get("non_thinking_path"):
        heldout = files_read(config.heldout_path)
        named = {f for n in config.non_thinking_path for f in files_named(n, config)} - heldout
        if named != {Path(key["sources"][i]["path"]) for i in key["without_thinking"]}:
            yield (
                f"data.non_thinking_path is {_shown(config.non_thinking_path)} here and "
                f"{_shown(key.get('non_thinking_path', ()))} in the folder"
            )


def _shown(value: Any) -> str:
    """The value for a message; a digest is cut to its first 12 letters."""
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "empty"
    text = str(value)
    is_digest = len(text) == 64 and not set(text) - set("0123456789abcdef")
    return text[:12] if is_digest else text or "empty"
