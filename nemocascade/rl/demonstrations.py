"""SFT rows made from the environments' own tasks, or from rows that hold their solutions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from nemocascade.envs.base import demonstration
from nemocascade.envs.registry import close_environments, domain_problems, make_environments
from nemocascade.recipe import EnvConfig, RecipeError, SftRecipe
from nemocascade.rl.tasks import read_tasks
from nemocascade.runtime.files import write_text
from nemocascade.runtime.jsonl import json_text
from nemocascade.runtime.row_errors import DataError
from nemocascade.runtime.world import World, main_first
from nemocascade.types import Message, Prompt


def with_demonstrations(recipe: SftRecipe, world: World) -> SftRecipe:
    """Add the rows of `recipe.demonstrations` to its data, as files in RUN/demonstrations.

    Training rows contain no held-out task of this or a later stage. Without held-out tasks,
    `data.heldout_rows` holds. Raises RecipeError for an unknown domain, and for a module that
    offers none.
    """
    settings = recipe.demonstrations
    names = [d.domain for d in settings.domains]
    if problems := domain_problems("demonstrations.domains", names, settings.modules):
        raise RecipeError(problems)
    folder = Path(recipe.run_dir) / "demonstrations"
    train, heldout = folder / "train.jsonl", folder / "heldout.jsonl"
    has_heldout = settings.heldout and any(d.heldout_path or not d.path for d in settings.domains)
    files = {train: False, heldout: True} if has_heldout else {train: False}

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path, is_heldout in files.items():
            lines = (json_text(row) for row in demonstration_rows(recipe, heldout=is_heldout))
            text = "".join(f"{line}\n" for line in lines)
            # An unchanged file keeps its modification time, so the tokenised cache stays valid.
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                write_text(path, text)

    main_first(world, write, lambda: None)
    data = replace(
        recipe.data,
        path=(*recipe.data.path, str(train)),
        heldout_path=recipe.data.heldout_path or tuple(str(p) for p in files if files[p]),
        thinking=True,
    )
    return replace(recipe, data=data)


def demonstration_rows(recipe: SftRecipe, *, heldout: bool) -> Iterator[dict[str, Any]]:
    """Rows of all domains in random order, some with reasoning and some without."""
    settings = recipe.demonstrations
    environments = make_environments(
        EnvConfig(modules=settings.modules, python_tool=settings.python_tool)
    )
    try:
        prompts = [
            prompt
            for domain in settings.domains
            for prompt in read_tasks(
                domain,
                environments,
                seed=recipe.seed,
                heldout=heldout,
                count=settings.heldout if heldout else domain.tasks,
                domains=settings.domains,
            )
        ]
    finally:
        close_environments(environments)
    rng = random.Random(f"demonstrations/{recipe.seed}/{heldout}")
    rng.shuffle(prompts)
    for prompt in prompts:
        thinking = rng.random() < settings.thinking
        careless = settings.careless > 0 and rng.random() < settings.careless
        try:
            yield sft_row(prompt, thinking=thinking, careless=careless)
        except ValueError as error:
            raise DataError(
                f"demonstrations.domains: {error}; name SFT rows in data.path"
            ) from None


def sft_row(prompt: Prompt, *, thinking: bool, careless: bool = False) -> dict[str, Any]:
    """The task and its demonstration as a row in the `messages` format.

    Without `thinking` the row has no reasoning and renders with empty think tags. careless: see
    `envs.base.demonstration`. Raises ValueError for a task without a demonstration.
    """
    turns = [*prompt.messages, *demonstration(prompt, thinking=thinking, careless=careless)]
    row: dict[str, Any] = {"messages": [_turn(message) for message in turns]}
    if prompt.tools:
        row["tools"] = [
            {"name": t.name, "description": t.description, "parameters": dict(t.parameters)}
            for t in prompt.tools
        ]
    return row


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning:
        turn["reasoning_content"] = message.reasoning
    if message.tool_calls:
        turn["tool_calls"] = [
            {"function": {"name": call.name, "arguments": dict(call.arguments)}}
            for call in message.tool_calls
        ]
    return turn
