"""Signs of reward hacking: what changed in a stage's responses while its reward rose."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nemocascade.cascade.report import words
from nemocascade.cascade.report.record import Run, Stage
from nemocascade.cascade.report.scores import is_noise

REWARD_RISE = 0.1
"""Rise of the training reward that a held-out score should confirm."""
TRUNCATED, TRUNCATED_RISE = 0.1, 0.05
"""Share of truncated responses, and its rise, that are flagged together."""
LONGER, SHORTER = 1.5, 0.5
"""Ratios of the response length that are flagged."""
REPEATED, REPEATED_RISE = 0.2, 0.1
"""Share of repeated text, and its rise, that are flagged together."""


@dataclass(frozen=True)
class Measure:
    """A measure of a stage at its beginning and its end. sign: why it is flagged; "" if not."""

    text: str
    sign: str = ""


@dataclass(frozen=True)
class SignRow:
    """The measures of an RL stage, by name in the table's order; None if it did not record one."""

    stage: Stage
    measures: dict[str, Measure | None]

    @property
    def signs(self) -> list[str]:
        """The sentences of all flagged measures."""
        return [m.sign for m in self.measures.values() if m is not None and m.sign]


def sign_rows(run: Run) -> list[SignRow]:
    """The stages that have rollouts, with their measures."""
    rows = []
    for stage in run.stages:
        measures = {
            "reward in training": _reward(run, stage),
            "held-out gain": _heldout(run, stage),
            "response tokens": _measure(stage, "response_tokens", words.number, _length_sign),
            "truncated": _measure(stage, "truncated", words.percent, _truncated_sign),
            "repeated text": _measure(stage, "repetition", words.percent, _repeated_sign),
        }
        if any(measures.values()):
            rows.append(SignRow(stage, measures))
    return rows


def flagged(run: Run) -> list[tuple[str, str]]:
    """(stage name, sentence) of every sign."""
    return [(row.stage.name, sign) for row in sign_rows(run) for sign in row.signs]


def _measure(
    stage: Stage,
    name: str,
    shown: Callable[[float], str],
    sign: Callable[[float, float], str],
) -> Measure | None:
    ends = stage.ends(name)
    if ends is None:
        return None
    return Measure(f"{shown(ends[0])} → {shown(ends[1])}", sign(*ends))


def _length_sign(first: float, last: float) -> str:
    if first <= 0 or SHORTER < last / first < LONGER:
        return ""
    return f"responses went from {words.number(first)} to {words.number(last)} tokens"


def _truncated_sign(first: float, last: float) -> str:
    if last < TRUNCATED or last - first < TRUNCATED_RISE:
        return ""
    return f"{words.percent(last)} of the responses are truncated, {words.percent(first)} before"


def _repeated_sign(first: float, last: float) -> str:
    if last < REPEATED or last - first < REPEATED_RISE:
        return ""
    return f"{words.percent(last)} of the text repeats itself, {words.percent(first)} before"


def _reward(run: Run, stage: Stage) -> Measure | None:
    """The reward, flagged if it rose and no held-out score of the trained domains did. MOPD does
    not train on rewards."""
    ends = stage.ends("reward")
    if ends is None or stage.kind == "sft":
        return None
    text, rise = f"{words.number(ends[0])} → {words.number(ends[1])}", ends[1] - ends[0]
    gains = list(_gains(run, stage))
    if stage.kind == "mopd" or rise < REWARD_RISE or not gains or any(g > 0 for g in gains):
        return Measure(text)
    return Measure(
        text, f"the reward rose by {words.number(rise)}, and no held-out score beyond noise"
    )


def _heldout(run: Run, stage: Stage) -> Measure | None:
    """Numbers of the trained domains that gained and lost beyond noise in held-out scores."""
    gains = list(_gains(run, stage))
    if not gains:
        return None
    up, down = sum(g > 0 for g in gains), sum(g < 0 for g in gains)
    parts = [f"{up} up" if up else "", f"{down} down" if down else ""]
    parts += [f"{len(gains) - up - down} within noise" if up + down < len(gains) else ""]
    return Measure(", ".join(filter(None, parts)))


def _gains(run: Run, stage: Stage) -> Iterator[float]:
    """Changes of the held-out scores of the trained domains; 0 within noise."""
    parent = run.stage(stage.start)
    for domain in stage.domains if parent is not None and stage.kind != "sft" else ():
        assert parent is not None
        before, after = parent.scores.get(domain), stage.scores.get(domain)
        if before is None or after is None or before.score is None or after.score is None:
            continue
        yield 0.0 if is_noise(before, after) else after.score - before.score
