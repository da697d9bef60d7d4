"""The groups that a GRPO step trains on, drawn from the stage's tasks.

With dynamic filtering they are the first informative ones in the order of the tasks' numbers. Tasks
beyond the last of them start before that is known, and are cancelled and drawn again by the next
step. So neither the groups nor the position in the stage depend on timing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from nemocascade.recipe.rl import RolloutConfig, prompt_quotas
from nemocascade.rl.collector import (
    Collector,
    Gathered,
    Group,
    decisive_reward,
    is_informative_group,
    verdicts_of,
    with_stop_penalty,
)
from nemocascade.rl.drawing import Drawing, InformativeShare
from nemocascade.rl.tasks import Task, TaskStream


def gather(
    collector: Collector,
    stream: TaskStream,
    settings: RolloutConfig,
    step: int = 0,
    share: InformativeShare | None = None,
) -> Gathered:
    """Collect the groups that a step trains on, then take them from the stream and tell it their
    verdicts.

    With dynamic filtering these are the first `prompts_per_step` groups whose rewards differ, of at
    most `max_draws * prompts_per_step` tasks. All tasks of a step are drawn by the state of the
    curricula at its start, which observe the groups up to the last one that trains. Groups masked
    by `min_best_reward` are not replaced. With `filter_by` "domain" each domain has its share of
    them. step: counted from 0. share: of informative groups in earlier steps, which decides how
    many tasks start ahead; it is updated.
    """
    wanted, ahead = settings.prompts_per_step, 0
    if settings.dynamic_filtering:
        tasks = stream.peek(settings.max_draws * wanted, step)
        tried, ahead = _draw(
            collector, tasks, settings, share or InformativeShare(), _quotas(stream, settings)
        )
        stream.take(len(tried), step)
        kept = [group for group in tried if is_informative_group(group, settings)]
        kept = _within_quotas(kept, _quotas(stream, settings))
    else:
        rolled = collector.roll_out(stream.peek(wanted, step), settings.rollouts_per_prompt)
        stream.take(wanted, step)
        kept = tried = [_with_stop_penalties(group, settings) for group in rolled]
    stream.observe(verdicts_of(tried))
    trained = tuple(group for group in kept if not _is_masked(group, settings))
    return Gathered(trained, len(tried), tuple(tried), len(kept) - len(trained), ahead)


def _draw(
    collector: Collector,
    tasks: Sequence[Task],
    settings: RolloutConfig,
    share: InformativeShare,
    quotas: Mapping[str, int],
) -> tuple[list[Group], int]:
    """The groups of the first tasks up to the last that trains, and the number of further tasks
    that were started."""
    copies, wanted = settings.rollouts_per_prompt, settings.prompts_per_step
    domains = [task.prompt.domain for task in tasks]
    drawing = Drawing(wanted, len(tasks), copies, share, settings.draw_margin, domains, quotas)
    if any(environment.collective for environment in collector.environments.values()):
        tried, ahead = _draw_in_rounds(collector, tasks, settings, drawing)
    else:
        rolled = collector.generate(collector.requests(tasks, copies), drawing)
        tried = [_with_stop_penalties(group, settings) for group in rolled]
        ahead = collector.queues.ahead
    share.observe(sum(is_informative_group(g, settings) for g in tried), len(tried))
    return tried, ahead


def _draw_in_rounds(
    collector: Collector, tasks: Sequence[Task], settings: RolloutConfig, drawing: Drawing
) -> tuple[list[Group], int]:
    """`_draw` with verdicts that come after all rollouts of a round."""
    found: list[Group] = []
    while (needed := drawing.needed) is None:
        part = tasks[len(found) : drawing.limit]
        for group in collector.roll_out(part, settings.rollouts_per_prompt):
            for rollout in group.rollouts:
                drawing.report(len(found), decisive_reward(rollout, settings))
            found.append(_with_stop_penalties(group, settings))
    return found[:needed], len(found) - needed


def _quotas(stream: TaskStream, settings: RolloutConfig) -> dict[str, int]:
    """Groups of each domain that train in a step; empty unless they are filtered by domain."""
    by_domain = settings.filter_by == "domain"
    return prompt_quotas(stream.shares, settings.prompts_per_step) if by_domain else {}


def _within_quotas(groups: Sequence[Group], quotas: Mapping[str, int]) -> list[Group]:
    """The first groups of each domain, as many as its quota; all without quotas."""
    left, found = dict(quotas), []
    for group in groups:
        domain = group.task.prompt.domain
        if not quotas or left[domain]:
            found.append(group)
            left[domain] = left.get(domain, 0) - 1
    return found


def _with_stop_penalties(group: Group, settings: RolloutConfig) -> Group:
    rollouts = tuple(with_stop_penalty(rollout, settings) for rollout in group.rollouts)
    return replace(group, rollouts=rollouts)


def _is_masked(group: Group, settings: RolloutConfig) -> bool:
    """True if no reward of the group is above `min_best_reward`."""
    if settings.min_best_reward is None:
        return False
    rewards = [r.verdict.reward for r in group.rollouts if r.verdict.reward is not None]
    return not any(reward > settings.min_best_reward for reward in rewards)
