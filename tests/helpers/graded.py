"""A judge with scripted answers."""

from __future__ import annotations

from collections.abc import Sequence

from nemocascade.types import Answer, Question


class WrittenJudge:
    """Answers in turn, and again from the start; keeps each call's questions."""

    def __init__(self, *answers: Answer, collective: bool = False) -> None:
        self.answers, self.collective = answers, collective
        self.calls: list[list[Question]] = []

    activity = 0

    def begin(self, questions: Sequence[Question]) -> None:
        """It has no time to spare."""

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        self.calls.append(list(questions))
        return [self.answers[i % len(self.answers)] for i in range(len(questions))]

    def close(self) -> None:
        """It holds nothing."""
