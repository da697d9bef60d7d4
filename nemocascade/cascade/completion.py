"""Completion of the `nemocascade` command in bash and zsh, also of a recipe's settings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, get_args, get_origin

from nemocascade.cascade.launch import cascade_command
from nemocascade.recipe import CascadeRecipe, load_any_recipe
from nemocascade.runtime.command_line import leaves, unfilled

SETTINGS = {
    "eval": "nemocascade.stages.settings:EvalSettings",
    "score": "nemocascade.stages.settings:ScoreSettings",
    "chat": "nemocascade.serving.settings:ChatSettings",
    "generate": "nemocascade.serving.settings:GenerateSettings",
    "serve": "nemocascade.serving.settings:ServeSettings",
    "watch": "nemocascade.recipe.commands:WatchSettings",
    "interference": "nemocascade.recipe.commands:InterferenceSettings",
    "order": "nemocascade.recipe.commands:OrderSettings",
    "plan": "nemocascade.plan.settings:PlanSettings",
    "preflight": "nemocascade.plan.settings:PreflightSettings",
    "submit": "nemocascade.plan.submission:SubmitSettings",
    "diff": "nemocascade.recipe.commands:DiffSettings",
    "convert": "nemocascade.recipe.commands:ConvertSettings",
    "merge": "nemocascade.recipe.commands:MergeSettings",
    "pass-rates": "nemocascade.recipe.pass_rates:PassRateSettings",
    "replay": "nemocascade.recipe.commands:ReplaySettings",
    "import-swe": "nemocascade.recipe.commands:ImportSettings",
    "check-tasks": "nemocascade.recipe.commands:CheckSettings",
    "tokenizer": "nemocascade.recipe.commands:TokenizerSettings",
    "data": "nemocascade.recipe.build:BuildSettings",
}
"""Settings of each command that has any."""
WITH_RECIPE = ("run", "interference", "plan", "preflight", "submit")
"""Commands whose line may also have the settings of the recipe that it names."""

SCRIPTS = {
    "bash": r"""_nemocascade() {
    local IFS=$'\n' word="${COMP_WORDS[COMP_CWORD]}"
    COMPREPLY=($(compgen -W "$(nemocascade completion words -- \
        "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null)" -- "$word"))
}
complete -o default -F _nemocascade nemocascade
""",
    "zsh": r"""#compdef nemocascade
_nemocascade() {
    local -a found
    found=("${(@f)$(nemocascade completion words -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    if [[ -n "$found" ]]; then compadd -a found; else _files; fi
}
if [[ "$funcstack[1]" == _nemocascade ]]; then
    _nemocascade "$@"
else
    compdef _nemocascade nemocascade
fi
""",
}
"""Script that each shell evaluates. It asks `nemocascade completion words` for every word."""


def settings_class(command: str) -> type[Any]:
    """The class of a command's settings."""
    found: type[Any] = resolve_name(SETTINGS[command])
    return found


def candidates(words: Sequence[str], commands: Sequence[str]) -> list[str]:
    """Words that may replace the last one; none where the shell should offer files.

    words: those after `nemocascade`, the last one as far as it is typed. commands: all names.
    """
    *before, word = words or [""]
    if not before:
        return [name for name in commands if name.startswith(word)]
    options = _options(before)
    if word.startswith("-"):
        return [name for name in (*options, "--help") if name.startswith(word)]
    return [c for c in _choices(options.get(before[-1])) if c.startswith(word)]


def _options(before: Sequence[str]) -> dict[str, Any]:
    """Type of each option of a command, and of the recipe that its line names."""
    found: dict[str, Any] = {}
    for settings in _settings(before):
        for option in leaves(settings):
            if not option.is_positional:
                found.setdefault(f"--{option.name}", option.hint)
    return found


def _settings(before: Sequence[str]) -> Iterator[object]:
    command, *arguments = before
    if command in SETTINGS:
        yield unfilled(settings_class(command))
    if command not in WITH_RECIPE:
        return
    script = next((a for a in arguments if a.endswith(".py") and Path(a).is_file()), "")
    if script:
        recipe = load_any_recipe(Path(script))
        yield cascade_command(recipe) if isinstance(recipe, CascadeRecipe) else recipe


def _choices(hint: Any) -> list[str]:
    """The values of an option that has few."""
    if get_origin(hint) is Annotated:
        return _choices(get_args(hint)[0])
    if hint is bool:
        return ["True", "False"]
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [choice for part in get_args(hint) for choice in _choices(part)]
