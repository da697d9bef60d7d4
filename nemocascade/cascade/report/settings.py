"""Settings of the stages as rows of tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from nemocascade.cascade.report.record import Run, Stage

# Settings compared between stages; the page shows the full recipes as well.
COMPARED = (
    "steps",
    "optimizer.lr",
    "optimizer.schedule",
    "optimizer.warmup_steps",
    "rollout.prompts_per_step",
    "rollout.rollouts_per_prompt",
    "rollout.max_response_tokens",
    "rollout.temperature",
    "rollout.top_p",
    "rollout.thinking",
    "rollout.dynamic_filtering",
    "rollout.overlong_filter",
    "grpo.kl_coef",
    "grpo.normalize",
    "mopd.ratio_low",
    "mopd.ratio_high",
    "data.capacity",
    "grpo.capacity",
    "mopd.capacity",
    "engine.precision",
    "parallel.tp",
    "parallel.pp",
    "parallel.ep",
    "parallel.cp",
    "seed",
)


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, text) pairs of nested settings."""
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, list) and any(isinstance(v, Mapping) for v in value):
            for number, entry in enumerate(value):
                part = entry if isinstance(entry, Mapping) else {"": entry}
                yield from flat(part, f"{prefix}{name}.{number}.")
        else:
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            yield prefix + name, text


def compared_settings(run: Run) -> tuple[list[Stage], list[tuple[str, Sequence[str]]]]:
    """Stages with a recipe, and the main settings of each; "" where a stage has no such setting."""
    stages = [s for s in run.stages if s.recipe]
    each = [dict(flat(stage.recipe)) for stage in stages]
    rows = [(name, [found.get(name, "") for found in each]) for name in COMPARED]
    return stages, [(name, row) for name, row in rows if any(row)]
