"""Print what ranks receive in a step's exchange of rollouts, the sockets that they open, and the
bytes that they read at the start and write for checkpoints, into docs/scale.md.

python tools/exchange_table.py           # write the tables
python tools/exchange_table.py --check   # exit code 1 if the page is not up to date
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pages

from nemocascade.plan.checkpoints import checkpoint_cost, start_cost
from nemocascade.plan.gpus import find_gpu
from nemocascade.plan.job import job_of_recipe
from nemocascade.plan.sockets import host_sockets
from nemocascade.recipe import MopdRecipe, PolicyRecipe, load_any_recipe
from nemocascade.rl.batches import capacity_grain, fit_capacity, lay_out
from nemocascade.rl.exchange import OUTCOME_BYTES
from nemocascade.rl.rollouts import ChoiceShape, packed_bytes

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "scale.md"
SCRIPTS = ROOT / "recipes" / "nemotron3_nano_30b"
BEGIN, END = "<!-- table: tools/exchange_table.py -->\n", "<!-- end of the table -->\n"

RANK_MARKS = ("<!-- table: sockets, bytes read and written -->\n", "<!-- end of the ranks -->\n")

STAGES = {"if_rl": 8_000, "code_rl": 25_000, "mopd": 15_000, "swe_agentic_rl": 30_000}
"""Assumed median length of a response, in tokens."""
SPREAD = 1.0
"""Assumed deviation of the logarithm of a response's length."""
PROMPT = 2_000
"""Assumed length of a prompt."""
SIZES = (64, 256, 1024)
TEXT_BYTES = 4
"""Bytes of text a token."""
PICKLED_BYTES = 8 + 1 + 4 + TEXT_BYTES
"""Bytes a token of a pickled rollout: int64 ids, the mask, float32 log-probabilities, text."""


def lengths_of(recipe: PolicyRecipe, median: int) -> list[int]:
    """Lengths of a step's sequences, with their prompts."""
    rollout = recipe.rollout
    count = rollout.prompts_per_step * rollout.rollouts_per_prompt
    drawn = np.random.default_rng(1).lognormal(np.log(median), SPREAD, count).astype(int)
    return [int(n) + PROMPT for n in np.minimum(drawn, rollout.max_response_tokens)]


def _packed_together(recipe: PolicyRecipe, count: int) -> list[list[int]]:
    """Numbers of the sequences that are packed at once: all, and for MOPD those of each teacher."""
    every = list(range(count))
    if not isinstance(recipe, MopdRecipe):
        return [every]
    shares = [d.share for d in recipe.domains]
    domains = np.random.default_rng(2).choice(
        len(shares), recipe.rollout.prompts_per_step, p=np.array(shares) / sum(shares)
    )
    taught = {t.domain: t.artifact for t in recipe.teachers}
    of = [taught[recipe.domains[d].domain] for d in domains for _ in range(count // len(domains))]
    return [every, *([i for i in every if of[i] == name] for name in dict.fromkeys(of))]


def received(recipe: PolicyRecipe, lengths: list[int], ranks: int) -> dict[str, float]:
    """Bytes: the most that a rank trains or scores as a teacher, the most that it receives, and all
    rollouts. These are on all ranks in turn."""
    parallel = recipe.parallel
    dp = parallel.data_parallel(ranks)
    replica = ranks // dp
    wanted: list[set[int]] = [set() for _ in range(dp)]
    for numbers in _packed_together(recipe, len(lengths)):
        chosen = [lengths[i] for i in numbers]
        capacity = recipe.capacity
        if isinstance(recipe, MopdRecipe):
            grain = capacity_grain(capacity, parallel)
            capacity = fit_capacity(chosen, capacity, ranks=dp, grain=grain)
        for mine, bins in zip(wanted, lay_out(chosen, capacity, ranks=dp), strict=True):
            mine.update(numbers[i] for bin_ in bins for i in bin_)
    sizes = [packed_bytes(n, ChoiceShape()) for n in lengths]
    share = [sum(sizes[i] for i in mine) for mine in wanted]
    arrive = [
        sum(sizes[i] for i in mine if i % ranks != data_rank * replica + k)
        for data_rank, mine in enumerate(wanted)
        for k in range(replica)
    ]
    outcomes = 2 * OUTCOME_BYTES * len(lengths)
    return {
        "share": max(share),
        "received": max(arrive) + outcomes,
        "pickled": PICKLED_BYTES * sum(lengths),
    }


def table() -> str:
    """The table as Markdown."""
    lines = [
        "| stage | ranks | all rollouts, pickled, to every rank | needed by a rank | received |",
        "|---|---|---|---|---|",
    ]
    for name, median in STAGES.items():
        recipe = load_any_recipe(SCRIPTS / f"{name}.py")
        assert isinstance(recipe, PolicyRecipe)
        lengths = lengths_of(recipe, median)
        for ranks in SIZES:
            found = received(recipe, lengths, ranks)
            mb = {k: f"{v / 1e6:,.1f} MB" for k, v in found.items()}
            lines.append(
                f"| {name} | {ranks} | {mb['pickled']} | {mb['share']} | {mb['received']} |"
            )
    return "\n".join(lines) + "\n"


def rank_table() -> str:
    """The table of sockets, and of bytes read and written, as Markdown."""
    lines = [
        "| stage | ranks | sockets, at most | weights read | by a rank, at most | from other ranks "
        "| checkpoint | largest rank | x the mean | copied in | written in |",
        f"|{'---|' * 11}",
    ]
    gpu, preset = find_gpu("h200"), "nemotron3_nano_30b"
    for name in ("sft", "if_rl", "code_rl"):
        recipe = load_any_recipe(SCRIPTS / f"{name}.py")
        for ranks in SIZES:
            job = job_of_recipe(recipe, gpu, ranks, preset=preset)
            cost, read = checkpoint_cost(job), start_cost(job)
            layout = job.parallel
            if isinstance(recipe, PolicyRecipe):
                layout = recipe.rollout.parallel.layout(layout)
            cells = [
                f"{host_sockets(ranks, job.parallel, layout)}",
                f"{read.total / 1e9:,.0f} GB",
                f"{read.largest / 1e9:.2f} GB",
                f"{read.received / 1e9:.1f} GB",
                f"{cost.total / 1e9:,.0f} GB",
                f"{cost.largest / 1e9:.2f} GB",
                f"{cost.largest / cost.mean:.2f}",
                f"{cost.copy_s:.2f} s",
                f"{cost.write_s:.1f} s",
            ]
            lines.append(f"| {name} | {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Write both tables; with --check, 1 if the page has others."""
    written = [
        pages.update(PAGE, marks, made, arguments)
        for marks, made in (((BEGIN, END), table), (RANK_MARKS, rank_table))
    ]
    return max(written)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
