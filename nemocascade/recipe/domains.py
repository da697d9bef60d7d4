"""Settings of one domain of a stage's prompts: its tasks, their filters and their curriculum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from nemocascade.recipe.paths import RowPaths
from nemocascade.recipe.rules import Fraction, Natural, Positive, Range


@dataclass(frozen=True)
class DomainConfig:
    """One domain of a stage's prompts."""

    domain: str = "multiple_choice"
    """Name of the environment that scores the domain's rollouts."""

    share: Positive = 1.0
    """Share of the prompts, relative to the shares of the other domains."""

    path: RowPaths = ()
    """Files of released rows, or folders of them, of the kinds that `data.path` reads. Empty: tasks
    are generated from the seed."""

    hub: tuple[str, ...] = ()
    """Data sets of rows beside `path`, named as in `data.hub` of SFT: `name:split`."""

    max_bad_rows: Natural = 0
    """Number of rows that are skipped because they cannot be read, or because no domain that reads
    the file claims them; one more is an error. It holds for `path` and for `heldout_path`."""

    max_response_tokens: Natural = 0
    """Largest number of tokens in a response of an RL stage, also to held-out tasks; 0 = the
    stage's. Temperature and top-p are the stage's: one packed batch is trained at one temperature,
    so domains that need others are stages of their own."""

    difficulty: Natural = 0
    """Difficulty of generated tasks; 0 is the easiest."""

    tasks: Natural = 1024
    """Number of generated tasks, or the most that are read from `path`; there 0 = all."""

    heldout_path: RowPaths = ()
    """Files of the held-out tasks. Empty: generated, and disjoint from the others."""

    heldout_hub: tuple[str, ...] = ()
    """Data sets of held-out tasks beside `heldout_path`, named as in `hub`."""

    drop_solved: Fraction = 0.0
    """Fraction of the tasks from `path` with a `pass_rate` of 1 that is dropped, since they give no
    training signal. The task's text decides which ones."""

    drop_unsolved: Fraction = 0.0
    """Fraction of the tasks from `path` with a `pass_rate` of 0 that is dropped."""

    curriculum: Literal["none", "easy_to_hard", "adaptive"] = "none"
    """Order of the tasks by difficulty: 1 - `pass_rate` of rows, or `easiest_difficulty` to
    `difficulty` of generated tasks. `none` draws all alike. `easy_to_hard` moves from the easiest
    to the hardest (Nemotron 3 Nano, arXiv 2512.20848). `adaptive` moves so that the running pass
    rate stays near `target_pass_rate`."""

    easiest_difficulty: Natural = 0
    """With a curriculum: difficulty of the easiest generated tasks. `difficulty` is that of the
    hardest and of the held-out tasks, and each level has an equal part of `tasks`."""

    curriculum_steps: Natural = 0
    """Steps in which `easy_to_hard` reaches the hardest tasks; 0 = those of the stage."""

    curriculum_spread: Annotated[float, Range(0.01)] = 0.2
    """Standard deviation of the drawn tasks' difficulty around the curriculum's target, on a scale
    from 0, the easiest, to 1."""

    target_pass_rate: Annotated[float, Range(0, 1, open_low=True, open_high=True)] = 0.5
    """Pass rate that `adaptive` aims at: the mean reward of the rollouts."""

    def curriculum_problems(self, name: str) -> list[str]:
        """Every rule that the curriculum breaks. name: of these settings, such as `domains.0`."""
        if self.curriculum == "none" or self.path:
            return []
        levels = self.difficulty - self.easiest_difficulty + 1
        if levels < 2:
            return [
                f"{name}.curriculum({self.curriculum}) needs tasks of several difficulties: set "
                f"difficulty({self.difficulty}) above easiest_difficulty"
                f"({self.easiest_difficulty}), or name a path whose rows have a pass_rate"
            ]
        if self.tasks < levels:
            return [f"{name}.tasks({self.tasks}) must be at least one for each of {levels} levels"]
        return []
