"""The judge that a recipe asks for."""

from __future__ import annotations

from nemocascade.envs.judges.rule import RuleJudge
from nemocascade.envs.judges.server import ServerJudge
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.types import Judge


def make_judge(settings: JudgeConfig) -> Judge:
    """A judge; a server is not asked anything yet.

    Raises ValueError naming every setting that cannot work, and for the judge of an artifact, which
    a stage makes on its own ranks (`nemocascade.stages.judge`).
    """
    if settings.kind == "artifact":
        raise ValueError(
            "judge.kind artifact generates on the training ranks: only a stage can make it"
        )
    if settings.kind == "server":
        return ServerJudge(settings)
    return RuleJudge()
