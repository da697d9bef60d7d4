"""What tests of repairs share: tasks, and turns that call tools."""

from __future__ import annotations

from nemocascade.envs.swe_agentic import SweAgentic
from nemocascade.recipe.envs import SandboxConfig
from nemocascade.types import Message, Prompt, ToolCall

SANDBOX = SandboxConfig(time_s=10.0, workers=1)


def task(difficulty: int = 0, seed: int = 1) -> Prompt:
    return next(iter(SweAgentic().prompts(seed=seed, count=1, difficulty=difficulty)))


def turn(*calls: tuple[str, dict[str, str]]) -> Message:
    return Message("assistant", "", tool_calls=tuple(ToolCall(n, a) for n, a in calls))
