"""Win rate of the policy's answers against those of the stage's start.

It serves domains with pairwise verdicts. Rewards there are relative within a group, so they do not
show whether the policy improved. Both answers are greedy, and the same judge compares them: 1 for a
win, 0.5 for a tie, 0 for a loss. Before the first step both are identical, which is a tie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nemocascade.envs.base import final_text
from nemocascade.envs.preference import against
from nemocascade.rl.collector import Collector, Group
from nemocascade.rl.exchange import send_transcripts
from nemocascade.rl.tasks import Task
from nemocascade.rl.verification import judging_rank, score_apart
from nemocascade.rollout.engine import Sampling
from nemocascade.runtime.logging import LOGGER
from nemocascade.train.trainer import Trainer
from nemocascade.train.weight_swap import WeightSwap
from nemocascade.types import Artifact

START = "start"


def start_answers(
    collector: Collector,
    trainer: Trainer,
    start: Artifact,
    tasks: Sequence[Task],
    greedy: Sampling,
) -> dict[int, str]:
    """The start policy's final messages, by task number, for tasks with pairwise verdicts; each on
    the rank that judges the task in `score_apart`.

    A resumed run recomputes them: greedy answers of the same weights are the same.
    """
    compared = [t for t in tasks if collector.environments[t.prompt.domain].by_group]
    if not compared:
        return {}
    swap = WeightSwap(trainer.world, trainer.chunks)
    swap.load(START, start)
    with swap.using(START):
        collector.engine.weights_changed()
        groups = collector.roll_out(compared, 1, greedy, scored=False)
    collector.engine.release()
    collector.engine.weights_changed()
    swap.close()
    replicas = collector.world.replicas()
    judges = [[judging_rank(replicas, group.task.number)] for group in groups]
    texts = send_transcripts(collector.world, [group.rollouts[0] for group in groups], judges)
    return {groups[k].task.number: final_text(text.response) for k, text in texts.items()}


def over_start(
    collector: Collector, groups: Sequence[Group], answers: Mapping[int, str]
) -> dict[str, float]:
    """`heldout/DOMAIN_over_start` for each domain with pairwise verdicts; every rank calls it.

    groups: the policy's greedy answers, one per task. answers: the result of `start_answers`.
    """
    found: dict[str, float] = {}
    for name, environment in sorted(collector.environments.items()):
        mine = [g for g in groups if g.task.prompt.domain == name]
        if not mine or not environment.by_group:
            continue
        collector.world.watch.enter("held out: win rate")
        compared = score_apart(
            collector.world,
            environment,
            [
                (number, against(g.task.prompt, answers.get(number, "")), g.rollouts)
                for g in mine
                for number in [g.task.number]
            ],
        )
        rewards = [r.verdict.reward for (r,) in compared if r.verdict.reward is not None]
        if len(rewards) < len(mine):
            LOGGER.warning(
                "%s: %d of %d answers could not be compared with the start's, they don't count",
                name,
                len(mine) - len(rewards),
                len(mine),
            )
        if rewards:
            found[f"heldout/{name}_over_start"] = sum(rewards) / len(rewards)
    return found
