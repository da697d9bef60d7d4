"""Dynamic filtering as a stream: which candidates of a step start, which train, which are needless.

A step draws a numbered sequence of candidate tasks. The groups that train are the first `wanted`
informative ones in the order of their numbers, so they do not depend on timing. Verdicts only
decide how many candidates start before it is known which are needed.

**Drawing ahead.** Each candidate has a probability to be informative: 1 once two of its rewards
differ, 0 once all are equal. Before that, with k equal rewards of G, it is

    p a_k / (p a_k + 1 - p),    a_k = 2 (G - k) / ((k + 1) (G - 1)),    a_0 = 1,

where p is the running share of informative groups, and a_k the probability that the first k rewards
of an informative group are equal if each success rate is equally likely. As many candidates start
as make the expected number of informative ones, less `margin` standard deviations, reach `wanted`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DECAY = 0.75
"""Weight of the groups of a step in the running share, compared with the next step's."""


@dataclass
class InformativeShare:
    """Running share of informative groups. found, tried: weighted numbers of groups.

    It begins as 6 of 8 groups, which the first step's groups soon outweigh.
    """

    found: float = 6.0
    tried: float = 8.0

    def observe(self, found: int, tried: int) -> None:
        """Take a step's groups into account."""
        self.found = DECAY * self.found + found
        self.tried = DECAY * self.tried + tried


@dataclass
class Candidate:
    """The verdicts on one candidate. done: their number. first: the first reward."""

    done: int = 0
    first: float | None = None
    is_informative: bool = False


@dataclass
class Drawing:
    """The candidates of one step, and what their verdicts decide.

    wanted: number of informative groups. most: number of candidates. copies: rollouts of each.
    share: of informative groups in earlier steps. margin: standard deviations to spare. domains: of
    the candidates, in order. quotas: number of informative groups of each domain, which add up to
    `wanted`. Without quotas any domain's groups count.
    """

    wanted: int
    most: int
    copies: int
    share: InformativeShare
    margin: float
    domains: Sequence[str] = ()
    quotas: Mapping[str, int] = field(default_factory=dict)
    candidates: list[Candidate] = field(init=False)

    def __post_init__(self) -> None:
        self.candidates = [Candidate() for _ in range(self.most)]
        self._finished = self._found = self._informative = 0

    def report(self, index: int, reward: float | None) -> None:
        """Take a verdict into account. reward: as groups compare it; None without one."""
        candidate = self.candidates[index]
        candidate.done += 1
        if reward is not None:
            if candidate.first is None:
                candidate.first = reward
            elif reward != candidate.first and not candidate.is_informative:
                candidate.is_informative = True
                self._informative += 1
        if candidate.done == self.copies:
            self._finished += 1
            self._found += candidate.is_informative

    @property
    def limit(self) -> int:
        """Number of candidates that may start, counted from the first."""
        p, open_ = self._share(), self._quotas()
        means, variances = dict.fromkeys(open_, 0.0), dict.fromkeys(open_, 0.0)
        for index, candidate in enumerate(self.candidates):
            domain, chance = self._domain(index), self._chance(candidate, p)
            if domain not in open_:
                continue
            means[domain] += chance
            variances[domain] += chance * (1 - chance)
            if means[domain] - self.margin * math.sqrt(variances[domain]) >= open_[domain]:
                del open_[domain]
                if not open_:
                    return min(index + 1, self.cutoff)
        return min(self.most, self.cutoff)

    @property
    def cutoff(self) -> int:
        """Candidates from this number on cannot train: enough before them are informative."""
        if self._informative < self.wanted:
            return self.most
        return self.first_enough([c.is_informative for c in self.candidates])

    def first_enough(self, informative: Sequence[bool]) -> int:
        """Number of candidates up to the one that completes `wanted`, or the last quota; all if
        there are fewer. informative: of the candidates, or of the first ones."""
        missing = self._quotas()
        for index, found in enumerate(informative):
            domain = self._domain(index)
            if found and domain in missing:
                missing[domain] -= 1
                if not missing[domain]:
                    del missing[domain]
                    if not missing:
                        return index + 1
        return len(informative)

    def _quotas(self) -> dict[str, int]:
        """Quotas above 0, by domain; one for all domains together without quotas."""
        return {d: n for d, n in self.quotas.items() if n} if self.quotas else {"": self.wanted}

    def _domain(self, index: int) -> str:
        return self.domains[index] if self.quotas else ""

    @property
    def needed(self) -> int | None:
        """Number of candidates up to the last that trains; None while that is not known."""
        cutoff = self.cutoff
        finished = all(c.done == self.copies for c in self.candidates[:cutoff])
        return cutoff if finished else None

    def _share(self) -> float:
        # Above 0, so that all candidates may start before none is left to hope for.
        found = max(self.share.found + self._found, 0.5)
        return found / max(self.share.tried + self._finished, 1.0)

    def _chance(self, candidate: Candidate, p: float) -> float:
        """Probability that a candidate is informative."""
        done, copies = candidate.done, self.copies
        if candidate.is_informative:
            return 1.0
        if done >= copies:
            return 0.0
        if not done:
            return p
        equal = p * 2 * (copies - done) / ((done + 1) * (copies - 1))
        return equal / (equal + 1 - p) if equal else 0.0
