"""Differences between two sets of settings, and which of them a resumed run accepts."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any

from nemocascade.recipe.judge import HOW as JUDGE_HOW
from nemocascade.recipe.server import HOW as SERVER_HOW

HOW = (
    *("run_dir", "init_from", "base_model", "resume", "accept_changes"),
    *("parallel", "checkpoint", "log"),
    *("engine.device", "engine.recompute", "engine.timeout_s", "engine.preflight"),
    *("engine.expert_exchange", "engine.recompute_layers", "engine.gc_every"),
    *("engine.overlap_parameter_gather", "engine.overlap_shared_expert"),
    "engine.overlap_tensor_parallel",
    *("engine.transformer_engine", "engine.flash_attention_3", "engine.apex", "engine.fla"),
    "mopd.keep",
    *("rollout.slots", "rollout.prefill_tokens", "rollout.prefill_chunk"),
    *("rollout.parallel", "rollout.offload", "rollout.journal", "rollout.kv_gib"),
    "rollout.kv_memory_fraction",
    *("data.cache_dir", "envs.sandbox.workers", "envs.sandbox.ray", "envs.check_workers"),
    *(f"envs.judge.{name}" for name in JUDGE_HOW),
    *(f"rollout.server.{name}" for name in SERVER_HOW),
)
"""Settings that do not change the artifact, up to the rounding of another layout."""

FREE = (
    *HOW,
    *("steps", "eval", "rollout.samples", "rollout.max_idle_steps", "mopd.score_rollouts"),
    *("rollout.mismatch_mean_alarm", "rollout.mismatch_max_alarm"),
)
"""Settings that may change when a run resumes: those of `HOW`, the length of the run, and what is
only measured."""

OF_ROLLOUTS = ("seed", "domains", "rollout", "envs", "engine.precision")
"""Settings that decide rollouts and verdicts, given the weights, as far as they are not `FREE`."""

STARTED = ("run_dir", "resume", "accept_changes")
"""Settings that say where and how a run was started, which its checkpoints do not store."""

ABSENT = "none"


@dataclass(frozen=True)
class Change:
    """A setting with two values. JSON values; `ABSENT` where the setting is missing."""

    name: str
    old: Any
    new: Any

    @property
    def is_free(self) -> bool:
        """True if a resumed run accepts the change without being told to."""
        return _is_one_of(self.name, FREE)

    def text(self) -> str:
        """For example `optimizer.lr 0.003 -> 0.1`."""
        return f"{self.name} {_shown(self.old)} -> {_shown(self.new)}"


def as_json(recipe: Any) -> dict[str, Any]:
    """The fields of a recipe as JSON values, with the name of its class as `kind`."""
    return {"kind": type(recipe).__name__, **json.loads(json.dumps(asdict(recipe)))}


def changes_between(
    old: Mapping[str, Any], new: Mapping[str, Any], unset: Collection[str] = ()
) -> list[Change]:
    """Settings with different values, by name.

    unset: settings at their defaults. Such a setting is not a change if it is missing in `old`: a
    newer version has more settings, and their defaults behave as before.
    """
    before, after = dict(flat(old)), dict(flat(new))
    return [
        Change(name, before.get(name, ABSENT), after.get(name, ABSENT))
        for name in sorted(before.keys() | after.keys())
        if before.get(name, ABSENT) != after.get(name, ABSENT)
        and not (name not in before and name in unset)
    ]


def changes_of_run(old: Mapping[str, Any], recipe: Any) -> list[Change]:
    """Changes from a run's stored settings to `recipe`, without the run's folder and how it was
    started."""
    unset = {"kind", *at_default(recipe)}
    return [c for c in changes_between(old, as_json(recipe), unset) if c.name not in STARTED]


def rollout_settings(recipe: Any) -> dict[str, Any]:
    """The settings of `OF_ROLLOUTS` by their dotted names, as JSON values."""
    return {
        name: value
        for name, value in flat(as_json(recipe))
        if _is_one_of(name, OF_ROLLOUTS) and not _is_one_of(name, FREE)
    }


def at_default(recipe: Any, prefix: str = "") -> set[str]:
    """Dotted names of the settings that are at their defaults."""
    found: set[str] = set()
    for f in fields(recipe):
        name, value = f"{prefix}.{f.name}" if prefix else f.name, getattr(recipe, f.name)
        default = f.default_factory() if f.default_factory is not MISSING else f.default
        if is_dataclass(value):
            found |= at_default(value, name)
        elif isinstance(value, tuple) and any(is_dataclass(v) for v in value):
            found |= {n for i, v in enumerate(value) for n in at_default(v, f"{name}.{i}")}
        elif value == default:
            found.add(name)
    return found


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every setting in a tree of JSON values."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from flat(inner, f"{prefix}.{name}" if prefix else name)
    elif isinstance(value, list) and any(isinstance(v, dict) for v in value):
        for number, inner in enumerate(value):
            yield from flat(inner, f"{prefix}.{number}")
    else:
        yield prefix, value


def _is_one_of(name: str, settings: Collection[str]) -> bool:
    """True for a setting, and for one inside of it."""
    return f"{name}.".startswith(tuple(f"{setting}." for setting in settings))


def _shown(value: Any) -> str:
    """The value, with a digest cut to its first 12 letters."""
    text = str(value) if value not in ("", []) else "empty"
    is_digest = len(text) == 64 and not set(text) - set("0123456789abcdef")
    return text[:12] if is_digest else text
