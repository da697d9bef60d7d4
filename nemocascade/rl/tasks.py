"""The prompts of a stage, in an order that depends on the seed, but not on the number of ranks.

With a curriculum the order depends on the steps and the rewards as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe import DomainConfig, RolloutConfig
from nemocascade.rl.curriculum import Curriculum, by_level
from nemocascade.rl.prompts import EncodedPrompts, TokenIds, encode_prompts
from nemocascade.rollout.engine import Sampling
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.row_errors import BadRows, DataError
from nemocascade.runtime.world import World
from nemocascade.types import Environment, Prompt, Verdict


@dataclass(frozen=True, eq=False)
class Task:
    """A prompt with its token ids, [n] int32, and its number in the stage's order.

    thinking: the prompt's end opens a reasoning block; None: as the rollout settings say.
    """

    prompt: Prompt
    ids: TokenIds
    number: int
    thinking: bool | None = None


@dataclass(frozen=True)
class GroupRequest:
    """The rollouts that are wanted of a task.

    ids: of their requests; they decide the draws. sampling: how they are generated. is_whole: one
    replica generates all of them, because verdicts compare them. is_compared: one rank has the
    tools and the verifier of all of them.
    """

    task: Task
    ids: range
    sampling: Sampling
    is_whole: bool = False
    is_compared: bool = False


def read_tasks(
    domain: DomainConfig,
    environments: Mapping[str, Environment],
    *,
    seed: int,
    heldout: bool,
    count: int,
    domains: Sequence[DomainConfig] = (),
) -> list[Prompt]:
    """The prompts of one domain: read from its files, or made from the seed if it has none.

    count: number of tasks to make, or the most to read; 0 reads all rows. domains: all domains of
    the stage, which may read the same files.

    Raises DataError if there is no task, for a file that cannot be read, and for more bad rows
    than `domain.max_bad_rows`.
    """
    environment = environments[domain.domain]
    paths = _paths(domain, heldout)
    if not paths:
        if domain.path and heldout:
            # Task files have no held-out split.
            return []
        made = environment.prompts(
            seed=seed, count=count, difficulty=domain.difficulty, heldout=heldout
        )
        return list(made)
    bad = BadRows(domain.max_bad_rows, setting=f"max_bad_rows of domain {domain.domain}")
    rows: Iterator[Prompt] = (
        prompt
        for path in paths
        for prompt in environment.read(
            path,
            bad.skip,
            [
                environments[d.domain]
                for d in domains
                if d.domain != domain.domain and path in _paths(d, heldout)
            ],
        )
    )
    if not heldout and (domain.drop_solved or domain.drop_unsolved):
        rows = _filtered(rows, domain)
    found = list(islice(rows, count or None))
    if not found:
        raise DataError(f"{domain.domain}: {', '.join(paths)} holds no task: name other files")
    if bad.count:
        LOGGER.warning("%s: %s", domain.domain, bad.summary())
    return found


def _paths(domain: DomainConfig, heldout: bool) -> tuple[str, ...]:
    return domain.heldout_path if heldout else domain.path


def _filtered(prompts: Iterable[Prompt], domain: DomainConfig) -> Iterator[Prompt]:
    """Filter tasks by `pass_rate`; dropped tasks are counted and logged."""
    shares = {"solved": domain.drop_solved, "unsolved": domain.drop_unsolved}
    dropped = dict.fromkeys(shares, 0)
    kept = unknown = 0
    try:
        for prompt in prompts:
            unknown += prompt.pass_rate is None
            what = {1.0: "solved", 0.0: "unsolved", None: None}.get(prompt.pass_rate)
            # These digits of the id are independent of those that choose held-out tasks.
            if what and int(prompt.id[8:16], 16) < shares[what] * 2**32:
                dropped[what] += 1
                continue
            kept += 1
            yield prompt
    finally:  # also runs if the caller stops early
        LOGGER.info(
            "%s: by pass_rate, %d tasks solved every time and %d never solved are dropped, %d kept",
            domain.domain,
            dropped["solved"],
            dropped["unsolved"],
            kept,
        )
        if unknown:
            LOGGER.warning("%s: %d tasks have no pass_rate and are kept", domain.domain, unknown)


class TaskStream:
    """An endless task sequence: domains mixed by their shares, each domain shuffled every epoch.

    Task number n of a domain without a curriculum is a function of the settings alone, so the
    position is one number. steps: length of the stage, for curricula. world: its ranks encode a
    share of the prompts each; every rank makes the same stream.

    Raises DataError for a domain without a task, and for one whose curriculum has no difficulties.
    """

    def __init__(
        self,
        domains: Sequence[DomainConfig],
        environments: Mapping[str, Environment],
        tokenizer: Tokenizer,
        rollout: RolloutConfig,
        *,
        seed: int,
        steps: int = 1,
        world: World | None = None,
    ) -> None:
        self.seed = seed
        self.shares = {d.domain: d.share for d in domains}
        self.prompts: dict[str, EncodedPrompts] = {}
        self.curricula: dict[str, Curriculum] = {}
        for domain in domains:

            def read(wanted: DomainConfig) -> EncodedPrompts:
                found = read_tasks(
                    wanted,
                    environments,
                    seed=seed,
                    heldout=False,
                    count=wanted.tasks,
                    domains=domains,
                )
                return encode_prompts(found, tokenizer, rollout, world)

            prompts, difficulty = by_level(domain, read)
            self.prompts[domain.domain] = prompts
            if not len(prompts):
                raise DataError(
                    f"{domain.domain} has no prompt of at most "
                    f"rollout.max_prompt_tokens({rollout.max_prompt_tokens}): raise it"
                )
            if domain.curriculum == "adaptive" and environments[domain.domain].by_group:
                raise DataError(
                    f"{domain.domain}: its rewards compare the answers of a group, so there is no "
                    "pass rate for curriculum(adaptive): set it to easy_to_hard or none"
                )
            if domain.curriculum != "none":
                self.curricula[domain.domain] = Curriculum(
                    domain,
                    difficulty,
                    rollout,
                    share=domain.share / sum(self.shares.values()),
                    seed=seed,
                    steps=steps,
                )
        self._drawn = dict.fromkeys(self.shares, 0)
        self._order: dict[str, tuple[int, list[int]]] = {}

    @property
    def position(self) -> int:
        """Number of tasks taken so far."""
        return sum(self._drawn.values())

    def take(self, count: int, step: int = 0) -> list[Task]:
        """The next `count` tasks. step: the stage's step that takes them, counted from 0."""
        return [self._next(step) for _ in range(count)]

    def peek(self, count: int, step: int = 0) -> list[Task]:
        """The tasks that `take` would return; none is taken."""
        state = self.state_dict()
        found = self.take(count, step)
        self._restore(state)
        return found

    def observe(self, results: Iterable[tuple[Prompt, Sequence[Verdict]]]) -> None:
        """Tell the curricula the verdicts on the rollouts of tasks, in the order of the tasks."""
        for prompt, verdicts in results:
            if prompt.domain in self.curricula:
                rewards = [v.reward for v in verdicts if v.reward is not None]
                self.curricula[prompt.domain].observe(rewards)

    def metrics(self, step: int) -> dict[str, float]:
        """State of the curricula after `step`, counted from 0; empty without one."""
        return {
            name: value
            for curriculum in self.curricula.values()
            for name, value in curriculum.metrics(step).items()
        }

    def state_dict(self) -> dict[str, Any]:
        """The position, for a checkpoint, and the state of the curricula if there are any."""
        state: dict[str, Any] = {"drawn": dict(self._drawn)}
        if self.curricula:
            state["curricula"] = {name: c.state_dict() for name, c in self.curricula.items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a position. A curriculum that the state does not have starts anew.

        Raises DataError if the state is of other domains.
        """
        if state["drawn"].keys() != self._drawn.keys():
            raise DataError(
                f"the checkpoint has drawn from {sorted(state['drawn'])}, this recipe names "
                f"{sorted(self._drawn)}: set --domains as they were, or choose another --run-dir"
            )
        for name in self.curricula.keys() - state.get("curricula", {}).keys():
            LOGGER.info("%s: the checkpoint has no curriculum, it starts here", name)
        self._restore(state)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._drawn = dict(state["drawn"])
        for name, stored in state.get("curricula", {}).items():
            if name in self.curricula:
                self.curricula[name].load_state_dict(stored)

    def _next(self, step: int) -> Task:
        number = self.position
        total = sum(self.shares.values())
        # The domain with the largest deficit against its share.
        domain = max(
            self.shares, key=lambda d: self.shares[d] / total * (number + 1) - self._drawn[d]
        )
        prompts = self.prompts[domain]
        if domain in self.curricula:
            chosen = self.curricula[domain].draw(self._drawn[domain], step)
        else:
            epoch, index = divmod(self._drawn[domain], len(prompts))
            chosen = self._shuffled(domain, epoch)[index]
        prompt, ids = prompts[chosen]
        self._drawn[domain] += 1
        return Task(prompt, ids, number)

    def _shuffled(self, domain: str, epoch: int) -> list[int]:
        if domain not in self._order or self._order[domain][0] != epoch:
            order = list(range(len(self.prompts[domain])))
            random.Random(f"{self.seed}/{domain}/{epoch}").shuffle(order)
            self._order[domain] = (epoch, order)
        return self._order[domain][1]
