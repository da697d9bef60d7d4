"""Snapshots of repositories at a commit, from git clones on this machine, without downloads.

Files are written as git stores them, because patches are made from those. `git archive` and
checkouts skip and rewrite files by the repository's attributes (export-ignore, export-subst,
filters).
"""

from __future__ import annotations

import io
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from nemocascade.swe.snapshots import MOST_MIB, misfit

_COMMIT = re.compile(r"[0-9a-f]{7,64}")
_REVISION = re.compile(rf"{_COMMIT.pattern}\^?")
_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_FILE = b"100"
"""Prefix of the modes of files; links and submodules have other modes."""


class CloneError(ValueError):
    """A clone is missing or incomplete. The message gives the remedy."""


@dataclass(frozen=True)
class _Entry:
    """A file at a commit. blob: object name of its contents."""

    path: str
    blob: bytes
    size: int


def find_clone(root: Path, repository: str) -> Path:
    """Return the git folder of `owner/name`, or of a `name` of any owner, below `root`.

    Raises CloneError without one, and for a name of several owners.
    """
    owner, _, name = repository.rpartition("/")
    if not _is_name(name) or not _is_name(owner or "any"):
        raise CloneError(f"repo({repository!r}) must be owner/name, or a name")
    if owner:
        folders = [root / f"{owner}__{name}", root / owner / name]
    else:
        folders = sorted({f.with_name(f.name.removesuffix(".git")) for f in _of_any(root, name)})
    found = [git for git in map(_git_folder, folders) if git is not None]
    if found and (owner or len(found) == 1):
        return found[0]
    if found:
        raise CloneError(f"{root} has {len(found)} clones of {name}: keep that of the right owner")
    place = f"{owner or 'OWNER'}__{name}"
    raise CloneError(
        f"{root} has no clone of {repository}: make one, git clone --bare "
        f"https://github.com/{owner or 'OWNER'}/{name} {root / place}"
    )


def commit_at(clone: Path, revision: str) -> str:
    """Return the hash of a commit that is given by its hash, or as `HASH^`, the one before."""
    if not _REVISION.fullmatch(revision):
        raise CloneError(f"base_commit({revision!r}) must be the hash of a commit")
    if not revision.endswith("^"):
        return revision
    try:
        return _git(clone, "rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    except CloneError as error:
        raise CloneError(f"{clone} has no commit {revision}, fetch it ({error})") from error


def write_snapshot(clone: Path, commit: str, target: Path) -> int:
    """Write the files at `commit` to the new folder `target`.

    Returns the number of skipped links and submodules. Raises CloneError for a commit that the
    clone does not fully have, and ValueError for files that a snapshot cannot hold.
    """
    if not _COMMIT.fullmatch(commit):
        raise CloneError(f"base_commit({commit!r}) must be the hash of a commit")
    entries, skipped = _entries(clone, commit)
    if not entries:
        raise ValueError(f"{clone} has no file at {commit}")
    if sum(entry.size for entry in entries) > MOST_MIB << 20:
        raise ValueError(f"{clone} holds more than {MOST_MIB} MiB at {commit}")
    if fault := misfit(entry.path for entry in entries):
        raise ValueError(f"{clone} at {commit}: {fault}")
    blobs = b"".join(entry.blob + b"\n" for entry in entries)
    stream = io.BytesIO(_git(clone, "cat-file", "--batch", stdin=blobs))
    for entry in entries:
        if stream.readline().split()[1:] != [b"blob", str(entry.size).encode()]:
            raise CloneError(f"{clone} has no {entry.path} at {commit}: fetch all of it")
        path = target / entry.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(stream.read(entry.size))
        stream.readline()  # the line break after the contents
    return skipped


def _of_any(root: Path, name: str) -> list[Path]:
    """Return the folders of a name, in any case, of all owners."""
    folders = [*root.glob("*"), *root.glob("*/*")]
    names = (name.lower(), f"{name.lower()}.git")
    return [f for f in folders if f.name.lower().rpartition("__")[2] in names]


def _git_folder(folder: Path) -> Path | None:
    """Return the git folder of a clone at `folder` or `folder.git`; None without one."""
    for place in (folder, folder.with_name(f"{folder.name}.git")):
        for git in (place / ".git", place):
            if git.is_file() or (git / "HEAD").is_file():
                return git
    return None


def _entries(clone: Path, commit: str) -> tuple[list[_Entry], int]:
    """Return the files at a commit, and the number of skipped entries."""
    try:
        listed = _git(clone, "ls-tree", "-r", "-l", "-z", "--full-tree", f"{commit}^{{commit}}")
    except CloneError as error:
        raise CloneError(f"{clone} has no commit {commit}, fetch it ({error})") from error
    found, skipped = [], 0
    for line in listed.split(b"\0")[:-1]:
        about, _, path = line.partition(b"\t")
        mode, _, blob, size = about.split()
        if mode.startswith(_FILE):
            found.append(_Entry(os.fsdecode(path), blob, int(size)))
        else:
            skipped += 1
    return found, skipped


def _git(clone: Path, *arguments: str, stdin: bytes = b"") -> bytes:
    """Return the output of a git command, which may access only the clone."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", f"--git-dir={clone}", *arguments],
            input=stdin,
            capture_output=True,
            env={**kept, "GIT_ALLOW_PROTOCOL": "none", "GIT_NO_LAZY_FETCH": "1", "LC_ALL": "C"},
            check=False,
        )
    except FileNotFoundError:
        raise CloneError("there is no program git: install it") from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise CloneError(said[0] if said else f"git {arguments[0]} ended with {done.returncode}")
    return done.stdout


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and text not in (".", "..")
