"""A row's repository and tests, whether they lie in folders or stand in the row itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemocascade.envs.base import Domain
from nemocascade.swe.protected import check_tests
from nemocascade.swe.repository import HiddenTests
from nemocascade.swe.rows import answer_of, folder_rows, hidden_of, snapshot_of, test_settings_of
from nemocascade.swe.snapshots import Files
from nemocascade.swe.texts import folder_texts, row_files
from nemocascade.types import Prompt, Row


@dataclass(frozen=True)
class Task:
    """where: `{"repository": folder}` or `{"files": texts by path}`. patch: the right repair, or
    empty. tests: None where a judge must decide."""

    where: Mapping[str, Any]
    patch: str
    tests: HiddenTests | None

    @property
    def snapshot(self) -> Files:
        """The repository before the repair."""
        return snapshot_of(self.where)

    @property
    def texts(self) -> Mapping[str, str]:
        """The files of it that are text."""
        return texts_at(self.where)


def texts_at(where: Mapping[str, Any]) -> Mapping[str, str]:
    """The texts of `Task.where`; those of a folder are shared by whoever asks for them."""
    return where["files"] if "files" in where else folder_texts(where["repository"])


def task_of(row: Row, folder: Path) -> Task:
    """The task of a row. folder: its names are relative to it.

    The repository is `files` (path to text), or `repository`: such an object, or the name of a
    folder. Raises ValueError for what has another form, and for tests that stand nowhere.
    """
    named = row.get("repository", row.get("files"))
    where: dict[str, Any]
    if isinstance(named, str):
        where = {"repository": str((folder / named).resolve())}
    else:
        where = {"files": row_files(named or {})}
    if not texts_at(where):
        raise ValueError("'repository' and 'files' name no text file: there is nothing to edit")
    tests = _tests(row, where, folder) if row.get("tests") else None
    return Task(where, str(row.get("patch") or ""), tests)


def _tests(row: Row, where: Mapping[str, Any], folder: Path) -> HiddenTests:
    """`tests.files` (path to text, or a folder), `FAIL_TO_PASS`, and more of `swe.rows`."""
    tests = row["tests"]
    files = tests.get("files")
    if not files:
        raise ValueError("'tests.files' is empty: tests that an edit could change decide nothing")
    if "repository" in where:
        files = row_files(files) if isinstance(files, list) else files
        row = {**row, **where, "tests": {**tests, "files": files}}
        return hidden_of(answer_of(row, folder))
    hidden = hidden_of({"tests": row_files(files), **test_settings_of(row, tests)})
    names = (*hidden.fail_to_pass, *hidden.pass_to_pass)
    check_tests(names, [*where["files"], *hidden.files])
    return hidden


class TaskFolders(Domain):
    """A domain that reads folders of tasks too."""

    def read(self, path: str | Path) -> Iterator[Prompt]:
        """The tasks of a JSONL file, or of a folder of task folders: see `swe.rows`."""
        folder = Path(path)
        if not folder.is_dir():
            yield from super().read(path)
            return
        for where, row in folder_rows(folder):
            try:
                prompt = self._prompt(self.prepare(row, folder), where)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{where}: {type(error).__name__}: {error}") from error
            yield prompt
