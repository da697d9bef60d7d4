"""Errors that a user can fix; the program shows their message instead of a traceback."""

from __future__ import annotations


class UserError(Exception):
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

    def __reduce__(self) -> tuple[type[RecipeError], tuple[list[str]]]:
        """Pass the problems on to other processes, of which the message would be made twice."""
        return type(self), (self.problems,)
