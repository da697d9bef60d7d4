"""All targets of the fuzz run, by name."""

from __future__ import annotations

from fuzz import (
    target_answers,
    target_folders,
    target_recipes,
    target_replies,
    target_rows,
    target_templates,
    target_tokenizers,
)
from fuzz.harness import Target

TARGETS: dict[str, Target] = {
    target.name: target
    for module in (
        target_recipes,
        target_rows,
        target_tokenizers,
        target_folders,
        target_replies,
        target_answers,
        target_templates,
    )
    for target in module.TARGETS
}
