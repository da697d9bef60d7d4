"""`nemocascade check-tasks`: checks that the tests of repair tasks detect a repair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemocascade.envs.prompt_rows import flattened
from nemocascade.recipe.commands import CheckSettings
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.row_files import find_files, read_rows, report_skipped
from nemocascade.sandbox.ray_sandbox import open_sandbox
from nemocascade.swe.patches import PatchError, apply_patch
from nemocascade.swe.repository import HiddenTests, judge, run_tests
from nemocascade.swe.rows import folder_rows, is_task_folder
from nemocascade.swe.snapshots import Files
from nemocascade.swe.tasks import task_of
from nemocascade.types import Row, Sandbox, SandboxError, SandboxUnavailable

_SHOWN = 5


@dataclass(frozen=True)
class Checked:
    """A task and its faults. tested: it has tests; patched: it has a patch."""

    name: str
    faults: tuple[str, ...]
    tested: bool = True
    patched: bool = True


def check_tasks(settings: CheckSettings) -> Iterator[Checked]:
    """Check every task; results are yielded in order, as soon as they are known.

    Raises ValueError for a path without tasks, and SandboxUnavailable if tests cannot be isolated.
    """
    path = Path(settings.path)
    if path.is_dir() and is_task_folder(path):
        rows = [(where, path, row) for where, row in folder_rows(path)]
    else:
        report_skipped(path)
        rows = [
            (where, Path(f).parent, row) for f in find_files(path) for where, row in read_rows(f)
        ]
    rows = [(where, folder, _flattened(row)) for where, folder, row in rows]
    tasks = [task for task in rows if not isinstance(task[2], dict) or _is_task(task[2])]
    if not tasks:
        raise DataError(f"{path}: none of its {len(rows)} rows is a repair task")
    if problems := settings.envs.problems():
        raise ValueError("; ".join(problems))
    sandbox = open_sandbox(settings.envs.sandbox)
    try:
        with ThreadPoolExecutor(sandbox.size, thread_name_prefix="check") as pool:
            yield from pool.map(lambda task: _checked(sandbox, *task), tasks)
    finally:
        sandbox.close()


def summary(checked: Sequence[Checked]) -> str:
    """Return the counts, including the tasks that could not be checked."""
    wrong = sum(bool(c.faults) for c in checked)
    text = f"{len(checked)} tasks: {len(checked) - wrong} right, {wrong} wrong"
    if untested := sum(not c.tested for c in checked):
        text += f"; {untested} have no tests"
    if unpatched := sum(not c.patched for c in checked):
        text += f"; {unpatched} have no patch, so nothing shows that they can be solved"
    return text


def _flattened(row: Any) -> Any:
    try:
        return flattened(row) if isinstance(row, dict) else row
    except ValueError as error:
        return error


def _is_task(row: Row) -> bool:
    return "problem_statement" in row or "issue" in row


def _checked(sandbox: Sandbox, where: str, folder: Path, row: Any) -> Checked:
    """Check one task. Exceptions become faults, except a sandbox that is unavailable."""
    if not isinstance(row, Mapping):
        return Checked(where, (str(row),), tested=False, patched=False)
    name = str(row.get("instance_id") or where)
    tested, patch = bool(row.get("tests")), str(row.get("patch") or "")
    try:
        faults = tuple(_faults(sandbox, row, folder))
    except SandboxUnavailable:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, SandboxError) as error:
        faults = (f"{type(error).__name__}: {error}",)
    return Checked(name, faults, tested, bool(patch))


def _faults(sandbox: Sandbox, row: Row, folder: Path) -> Iterator[str]:
    task = task_of(row, folder)
    snapshot = task.snapshot
    if task.tests is not None:
        yield from _before(sandbox, snapshot, task.tests)
    if not task.patch:
        return
    try:
        repaired = apply_patch(snapshot, task.patch)
    except PatchError as error:
        yield f"the patch cannot be applied: {error}"
        return
    if task.tests is not None:
        verdict = judge(sandbox, snapshot, repaired, task.tests)
        if verdict.reward != 1.0:
            plain = judge(sandbox, snapshot, repaired, replace(task.tests, sealed=False))
            hint = "; they pass if tests.sealed is false" if plain.reward == 1.0 else ""
            yield f"not all tests pass with the patch: {_shown(verdict.details)}{hint}"


def _before(sandbox: Sandbox, snapshot: Files, tests: HiddenTests) -> Iterator[str]:
    """Yield the wrong test outcomes before the repair."""
    names = (*tests.fail_to_pass, *tests.pass_to_pass)
    files = {**snapshot, **tests.files}
    run = run_tests(sandbox, files, names, framework=tests.framework)
    if run.process.status in ("time", "output"):
        yield f"the tests ended early: {run.process.status}, see envs.sandbox"
    passed = [name for name in tests.fail_to_pass if run.outcomes[name] == "passed"]
    if passed:
        yield f"FAIL_TO_PASS pass without a repair: {_some(passed)}"
    broken = [
        f"{name} ({run.outcomes[name]})"
        for name in tests.pass_to_pass
        if run.outcomes[name] != "passed"
    ]
    if broken:
        yield f"PASS_TO_PASS do not pass without a repair: {_some(broken)}"


def _shown(details: Mapping[str, Any]) -> str:
    """Format a verdict's details; empty ones are skipped."""
    return ", ".join(f"{key} {value}" for key, value in details.items() if value not in ([], {}))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
