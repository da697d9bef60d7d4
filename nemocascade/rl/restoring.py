"""Which rollouts of a queue come from the journal, and what each of them still needs.

A rollout with its verdict needs nothing. One without is verified again: by itself, or with its
group where verdicts compare the rollouts of a prompt. If some of such a group are still to be
generated, the others wait for these on the rank that verifies them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from nemocascade.rl.journal import Journal, Kept
from nemocascade.rl.rollouts import Rollout
from nemocascade.rl.tasks import GroupRequest
from nemocascade.types import Environment


class Restored:
    """The rollouts of `wanted` that `journal` holds; the same on every rank.

    ids: all of them. complete: those that need nothing; their owners restore them. unscored: those
    that their owners verify. groups: ids of groups that the owner of the first rollout verifies.
    partial: rollouts of groups of which others are generated. scored, compared: see `Verification`.
    """

    def __init__(
        self,
        journal: Journal | None,
        kept: Kept,
        wanted: Sequence[GroupRequest],
        environments: Mapping[str, Environment],
        *,
        scored: bool,
        compared: bool,
    ) -> None:
        self._journal, self._kept = journal, kept
        self._domains: dict[int, str] = {}
        self.ids = kept.rollouts.keys()
        self.rewards: dict[int, float | None] = {}
        """Rewards of complete rollouts with a verdict, by id, as groups compare them."""
        self.complete: list[int] = []
        self.unscored: list[int] = []
        self.groups: list[range] = []
        self.partial: set[int] = set()
        for group in wanted if kept.rollouts else ():
            domain = group.task.prompt.domain
            finished = [number for number in group.ids if number in kept.rollouts]
            self._domains |= dict.fromkeys(finished, domain)
            environment = environments[domain]
            has_verdict = [number for number in finished if number in kept.verdicts]
            if environment.collective or not scored:
                self.complete += finished
                continue
            if not (environment.by_group and compared):
                self.unscored += [number for number in finished if number not in kept.verdicts]
            elif len(finished) < len(group.ids):
                self.partial.update(finished)
                continue
            elif len(has_verdict) < len(group.ids):
                self.groups.append(group.ids)
                continue
            self.complete += has_verdict
            self.rewards |= {number: kept.rewards[number] for number in has_verdict}

    def is_mine(self, number: int) -> bool:
        """True on the owner of a rollout."""
        assert self._journal is not None
        owner = self._journal.owner(self._kept.rollouts[number])
        return owner == self._journal.world.rank

    def load(self, number: int) -> Rollout:
        """A rollout, with its verdict if it is complete and has one."""
        assert self._journal is not None
        verdict = self._kept.verdicts[number] if number in self.rewards else None
        return self._journal.load(self._kept.rollouts[number], verdict, self._domains[number])
