"""Base classes of domains that run programs, and of repair domains that read task folders."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemocascade.envs.base import Domain
from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox.pool import SandboxPool
from nemocascade.swe.rows import folder_rows, is_task_folder
from nemocascade.types import Message, Prompt, Verdict


class SandboxedDomain(Domain):
    """A domain with a sandbox, started by the first verdict that needs it."""

    def __init__(self, config: SandboxConfig | None = None) -> None:
        self._config = config or SandboxConfig()
        self._lock = threading.Lock()
        self._sandbox: SandboxPool | None = None

    @property
    def sandbox(self) -> SandboxPool:
        """Pool that runs the programs. Raises SandboxUnavailable if it cannot start."""
        with self._lock:
            if self._sandbox is None:
                self._sandbox = SandboxPool(self._config)
            return self._sandbox

    def runs_programs(self, prompt: Prompt) -> bool:
        """Return True if verdicts on this task need the sandbox."""
        return True

    def score(self, prompt: Prompt, response: Sequence[Message]) -> Verdict:
        """Return the verdict. Raises SandboxUnavailable if programs cannot be isolated at all.

        It is raised, not reported as an error verdict: every later verdict would fail too.
        """
        self._start([prompt])
        return super().score(prompt, response)

    def score_groups(
        self, groups: Sequence[tuple[Prompt, Sequence[Sequence[Message]]]]
    ) -> list[list[Verdict]]:
        self._start([prompt for prompt, _ in groups])
        return super().score_groups(groups)

    def close(self) -> None:
        """End the sandbox's workers."""
        with self._lock:
            if self._sandbox is not None:
                self._sandbox.close()
                self._sandbox = None

    def _start(self, prompts: Sequence[Prompt]) -> None:
        if any(map(self.runs_programs, prompts)):
            _ = self.sandbox


class RepairDomain(SandboxedDomain):
    """A domain of software repair, which can also read folders of tasks."""

    def _rows(self, path: Path) -> Iterator[tuple[str, Path, Any]]:
        """Yield the rows of data files, or of a folder of task folders, see `swe.rows`."""
        if not path.is_dir() or not is_task_folder(path):
            yield from super()._rows(path)
            return
        for where, row in folder_rows(path):
            yield where, path, row
