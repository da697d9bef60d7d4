"""Errors that a user can fix; the program shows their message instead of a traceback."""

from __future__ import annotations

from typing import Any


class PicklableError(Exception):
    """An error that is the same in other processes, also if its class has an `__init__`.

    Python would call that with the message, and lose or mistake what it takes.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).__new__, (type(self), *self.args), self.__dict__


class UserError(PicklableError):
    """An error that the user can fix; the message holds the value, the rule and the remedy.

    exit_code: the program's exit code if nothing catches the error.
    """

    exit_code = 2


class RecipeError(UserError, ValueError):
    """Invalid settings; the message lists every one with its remedy."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        lines = "\n".join(f"  {i}. {p}" for i, p in enumerate(problems, 1))
        super().__init__(f"{len(problems)} setting(s) cannot run:\n{lines}")
