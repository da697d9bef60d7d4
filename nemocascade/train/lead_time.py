"""Warning of a job whose request to stop comes too late before its time limit.

The script of `nemocascade submit` asks for a checkpoint some seconds before the time limit, and
exports that time. A stage answers after its step, in stages with rollouts after its training: they
stop within seconds while rollouts are made.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from nemocascade.runtime.logging import LOGGER

WARNING_S = "NEMOCASCADE_WARNING_S"
"""Environment variable with the seconds between the request for a checkpoint and the time limit."""
STEPS = 3
"""Steps of a start before the first comparison: the first ones compile kernels."""
_WITHIN = ("train_time_s", "teacher_time_s")


def needed_s(values: Mapping[str, Any]) -> float:
    """Lead time that a step asks for: two steps and a checkpoint. values: its metrics."""

    def seconds(name: str) -> float:
        value = values.get(name)
        return float(value) if isinstance(value, int | float) else 0.0

    step = sum(map(seconds, _WITHIN)) or seconds("step_time_s")
    return 2 * step + seconds("checkpoint_blocked_s")


class LeadTime:
    """Compares the steps of a start with the job's lead time, and warns once."""

    def __init__(self) -> None:
        try:
            self._lead_s = float(os.environ.get(WARNING_S, ""))
        except ValueError:
            self._lead_s = math.inf  # no such job
        self._steps = 0

    def observe(self, values: Mapping[str, Any]) -> None:
        """Compare the metrics of a step."""
        self._steps += 1
        needed = needed_s(values)
        if self._steps < STEPS or needed <= self._lead_s:
            return
        LOGGER.warning(
            "two steps and a checkpoint take %.0f s, and this job asks for a checkpoint %.0f s "
            "before its time limit, which may end it first: submit it with --warning-s %d or more",
            needed,
            self._lead_s,
            math.ceil(needed),
        )
        self._lead_s = math.inf
