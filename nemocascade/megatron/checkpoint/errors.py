"""Errors of folders that hold weights."""

from __future__ import annotations

from collections.abc import Sequence

from nemocascade.recipe import UserError


class FolderError(UserError, RuntimeError):
    """A folder of weights that cannot be used; the message lists every reason."""

    def __init__(self, where: object, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(self.problems, 1))
        super().__init__(f"{where}: {len(self.problems)} problem(s):\n{lines}")


class CheckpointError(FolderError):
    """A checkpoint or artifact that cannot be written or read."""


class NonFiniteWeightsError(CheckpointError):
    """Weights or optimizer state that are NaN or infinite, which no folder may hold."""

    exit_code = 3
