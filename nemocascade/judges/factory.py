"""The judge that a recipe asks for."""

from __future__ import annotations

from contextlib import closing

from nemocascade.judges.rule import RuleJudge
from nemocascade.judges.server import ServerJudge, server_problems
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.types import Judge


def make_judge(settings: JudgeConfig) -> Judge:
    """A judge; a server is not asked anything yet.

    Raises ValueError naming every setting that cannot work, and for the judge of an artifact, which
    a stage makes on its own ranks (`nemocascade.rl.artifact_judge`).
    """
    if settings.kind == "artifact":
        raise ValueError(
            "judge.kind artifact generates on the training ranks: only a stage can make it"
        )
    if settings.kind == "server":
        return ServerJudge(settings)
    return RuleJudge()


def judge_problems(settings: JudgeConfig) -> list[str]:
    """Every rule that the settings of a server break; none for judges of other kinds."""
    return server_problems(settings) if settings.kind == "server" else []


def judge_refusal(settings: JudgeConfig) -> str | None:
    """Why a server refuses a first question; None if it takes it, is silent, or is no server."""
    if settings.kind != "server":
        return None
    with closing(ServerJudge(settings)) as judge:
        return judge.probe()
