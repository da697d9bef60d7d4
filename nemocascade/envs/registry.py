"""All environments by name."""

from __future__ import annotations

from collections.abc import Mapping

from nemocascade.envs.base import Domain
from nemocascade.envs.code import Code
from nemocascade.envs.instruction_following import InstructionFollowing
from nemocascade.envs.long_context import LongContext
from nemocascade.envs.mathematics import Mathematics
from nemocascade.envs.multiple_choice import MultipleChoice
from nemocascade.envs.preference import Preference
from nemocascade.envs.structured_output import StructuredOutput
from nemocascade.envs.swe_agentic import SweAgentic
from nemocascade.envs.swe_agentless import SweAgentless
from nemocascade.envs.tool_calling import ToolCalling
from nemocascade.judges.factory import judge_problems, judge_refusal, make_judge
from nemocascade.recipe.envs import EnvConfig
from nemocascade.sandbox.child import ChildPool
from nemocascade.types import Judge

__all__ = [
    "DOMAINS",
    "close_environments",
    "judge_problems",
    "judge_refusal",
    "make_environments",
]

DOMAINS = (
    "instruction_following",
    "multiple_choice",
    "tool_calling",
    "structured_output",
    "math",
    "code",
    "preference",
    "long_context",
    "swe_agentless",
    "swe_agentic",
)


def make_environments(
    config: EnvConfig | None = None, *, judge: Judge | None = None
) -> dict[str, Domain]:
    """An environment for each domain, sharing one pool of check processes; none starts before use.

    judge: shared by the domains that need one; None makes the one that the settings name. Raises
    ValueError naming every setting that is out of range. `close_environments` ends them.
    """
    config = config or EnvConfig()
    if problems := config.problems():
        raise ValueError("; ".join(problems))
    if judge is None:
        judge = make_judge(config.judge)
    children = ChildPool(
        config.check_workers,
        timeout_s=config.check_timeout_s,
        memory_mib=config.check_memory_mib,
    )
    domains: list[Domain] = [
        InstructionFollowing(
            children, grading=config.if_grading, language_check=config.if_language_check
        ),
        MultipleChoice(children),
        ToolCalling(),
        StructuredOutput(children),
        Mathematics(children),
        Code(config.sandbox),
        Preference(judge),
        LongContext(judge),
        SweAgentless(config.sandbox, judge, config.agentless),
        SweAgentic(config.sandbox, config.agent),
    ]
    return {domain.domain: domain for domain in domains}


def close_environments(environments: Mapping[str, Domain]) -> None:
    """End every process that the environments hold."""
    for environment in environments.values():
        environment.close()
