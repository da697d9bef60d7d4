"""Pass rates of the rows of a file: its tasks, their verdicts so far, and the rows with rates.

Each verdict is appended to a journal at once, so an interrupted run repeats none of them. The
rows are written to a temporary file, which is then renamed.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any

from nemocascade.rl.collector import Collector, with_stop_penalty
from nemocascade.rl.rollouts import Rollout
from nemocascade.rl.tasks import Task
from nemocascade.runtime.files import naming
from nemocascade.runtime.jsonl import keep_settings, read_undamaged, write_objects
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import SHOWN_BAD_ROWS, DataError, RowError
from nemocascade.runtime.row_files import read_rows
from nemocascade.types import Environment, Prompt, Row

Verdicts = dict[tuple[int, int], float]
"""Rewards by row, counted from 0, and sample of the row."""


@dataclass
class RowTasks:
    """The tasks of a file. prompts: by the number of their row, counted from 0. bad: reason by
    `file:row` for rows that are not tasks."""

    prompts: dict[int, Prompt] = field(default_factory=dict)
    bad: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Number of bad rows with the first few reasons; empty if there is none."""
        reasons = [f"{where}: {reason}" for where, reason in self.bad.items()]
        more = len(reasons) - SHOWN_BAD_ROWS
        shown = "\n  ".join(reasons[:SHOWN_BAD_ROWS])
        ending = f"\n  and {more} more" if more > 0 else ""
        return f"{len(reasons)} bad rows are skipped\n  {shown}{ending}" if reasons else ""


def read_row_tasks(path: Path, environments: Mapping[str, Environment], output: Path) -> RowTasks:
    """Read each row as a task of the one domain that claims it.

    output: file that the rows will be written to.

    Raises DataError for a row that several of the domains claim, if no row is a task, and if the
    rows name folders relative to their file and `output` is in another folder.
    """
    numbers: dict[str, int] = {}
    claimed: set[str] = set()
    relative = output.absolute().parent.resolve() != path.absolute().parent.resolve()
    for number, (where, row) in enumerate(read_rows(path)):
        numbers[where] = number
        names = [name for name, env in environments.items() if _is_claimed(env, row)]
        if len(names) > 1:
            raise DataError(
                f"{where}: {' and '.join(names)} claim the row: set --domains to one of them"
            )
        claimed.update(names)
        if names and relative and isinstance(row.get("repository"), str):
            raise DataError(
                f"{where}: 'repository' is relative to the folder of its file: write --output "
                f"into {path.absolute().parent}"
            )
    found = RowTasks()
    used = [name for name in environments if name in claimed]
    for name in used:
        others = [environments[n] for n in used if n != name]
        # The file was read above without fault, so the error says that all of its rows are bad.
        with suppress(DataError):
            for prompt in environments[name].read(path, found.bad.setdefault, others):
                found.prompts[numbers[prompt.source]] = prompt
    if not found.prompts:
        reasons = f"; {found.summary()}" if found.bad else ""
        raise DataError(
            f"{path}: none of its {len(numbers)} rows is a task of {', '.join(environments)}: name "
            f"another file or --domains{reasons}"
        )
    if found.bad:
        LOGGER.warning("%s: %s", path, found.summary())
    return found


def _is_claimed(environment: Environment, row: Any) -> bool:
    """True if a row belongs to the domain; a row that cannot be read belongs to none."""
    if not isinstance(row, Mapping):
        return False
    try:
        return environment.claims(row)
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


class RewardLog:
    """Rewards of finished samples, in FOLDER/rank_N.jsonl. Thread-safe. rank: of this process."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = folder / f"rank_{rank}.jsonl"
        self._file = self._path.open("a", encoding="utf-8")
        # A kill may have cut the last line short.
        self._file.write("\n")
        self._lock = Lock()

    def record(self, row: int, sample: int, reward: float) -> None:
        """Append a reward; it is in the file when this returns."""
        line = json.dumps({"row": row, "sample": sample, "reward": reward})
        with self._lock, naming(self._path):
            self._file.write(f"{line}\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def open_journal(folder: Path, settings: Mapping[str, Any]) -> Verdicts:
    """Rewards that earlier starts of the job have recorded; a first start records its settings.

    settings: whatever affects the rewards, JSON values. Raises DataError if the job had others.
    """
    keep_settings(folder, settings, "verdicts")
    found: Verdicts = {}
    for file in sorted(folder.glob("rank_*.jsonl")):
        for _, line in read_undamaged(file, _warn_of(file)):
            found[line["row"], line["sample"]] = line["reward"]
    return found


def _warn_of(file: Path) -> Any:
    return lambda line: LOGGER.warning("%s: a line cut short is dropped: %.60s", file, line)


def sample_missing(
    collector: Collector,
    asked: Mapping[int, Task],
    known: Verdicts,
    journal: RewardLog,
    *,
    samples: int,
) -> Verdicts:
    """Rewards of all samples, on every rank; those in `known` are not sampled again. Samples whose
    verifier failed have none. Truncated ones are scaled as in training.

    asked: the task of each row. A draw depends on the seed, the row and the sample alone. Answers
    to `prompts_per_step` rows are generated at a time.
    """
    found = dict(known)

    def record(task: Task, rollout: Rollout) -> None:
        reward = with_stop_penalty(rollout, collector.settings).verdict.reward
        if reward is not None:
            journal.record(*divmod(task.number, samples), reward)

    collector.on_verdict = record
    missing = {row: [k for k in range(samples) if (row, k) not in known] for row in asked}
    rows = [row for row in sorted(asked) if missing[row]]
    count = collector.settings.prompts_per_step
    for start in range(0, len(rows), count):
        part = rows[start : start + count]
        # Samples of a row are consecutive, so that they share the prefill of their prompt.
        numbers = [(row, k) for row in part for k in missing[row]]
        tasks = [replace(asked[row], number=row * samples + k) for row, k in numbers]
        for place, group in zip(numbers, collector.roll_out(tasks, 1), strict=True):
            (rollout,) = group.rollouts
            reward = with_stop_penalty(rollout, collector.settings).verdict.reward
            if reward is not None:
                found[place] = reward
        LOGGER.info("pass rates: %d of %d rows", start + len(part), len(rows))
    return found


def rates_of(rewards: Mapping[int, Sequence[float]], solved_at: float) -> dict[int, dict[str, Any]]:
    """The fields to add to each row, given the rewards of its samples.

    `pass_rate`: fraction of the rewards that are at least `solved_at`, None without a reward.
    `pass_rate_samples`: number of rewards.
    """
    return {
        row: {
            "pass_rate": sum(r >= solved_at for r in found) / len(found) if found else None,
            "pass_rate_samples": len(found),
        }
        for row, found in rewards.items()
    }


def write_rated(
    path: Path, output: Path, rates: Mapping[int, Mapping[str, Any]], bad: Collection[str]
) -> int:
    """Write the rows of `path` with the fields of `rates`, without those of `bad`, to `output`.

    Rows without an entry in `rates` stay as they are. Returns the number of rows.
    """
    rows = _good_rows(path, bad)
    return write_objects(output, ({**row, **rates.get(number, {})} for number, row in rows))


def _good_rows(path: Path, bad: Collection[str]) -> Iterator[tuple[int, Row]]:
    for number, (where, row) in enumerate(read_rows(path)):
        if where not in bad and not isinstance(row, RowError):
            yield number, row
