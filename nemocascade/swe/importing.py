"""`nemocascade import-swe`: converts rows in the form of SWE-Gym or R2E-Gym to folders of tasks.

A row names a repository and a commit, and has two patches, the repair and the hidden tests; rows of
R2E-Gym are converted first, see `swe.r2e`. Each row becomes a folder with `row.json` and `tests/`,
as `swe.rows` reads them. Snapshots are beside these folders; rows of the same commit share one.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from nemocascade.recipe.commands import ImportSettings
from nemocascade.runtime.row_errors import RowError
from nemocascade.runtime.row_files import find_files, read_rows, report_skipped
from nemocascade.swe.clones import commit_at, find_clone, write_snapshot
from nemocascade.swe.patches import apply_patch, parse_patch
from nemocascade.swe.protected import check_tests
from nemocascade.swe.r2e import converted, is_r2e
from nemocascade.swe.rows import ROW, TESTS, Row, issue_of, test_settings_of
from nemocascade.swe.snapshots import Files, check_path, snapshot_paths
from nemocascade.swe.tasks import patched_files

SNAPSHOTS = "snapshots"
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_NEEDED = ("instance_id", "repo", "base_commit", "patch")


@dataclass
class Imported:
    """Result of the import by row name. skipped: number of links and submodules, by
    snapshot."""

    made: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)

    def text(self) -> str:
        """Report one line per failure and per incomplete snapshot, and the counts."""
        lines = [f"{name}: {reason}" for name, reason in self.failed.items()]
        lines += [
            f"{name}: {count} links and submodules are skipped"
            for name, count in self.skipped.items()
        ]
        counts = f"{len(self.made)} tasks made, {len(self.kept)} were there already"
        return "\n".join([*lines, f"{counts}, {len(self.failed)} rows cannot be imported"])


def import_rows(settings: ImportSettings) -> Imported:
    """Make a task of every row. Raises DataError if the file of rows cannot be read."""
    report_skipped(settings.rows)
    rows = [found for file in find_files(settings.rows) for found in read_rows(file)]
    target, clones = Path(settings.target), Path(settings.repositories)
    (target / SNAPSHOTS).mkdir(parents=True, exist_ok=True)
    found = Imported()
    names: set[str] = set()
    for where, row in rows:
        if not isinstance(row, dict):
            found.failed[where] = str(row) if isinstance(row, RowError) else "not an object"
            continue
        name = str(row.get("instance_id") or where)
        try:
            if is_r2e(row):
                row = converted(row)
                name = row["instance_id"]
            _check(row, names)
            names.add(name)
            if (target / name).exists():
                found.kept.append(name)
                continue
            _import(row, target, clones, found)
            found.made.append(name)
        except Exception as error:  # a row comes from a download: any error is its own
            kind = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            found.failed[f"{where} {name}" if name != where else where] = f"{kind}{error}"
    return found


def _check(row: Row, names: set[str]) -> None:
    """Raise ValueError for a row with missing fields or a duplicate name."""
    for key in (*_NEEDED, *(() if row.get("test_files") else ("test_patch",))):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{key!r} must be a text that is not empty")
    issue_of(row)
    name = row["instance_id"]
    if not _ID.fullmatch(name) or name == SNAPSHOTS:
        raise ValueError(f"instance_id({name!r}) must be the name of a folder, such as a__b-12")
    if name in names:
        raise ValueError("a row before it has this instance_id")


def _import(row: Row, target: Path, clones: Path, found: Imported) -> None:
    """Write the task of one row, completely or not at all."""
    name = row["instance_id"]
    # Parse the patch first: that needs no snapshot.
    golden = list(row.get("golden_files") or patched_files(row["patch"]))
    settings = test_settings_of(row, {})
    snapshot = _snapshot(row, target, clones, found)
    tests = _tests(row, settings, target / snapshot)
    kept = {key: value for key, value in row.items() if key not in ("test_patch", "test_files")}
    kept |= {
        "FAIL_TO_PASS": settings["fail_to_pass"],
        "PASS_TO_PASS": settings["pass_to_pass"],
        "golden_files": golden,
        "repository": snapshot,
        "tests": {"files": f"{name}/{TESTS}", "framework": settings["framework"]},
    }
    with _new_folder(target, name) as folder:
        for path, data in tests.items():
            (folder / TESTS / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / TESTS / path).write_bytes(data)
        text = json.dumps(kept, ensure_ascii=False, indent=1, default=str)
        (folder / ROW).write_text(f"{text}\n", encoding="utf-8")


def _snapshot(row: Row, target: Path, clones: Path, found: Imported) -> str:
    """Return the folder of a row's repository, relative to `target`; write it if it is new."""
    clone = find_clone(clones, row["repo"])
    commit = commit_at(clone, row["base_commit"].strip().lower())
    name = f"{SNAPSHOTS}/{row['repo'].replace('/', '__')}@{commit}"
    if not (target / name).is_dir():
        with _new_folder(target, name) as folder:
            skipped = write_snapshot(clone, commit, folder)
        if skipped:
            found.skipped[name] = skipped
    return name


def _tests(row: Row, settings: Row, snapshot: Path) -> Files:
    """Return the test files: those of `test_patch` or `test_files`, and those of the other tests
    that must pass.

    Without the latter, a repair could change them.
    """
    patch = row.get("test_patch") or ""
    olds = {file.old for file in parse_patch(patch) if file.old is not None} if patch else set()
    before = {p: (snapshot / p).read_bytes() for p in olds if (snapshot / p).is_file()}
    after = apply_patch(before, patch) if patch else {}
    after |= {check_path(p): text.encode() for p, text in row.get("test_files", {}).items()}
    names = (*settings["fail_to_pass"], *settings["pass_to_pass"])
    # A file that the patch deletes or renames has no tests any more.
    there = {*snapshot_paths(snapshot)} - olds | {*after}
    for path in check_tests(names, there) - {*after}:
        after[path] = (snapshot / path).read_bytes()
    return after


@contextmanager
def _new_folder(target: Path, name: str) -> Iterator[Path]:
    """Yield a folder to fill. It is renamed to `name` on success and removed on failure.

    Until then it is where no task is searched for.
    """
    partial = target / SNAPSHOTS / f".{name.rpartition('/')[2]}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.rename(target / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
