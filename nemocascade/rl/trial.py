"""Trial of verifiers and tools on dummy answers, so that a broken one shows before any training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.ray_cluster import ClusterError
from nemocascade.runtime.row_errors import DataError
from nemocascade.types import Environment, Prompt, SandboxUnavailable


def try_verifiers(prompts: Iterable[Prompt], environments: Mapping[str, Environment]) -> None:
    """Score a dummy answer to one task of each form of each domain.

    Tasks that a judge decides are excluded: its server gets a first question of its own.
    Raises DataError for a verifier that fails, and ClusterError without nodes that run programs.
    """
    seen: set[tuple[str, str]] = set()
    problems = []
    for prompt in prompts:
        environment = environments[prompt.domain]
        forms = {(prompt.domain, form) for form in environment.forms(prompt)}
        if forms <= seen:
            continue
        seen |= forms
        if error := _error(environment, prompt):
            problems.append(f"{prompt.domain} ({prompt.source}): {error}")
    if problems:
        raise DataError(
            "verifiers fail on a dummy answer, so they would fail on every answer: fix the "
            "verifier, or take these rows out\n  " + "\n  ".join(problems)
        )
    LOGGER.info("verifiers: tried on dummy answers to %d forms of tasks", len(seen))


def _error(environment: Environment, prompt: Prompt) -> str | None:
    """Return why the tools or the verifier fail; None if they do not, or a judge decides."""
    answer = environment.dummy(prompt)
    try:
        if (session := environment.session(prompt)) is not None:
            session.close()
        return None if answer is None else environment.score(prompt, answer).error
    except ClusterError:
        # No fault of the verifier: a later start may find nodes.
        raise
    except SandboxUnavailable as error:
        return str(error)
