"""Construction of all environments by name, and of the judge in their settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing

from nemocascade.envs.base import Domain
from nemocascade.envs.code import Code
from nemocascade.envs.instruction_following import InstructionFollowing
from nemocascade.envs.long_context import LongContext
from nemocascade.envs.mathematics import Mathematics
from nemocascade.envs.multiple_choice import MultipleChoice
from nemocascade.envs.own_domains import own_domains
from nemocascade.envs.preference import Preference
from nemocascade.envs.python_tool import PythonTool, ToolIntegrated
from nemocascade.envs.structured_output import StructuredOutput
from nemocascade.envs.swe_agentic import SweAgentic
from nemocascade.envs.swe_agentless import SweAgentless
from nemocascade.envs.tool_calling import ToolCalling
from nemocascade.judges.rule import RuleJudge
from nemocascade.judges.server import ServerJudge, server_problems
from nemocascade.recipe import RecipeError
from nemocascade.recipe.envs import EnvConfig
from nemocascade.recipe.judge import JudgeConfig
from nemocascade.sandbox.child import ChildPool
from nemocascade.types import Judge

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
    """Make one environment per domain, sharing a pool of check processes; none starts before use.

    judge: shared by the domains that need one; None makes the judge of the settings. Raises
    ValueError naming every setting that is out of range, and RecipeError for a module of
    `envs.modules` that offers none. `close_environments` ends the processes.
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
            children,
            grading=config.if_grading,
            language_check=config.if_language_check,
            tokenizer=config.if_tokenizer,
        ),
        MultipleChoice(children),
        ToolCalling(config.tool_calling),
        StructuredOutput(children),
        Mathematics(children),
        Code(config.sandbox, config.code),
        Preference(judge),
        LongContext(judge),
        SweAgentless(config.sandbox, judge, config.agentless),
        SweAgentic(config.sandbox, config.agent),
    ]
    for own in own_domains(config.modules, DOMAINS).values():
        domains.append(own.from_settings(config, judge, children))
    tool = PythonTool(config.python_tool, config.sandbox)
    return {
        domain.domain: ToolIntegrated(domain, tool)
        if domain.domain in config.python_tool.domains
        else domain
        for domain in domains
    }


def known_domains(modules: Sequence[str] = ()) -> tuple[str, ...]:
    """Names of all domains: those of this package, of `modules` and of entry points.

    Raises RecipeError as `own_domains`.
    """
    return (*DOMAINS, *own_domains(modules, DOMAINS))


def domain_problems(named: str, names: Iterable[str], modules: Sequence[str]) -> list[str]:
    """Return what is wrong with names of domains. named: start of each message."""
    try:
        known = known_domains(modules)
    except RecipeError as error:
        return error.problems
    return [
        f"{named} names {name!r}, known are {', '.join(known)}: "
        "name one of them, or its module in envs.modules"
        for name in dict.fromkeys(names)
        if name not in known
    ]


def close_environments(environments: Mapping[str, Domain]) -> None:
    """End every process of the environments."""
    for environment in environments.values():
        environment.close()


def make_judge(settings: JudgeConfig) -> Judge:
    """Make a judge; no request is sent to a server yet.

    Raises ValueError naming every invalid setting, and for a judge from an artifact: a stage makes
    that on its own ranks (`nemocascade.rl.artifact_judge`).
    """
    if settings.kind == "artifact":
        raise ValueError(
            "judge.kind artifact generates on the training ranks: only a stage can make it"
        )
    if settings.kind == "server":
        return ServerJudge(settings)
    return RuleJudge()


def judge_problems(settings: JudgeConfig) -> list[str]:
    """Return every rule that a server's settings break; empty for other kinds of judges."""
    return server_problems(settings) if settings.kind == "server" else []


def judge_rejection(settings: JudgeConfig) -> str | None:
    """Return why a server rejects a first question; None if it accepts or does not answer."""
    if settings.kind != "server":
        return None
    with closing(ServerJudge(settings)) as judge:
        return judge.probe()
