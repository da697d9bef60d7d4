"""Base classes of domains that run programs, and of repair domains that read task folders."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemocascade.envs.base import Domain
from nemocascade.envs.row_forms import RowForm
from nemocascade.recipe.envs import SandboxConfig
from nemocascade.sandbox.ray_sandbox import AnySandbox, RaySandbox, open_sandbox
from nemocascade.swe.rows import folder_rows, is_task_folder
from nemocascade.types import Message, Prompt, Verdict


class SandboxedDomain(Domain):
    """A domain with a sandbox, started by the first verdict that needs it.

    modules: installed modules that its programs may import, besides the standard library.
    """

    def __init__(self, config: SandboxConfig | None = None, *, modules: Sequence[str] = ()) -> None:
        self._config = config or SandboxConfig()
        self._modules = tuple(modules)
        self._lock = threading.Lock()
        self._sandbox: AnySandbox | None = None

    @property
    def sandbox(self) -> AnySandbox:
        """Runs the programs. Raises SandboxUnavailable if it cannot start."""
        with self._lock:
            if self._sandbox is None:
                self._sandbox = open_sandbox(self._config, modules=self._modules)
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
        if any(map(self.runs_programs, prompts)) and isinstance(self.sandbox, RaySandbox):
            self.sandbox.check()


class RepairDomain(SandboxedDomain):
    """A domain of software repair, which can also read folders of tasks."""

    row_forms: tuple[RowForm, ...] = (
        RowForm(
            "an issue and a repository (SWE-Gym, R2E-Gym)",
            read={
                "problem_statement": "the issue",
                "issue": "the issue, if there is no `problem_statement`",
                "repository": "folder with the files before the repair, beside the rows",
                "files": "the files themselves, texts by path, for `swe_agentless`",
                "docker_image": "an image, which is not run: `import-swe` reads such rows",
                "base_commit": "a commit of a clone: `import-swe` reads rows without `repository`",
                "tests.files": "the hidden tests: a folder, or texts by path",
                "tests.framework": "`pytest` or `unittest`; by default, the tests' names decide",
                "tests.sealed": "false lets the repository's code see the tests",
                **{
                    place + name: text
                    for place in ("", "tests.")
                    for name, text in {
                        "FAIL_TO_PASS": "tests that a repair must make pass",
                        "PASS_TO_PASS": "tests that must still pass",
                        "fail_to_pass": "the same as `FAIL_TO_PASS`",
                        "pass_to_pass": "the same as `PASS_TO_PASS`",
                    }.items()
                },
            },
            ignored={
                "instance_id": "a name of the row",
                **dict.fromkeys(
                    ("repo", "version", "environment_setup_commit"),
                    "where the files in `repository` come from",
                ),
                "hints_text": "not shown",
                "test_patch": "`tests.files` are the tests with it",
            },
        ),
    )

    def _rows(self, path: Path) -> Iterator[tuple[str, Path, Any]]:
        """Yield the rows of data files, or of a folder of task folders, see `swe.rows`."""
        if not path.is_dir() or not is_task_folder(path):
            yield from super()._rows(path)
            return
        for where, row in folder_rows(path):
            yield where, path, row
