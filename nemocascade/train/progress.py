"""The line that shows a running stage: its place, its step, and what the stage is about."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Any

from nemocascade.runtime.logging import (
    LOGGER,
    Console,
    StatusPart,
    Terminal,
    fitted,
    terminal,
    terminal_width,
)

HELDOUT = "heldout/"
ACTIVITY_S = 0.2
"""Shortest time between two updates within a step."""
# Measures in the line's order: name, format, rank. Those with the highest rank are dropped first.
OF_REWARDS = (
    ("reward", "reward {:.2f}", 2),
    ("reverse_kl", "KL to teacher {:.3f}", 3),
    ("heldout", "held-out {:.2f}", 4),
    ("response_tokens", "{:,.0f} tokens", 5),
    ("truncated", "truncated {:.0%}", 6),
    ("groups_informative", "{} groups teach", 9),
    ("kl", "KL {:.4f}", 10),
    ("grad_norm", "grad norm {:.2f}", 11),
    ("tokens_per_s", "{:,.0f} tokens/s", 12),
    ("mfu", "MFU {:.1%}", 13),
)
OF_LOSSES = (
    ("loss", "loss {:.4f}", 2),
    ("heldout_loss", "held-out {:.4f}", 4),
    ("grad_norm", "grad norm {:.3f}", 7),
    ("lr", "lr {:.2e}", 9),
    ("tokens_per_s", "{:,.0f} tokens/s", 6),
    ("mfu", "MFU {:.1%}", 8),
)


class Progress:
    """Shows the steps of a stage: on a terminal as a status line, elsewhere as some log lines.

    steps: of the whole stage. first_step: number of steps that earlier starts have done.
    """

    def __init__(self, console: Console, *, steps: int, first_step: int) -> None:
        self.console, self.steps, self.first_step = console, steps, first_step
        self._started = time.monotonic()
        self._step, self._values, self._heldout = first_step, dict[str, Any](), dict[str, float]()
        self._shown_at = 0.0

    def show(self, step: int, values: Mapping[str, Any]) -> None:
        """Show a finished step, counted from 0, with its metrics."""
        self._step, self._values = step + 1, dict(values)
        self._heldout |= _heldout(values)
        if (live := terminal()) is not None:
            self._draw(live)
            return
        done = self._step - self.first_step
        every = max(1, self.steps // 20)
        if done <= 3 or self._step % every == 0 or self._step == self.steps or _heldout(values):
            LOGGER.info("%s", "  ".join(p.text for p in self.parts() if p.text))

    def show_activity(self, phase: str, progress: str) -> None:
        """Show what happens within the next step, on a terminal."""
        live, now = terminal(), time.monotonic()
        if live is None or self._step >= self.steps or now - self._shown_at < ACTIVITY_S:
            return
        self._shown_at = now
        self._draw(live, activity_text(phase, progress))

    def _draw(self, live: Terminal, activity: str = "") -> None:
        line = fitted(self.parts(activity), terminal_width())
        live.show(line, keep=self._step == self.steps)

    def parts(self, activity: str = "") -> list[StatusPart]:
        """The parts of the line; `fitted` chooses among them. activity: in the current step."""
        values = self._values
        # Steps of a stage that train nothing have no loss; SFT has no rollouts.
        measures = OF_REWARDS if "response_tokens" in values else OF_LOSSES
        known = {**values, **self._heldout}
        parts = [
            StatusPart(f"[{self.console.label}]" if self.console.label else "", 1),
            StatusPart(f"step {self._step}/{self.steps}", 0),
        ]
        for name, text, rank in measures:
            value = known.get(name)
            if isinstance(value, int | float) and not isinstance(value, bool):
                parts.append(StatusPart(text.format(value), rank))
        if values and "heldout" not in known and self.console.start_score is not None:
            start = f"held-out {self.console.start_score:.2f} at the start"
            parts.append(StatusPart(start if measures is OF_REWARDS else "", 7))
        return [*parts, StatusPart(self._time_left(), 3), StatusPart(activity, 8)]

    def _time_left(self) -> str:
        done = self._step - self.first_step
        if done < 1 or self._step >= self.steps:
            return ""
        left_s = (time.monotonic() - self._started) / done * (self.steps - self._step)
        return f"{left_s:.0f} s left" if left_s < 90 else f"{left_s / 60:,.0f} min left"


class Activity:
    """Shows in a terminal's status line what ranks do while no steps are counted.

    what: name of the work, such as `held-out scores`.
    """

    def __init__(self, console: Console, what: str) -> None:
        self._head = [
            StatusPart(f"[{console.label}]" if console.label else "", 1),
            StatusPart(what, 0),
        ]
        self._shown_at = 0.0

    def show(self, phase: str, progress: str) -> None:
        """Show a phase with the share that is done."""
        live, now = terminal(), time.monotonic()
        if live is not None and now - self._shown_at >= ACTIVITY_S:
            self._shown_at = now
            parts = [*self._head, StatusPart(activity_text(phase, progress), 2)]
            live.show(fitted(parts, terminal_width()))


def activity_text(phase: str, progress: str) -> str:
    """The end of a phase's name, with the share that is done: `generation 120/512`."""
    phase = phase.rpartition(": ")[2]
    counted = re.match(r"(\d+) of (\d+)", progress)
    return f"{phase} {counted[1]}/{counted[2]}" if counted else phase


def _heldout(values: Mapping[str, Any]) -> dict[str, float]:
    """The mean held-out reward over the domains, or the held-out loss; {} if the step has none."""
    scores = [v for n, v in values.items() if n.startswith(HELDOUT) and isinstance(v, int | float)]
    found = {"heldout": sum(scores) / len(scores)} if scores else {}
    loss = values.get("heldout_loss")
    return found | ({"heldout_loss": loss} if isinstance(loss, int | float) else {})
