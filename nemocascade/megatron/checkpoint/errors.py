"""Errors of folders that hold weights."""

from __future__ import annotations

from collections.abc import Sequence

from nemocascade.recipe import UserError
from nemocascade.runtime.files import may_pass
from nemocascade.runtime.stopping import AGAIN


class FolderError(UserError, RuntimeError):
    """A folder of weights that cannot be used; the message lists every reason."""

    def __init__(self, where: object, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(self.problems, 1))
        super().__init__(f"{where}: {len(self.problems)} problem(s):\n{lines}")


class StorageProblem(str):
    """A problem of a folder that is caused by its file system and may have passed at the next
    start. Ranks exchange problems as lists of text, in which it stays what it is."""

    __slots__ = ()


def storage_problem(text: str, error: BaseException) -> str:
    """The text, as a StorageProblem if it is caused by an error that may pass."""
    passing = isinstance(error, OSError) and may_pass(error)
    return StorageProblem(text) if passing else text


class CheckpointError(FolderError):
    """A checkpoint or artifact that cannot be written or read.

    may_pass: every reason is a StorageProblem; the exit code then asks for a further start.
    """

    def __init__(self, where: object, problems: Sequence[str]) -> None:
        super().__init__(where, problems)
        self.may_pass = bool(problems) and all(isinstance(p, StorageProblem) for p in problems)
        if self.may_pass:
            self.exit_code = AGAIN


class NonFiniteWeightsError(CheckpointError):
    """Weights or optimizer state that are NaN or infinite, which no folder may hold."""

    exit_code = 3
