"""The groups that a GRPO step trains on, drawn from the stage's tasks.

With dynamic filtering they are the first informative ones in the order of the tasks' numbers. Tasks
beyond the last of them start before that is known, and are cancelled and drawn again by the next
step. So neither the groups nor the position in the stage depend on timing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nemocascade.recipe.rl import RolloutConfig
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
    """Collect the groups that a step trains on, and tell the stream their verdicts.

    With dynamic filtering these are the first `prompts_per_step` groups whose rewards differ, of at
    most `max_draws * prompts_per_step` tasks. All tasks of a step are drawn by the state of the
    curricula at its start, which observe the groups up to the last one that trains. Groups masked
    by `min_best_reward` are not replaced. step: counted from 0. share: of informative groups in
    earlier steps, which decides how many tasks start ahead; it is updated.
    """
    wanted, ahead = settings.prompts_per_step, 0
    if settings.dynamic_filtering:
        tasks = stream.peek(settings.max_draws * wanted, step)
        tried, ahead = _draw(collector, tasks, settings, share or InformativeShare())
        stream.take(len(tried), step)
        kept = [group for group in tried if is_informative_group(group, settings)]
    else:
        tasks = stream.take(wanted, step)
        rolled = collector.roll_out(tasks, settings.rollouts_per_prompt)
        kept = tried = [_with_stop_penalties(group, settings) for group in rolled]
    stream.observe(verdicts_of(tried))
    trained = tuple(group for group in kept if not _is_masked(group, settings))
    return Gathered(trained, len(tried), tuple(tried), len(kept) - len(trained), ahead)


def _draw(
    collector: Collector, tasks: Sequence[Task], settings: RolloutConfig, share: InformativeShare
) -> tuple[list[Group], int]:
    """The groups of the first tasks up to the last that trains, and the number of further tasks
    that were started."""
    copies, wanted = settings.rollouts_per_prompt, settings.prompts_per_step
    drawing = Drawing(wanted, len(tasks), copies, share, settings.draw_margin)
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


def _with_stop_penalties(group: Group, settings: RolloutConfig) -> Group:
    rollouts = tuple(with_stop_penalty(rollout, settings) for rollout in group.rollouts)
    return replace(group, rollouts=rollouts)


def _is_masked(group: Group, settings: RolloutConfig) -> bool:
    """True if no reward of the group is above `min_best_reward`."""
    if settings.min_best_reward is None:
        return False
    rewards = [r.verdict.reward for r in group.rollouts if r.verdict.reward is not None]
    return not any(reward > settings.min_best_reward for reward in rewards)
