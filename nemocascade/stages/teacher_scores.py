"""Names the teachers of MOPD from which a student cannot improve, by held-out scores."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

NEAR_ZERO = 0.05
"""A teacher whose mean reward is below this cannot solve its domain's tasks."""


@dataclass(frozen=True)
class TaughtDomain:
    """A domain of MOPD with its teacher.

    share: fraction of the prompts. teacher: its name in messages. teacher_score, student_score:
    held-out mean rewards, the student's before the stage; None if unknown. is_start: the student
    starts from the teacher's weights.
    """

    domain: str
    share: float
    teacher: str
    teacher_score: float | None
    student_score: float | None
    is_start: bool = False

    def doubt(self) -> str:
        """Reason why the student cannot improve by this teacher; empty if it may, or if the
        teacher's score is unknown."""
        score, student = self.teacher_score, self.student_score
        if score is None:
            return ""
        if score < NEAR_ZERO:
            return f"{self.teacher} scores {score:.3f}, near 0"
        if self.is_start:
            return f"{self.teacher}, {score:.3f}, is the student's own start, so it only preserves"
        if student is not None and score <= student:
            return f"{self.teacher} scores {score:.3f}, not above the student's {student:.3f}"
        return ""


def teacher_warning(taught: Iterable[TaughtDomain], choice: str) -> str:
    """Text about the teachers from which the student cannot improve, with the remedy; empty if
    there are none. choice: how to choose another teacher."""
    found = [(each, doubt) for each in taught if (doubt := each.doubt())]
    if not found:
        return ""
    named = "\n".join(f"  - {each.domain}, {each.share:.0%}: {doubt}" for each, doubt in found)
    return (
        f"{sum(each.share for each, _ in found):.0%} of the prompts have a teacher from which the "
        f"student cannot improve:\n{named}\n"
        "  train such a domain in an earlier stage or a side stage, choose another teacher "
        f"({choice}), or lower its share (domains.N.share) to what preserving it is worth"
    )
