"""Times and lengths that a run has measured, from its metrics.jsonl, in place of assumed ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from nemocascade.plan.errors import PlanError
from nemocascade.plan.generation import StepTerms
from nemocascade.plan.lengths import lengths_of_rows, run_rows
from nemocascade.plan.workload import StepWork

_NEEDED = (
    "response_tokens_deciles",
    "decode_steps",
    "decode_rows",
    "decode_time_s",
    "groups",
    "groups_drawn",
    "prefill_time_s",
    "idle_time_s",
    "generation_time_s",
    "verify_time_s",
    "verdicts",
    "verify_wait_s",
    "train_time_s",
    "tokens",
    "step_time_s",
)


@dataclass(frozen=True)
class MeasuredCosts:
    """`Costs` that a run has measured: a decode step takes `step_s`, and `row_s` for each of its
    rows; `token_s` for each token of a prefill. Ranks that share experts count as one replica."""

    step_s: float
    row_s: float
    token_s: float
    members: int = 1

    def step(self, rows: float, shared: float, cached: float) -> StepTerms:
        """Implements `Costs.step`."""
        return StepTerms(host=self.step_s + self.row_s * rows)

    def prefill(self, tokens: float) -> float:
        """Implements `Costs.prefill`."""
        return self.token_s * tokens


@dataclass(frozen=True)
class MeasuredRun:
    """A run's steps. work: with its lengths, shares and verification. loop_s: seconds of generation
    beside its passes, for each second of them. train_s: seconds of training for each round of
    micro-batches. round_tokens: tokens that fit into a round. fill: share of a round's rows with
    tokens, where packs are made smaller to fit (MOPD); otherwise 0. kept: tokens that train, for
    each token of the groups that do: the overlong filter drops whole sequences, and groups that
    train may be longer than others. scoring_s, other_s: of teachers or the reference, and of
    everything else in a step."""

    work: StepWork
    costs: MeasuredCosts
    loop_s: float
    train_s: float
    round_tokens: int
    fill: float
    kept: float
    scoring_s: float
    other_s: float

    @property
    def training_s(self) -> float:
        """Seconds of a step's training, on average.

        A round computes all rows of its packs, with tokens or without. Packs of one size are
        rounded up to whole rounds, by half of one on average where the tokens of steps differ.
        """
        tokens = self.kept * self.work.trained_tokens / self.round_tokens
        rounds = tokens / self.fill if self.fill else max(1.0, tokens + 0.5)
        return self.train_s * rounds


def read_run(
    path: str,
    work: StepWork,
    ranks: int,
    round_tokens: int,
    *,
    lengths: bool = True,
    share: bool = True,
) -> MeasuredRun:
    """Read the metrics.jsonl of an RL or MOPD run on `ranks` ranks.

    work: of its recipe. round_tokens: tokens that a round of micro-batches of all ranks holds, see
    `Job.round_tokens`. lengths, share: take the run's lengths and its share of informative groups,
    not those of `work`.

    Raises PlanError if no step has every measurement: the run's rollouts came from servers, or
    nothing trained.
    """
    rows = _steady_steps(path)

    def total(key: str) -> float:
        return float(sum(row.get(key) or 0.0 for row in rows))

    step_s, row_s = _linear(rows)
    passes = total("decode_time_s") + total("prefill_time_s")
    drawn, started = total("groups_drawn"), total("groups_drawn") + total("groups_ahead")
    # Times are those of the main rank. Results of tools count with the prompts.
    prefilled = total("prefill_tokens")
    prompt = round(prefilled * ranks / max(1.0, started)) or _trained_prompt_tokens(rows, work)
    prefilled = prefilled or started * prompt / ranks
    costs = MeasuredCosts(step_s, row_s, total("prefill_time_s") / max(1.0, prefilled))
    episodes = replace(
        work.costs,
        verify_s=total("verify_time_s") / max(1.0, total("verdicts")),
        side=1,
        turn=0,
        cores=max(1, round(total("verifier_slots") / len(rows) / ranks)),
    )
    scoring = total("teacher_time_s")
    known = total("generation_time_s") + total("verify_wait_s") + scoring + total("train_time_s")
    trained = total("groups")
    filled = [float(row["fill"]) for row in rows if row.get("fill")]
    # The median: another program on the machine delays single steps.
    trained_s = [row["train_time_s"] / _rounds(row, round_tokens) for row in rows]
    return MeasuredRun(
        work=replace(
            work,
            lengths=lengths_of_rows(rows, work.lengths.limit) if lengths else work.lengths,
            share=min(1.0, max(trained / drawn, 1e-3)) if share else work.share,
            costs=episodes,
            prompt=prompt,
        ),
        costs=costs,
        loop_s=(total("generation_time_s") - total("idle_time_s")) / max(passes, 1e-9) - 1.0,
        train_s=float(np.median(trained_s)),
        round_tokens=round_tokens,
        fill=float(np.mean(filled)) if filled else 0.0,
        kept=total("tokens") / max(1.0, _sequences(rows, work) * (prompt + _responses(rows))),
        scoring_s=scoring / len(rows),
        other_s=max(0.0, total("step_time_s") - known) / len(rows),
    )


def _steady_steps(path: str) -> list[dict[str, Any]]:
    """The steps with every measurement, without those that are slow or short for a known reason.
    Raises PlanError as `read_run`."""
    rows = [row for row in run_rows(path) if all(row.get(key) is not None for key in _NEEDED)]
    if not rows:
        raise PlanError(
            f"{path} has no step with {', '.join(_NEEDED)}: name the metrics.jsonl of an RL or "
            "MOPD run with --rollout.engine live"
        )
    # The first step of a run warms up, and a resumed one generates a part of its rollouts.
    whole = [row for row in rows if not row.get("rollouts_restored")] or rows
    return [row for row in whole if row.get("step") != 1] or whole


def _rounds(row: dict[str, Any], round_tokens: int) -> float:
    """Rounds of micro-batches of a step; parts of one where packs are smaller."""
    rounds = row["tokens"] / round_tokens
    return float(rounds / row["fill"] if row.get("fill") else max(1, math.ceil(rounds)))


def _linear(rows: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of a decode step, and of each of its rows; neither is negative."""
    steps = np.array([row["decode_steps"] for row in rows], np.float64)
    decoded = np.array([row["decode_rows"] for row in rows], np.float64)
    seconds = np.array([row["decode_time_s"] for row in rows], np.float64)
    mean = float(seconds.sum() / max(1.0, steps.sum()))
    if len(rows) < 2:
        return mean, 0.0
    found, *_ = np.linalg.lstsq(np.stack([steps, decoded], 1), seconds, rcond=None)
    if min(found) < 0:
        return (mean, 0.0) if found[1] < 0 else (0.0, float(seconds.sum() / decoded.sum()))
    return float(found[0]), float(found[1])


def _trained_prompt_tokens(rows: Sequence[dict[str, Any]], work: StepWork) -> int:
    """Mean tokens of a prompt: those that were trained beyond the responses."""
    trained = float(sum(row["tokens"] for row in rows))
    return max(1, round(trained / max(1, _sequences(rows, work)) - _responses(rows)))


def _sequences(rows: Sequence[dict[str, Any]], work: StepWork) -> int:
    """Rollouts of the groups that trained."""
    return sum(row.get("groups") or work.wanted for row in rows) * work.copies


def _responses(rows: Sequence[dict[str, Any]]) -> float:
    """Mean tokens of a response."""
    return float(sum(row["response_tokens"] for row in rows)) / len(rows)
