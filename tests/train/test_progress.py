"""The progress line says what the stage is about."""

from __future__ import annotations

from typing import Any

import pytest

from nemocascade.runtime.logging import LOGGER, Console
from nemocascade.train.progress import Progress, activity_text

POLICY = {
    "reward": 0.4125,
    "response_tokens": 31.4,
    "truncated": 0.031,
    "groups_informative": 7,
    "loss": 0.1,
    "mfu": None,
}


def line(progress: Progress) -> str:
    return "  ".join(part.text for part in progress.parts() if part.text)


def shown(console: Console, steps: list[dict[str, Any]], total: int = 15) -> str:
    progress = Progress(console, steps=total, first_step=0)
    for step, values in enumerate(steps):
        progress.show(step, values)
    return line(progress)


def test_a_stage_of_rewards_shows_its_responses() -> None:
    text = shown(Console("3/10 multi_domain_rl", 0.352), [POLICY])
    assert text.startswith("[3/10 multi_domain_rl]  step 1/15  reward 0.41  31 tokens")
    assert "truncated 3%" in text
    assert "held-out 0.35 at the start" in text
    assert "7 groups teach" in text
    assert "left" in text
    assert "loss" not in text
    assert "MFU" not in text


def test_the_last_held_out_score_stays() -> None:
    evaluated = {**POLICY, "heldout/math": 0.5, "heldout/code": 0.7}
    text = shown(Console("", 0.2), [POLICY, evaluated, POLICY])
    assert "held-out 0.60" in text
    assert "at the start" not in text
    assert not text.startswith("[")


def test_supervised_training_shows_its_loss() -> None:
    values = {"loss": 1.25, "heldout_loss": 1.5, "grad_norm": 0.5, "tokens_per_s": 1234.5}
    text = shown(Console(), [values, {**values, "heldout_loss": None}])
    assert "loss 1.2500  held-out 1.5000" in text
    assert "1,234 tokens/s" in text


def test_mopd_shows_the_distance_from_the_teacher() -> None:
    assert "KL to teacher 0.123" in shown(Console(), [{**POLICY, "reverse_kl": 0.1234}])


def test_the_last_step_has_no_time_left() -> None:
    assert "left" not in shown(Console(), [POLICY, POLICY], total=2)


def test_a_file_gets_some_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(LOGGER, "handlers", [])
    monkeypatch.setattr(LOGGER, "info", lambda text, *found: lines.append(text % found))
    shown(Console(), [POLICY] * 100, total=100)
    assert len(lines) == 3 + 20
    assert lines[-1].startswith("step 100/100")


@pytest.mark.parametrize(
    ("phase", "progress", "text"),
    [
        ("rollout: generation", "12 of 256 sequences done, 8 in progress", "generation 12/256"),
        ("step 4: optimizer", "", "optimizer"),
        ("set-up", "3 heads", "set-up"),
    ],
)
def test_activities(phase: str, progress: str, text: str) -> None:
    assert activity_text(phase, progress) == text
