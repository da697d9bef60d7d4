"""Data sets by hub name: each split is exported once to a Parquet file, which is read like any
other. What identifies data files, in caches and manifests, so identifies these rows too."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import DataError

FORM = "NAME:SPLIT, NAME:CONFIG:SPLIT or NAME@REVISION:SPLIT"
FIELDS = {"hub": "path", "heldout_hub": "heldout_path"}
"""Settings that name data sets, and the setting beside each that gets their files."""


class HubSplit(NamedTuple):
    """A split of a data set. name: on the hub, or a local folder. config, revision: empty = the
    default ones."""

    name: str
    config: str
    revision: str
    split: str


def with_hub_files[S](settings: S) -> S:
    """The settings, of any kind, with the files of the data sets that they name in their paths.

    Raises DataError for a data set that cannot be read.
    """
    if not dataclasses.is_dataclass(settings) or isinstance(settings, type):
        return settings
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, tuple):
            new: Any = tuple(with_hub_files(inner) for inner in value)
        else:
            new = with_hub_files(value)
        if new != value:
            changed[field.name] = new
    for named, target in FIELDS.items():
        if names := getattr(settings, named, ()):
            paths = getattr(settings, target)
            files = [file for file in map(hub_file, names) if file not in paths]
            changed[target] = (*paths, *files)
    return dataclasses.replace(settings, **changed) if changed else settings


def parse_hub_name(text: str) -> HubSplit:
    """Parse `name:split`; a split may be a slice. Raises DataError for another form."""
    found = re.fullmatch(
        r"(?P<name>[^:]+):(?:(?P<config>[^:\[\]]+):)?(?P<split>[\w.+-]+(?:\[[^\[\]]*\])?)", text
    )
    if found is None:
        raise DataError(f"data set {text!r} is not of the form {FORM}: such as org/name:train")
    name, revision = found["name"], ""
    if not Path(name).is_dir():
        name, _, revision = name.partition("@")
    return HubSplit(name, found["config"] or "", revision, found["split"])


def hub_file(text: str) -> str:
    """Path of the Parquet file with the rows of a split, which is written at the first call.

    It is in $HF_HOME/nemocascade and is not updated when the hub changes: delete it to refresh.
    A local folder's name has the sizes and times of its files, so a changed folder is read anew.
    Raises DataError if `datasets` is not installed or cannot load the split.
    """
    source = parse_hub_name(text)
    home = Path(os.environ.get("HF_HOME") or "~/.cache/huggingface").expanduser()
    key = hashlib.sha256(repr((source, _state(Path(source.name)))).encode()).hexdigest()[:12]
    slug = re.sub(r"[^\w.-]+", "--", ":".join(filter(None, source)))[-100:].strip("-")
    file = home / "nemocascade" / f"{slug}-{key}.parquet"
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        with _alone(file.with_suffix(".lock")):
            if not file.is_file():
                _export(text, source, file)
    return str(file)


def _export(text: str, source: HubSplit, file: Path) -> None:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"data set {text} is loaded by the package datasets, which is not installed: pip "
            "install datasets, or export the rows and name their files in path"
        ) from error
    try:
        rows = datasets.load_dataset(
            source.name,
            source.config or None,
            split=source.split,
            revision=source.revision or None,
        )
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"data set {text} cannot be loaded: {type(error).__name__}: {reason}: check the name "
            f"({FORM}), and that the host reaches the hub or has it in $HF_HOME"
        ) from error
    draft = file.with_suffix(".part")
    rows.to_parquet(str(draft))
    draft.replace(file)
    LOGGER.info("%s: %d rows, exported to %s", text, rows.num_rows, file)


def _state(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of a local folder; [] for a name on the hub."""
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in files]


@contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Context that one process on this host is in at a time: one rank exports, the others wait."""
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
