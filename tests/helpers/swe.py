"""Tasks and turns with tool calls, shared by the repair tests."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from helpers.sandbox import sandbox_or_skip
from nemocascade.envs.swe_agentic import SweAgentic
from nemocascade.recipe.envs import SandboxConfig
from nemocascade.types import Message, Prompt, ToolCall

SANDBOX = SandboxConfig(time_s=10.0, workers=1)


def agentic_domain() -> Iterator[SweAgentic]:
    """For a fixture: the domain while tests need it; skips where nothing can be isolated."""
    sandbox_or_skip(SANDBOX).close()
    made = SweAgentic(SANDBOX)
    yield made
    made.close()


def task(difficulty: int = 0, seed: int = 1) -> Prompt:
    return next(iter(SweAgentic().prompts(seed=seed, count=1, difficulty=difficulty)))


def turn(*calls: tuple[str, dict[str, str]]) -> Message:
    return Message("assistant", "", tool_calls=tuple(ToolCall(n, a) for n, a in calls))


def copy_pytest(folder: Path) -> None:
    """Fill a new folder with pytest and what it imports, for a sandbox's `packages`."""
    installed = Path(sysconfig.get_paths()["purelib"])
    for name in ("pytest", "_pytest", "pluggy", "iniconfig", "packaging", "pygments"):
        shutil.copytree(installed / name, folder / name)
    shutil.copy(installed / "py.py", folder)
