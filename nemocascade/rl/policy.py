"""The run of an RL or MOPD stage: its batches, evaluation and report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from nemocascade.data.tokenizer import Tokenizer
from nemocascade.recipe.rl import GrpoRecipe, PolicyRecipe
from nemocascade.rl.advantages import token_weights
from nemocascade.rl.batches import (
    PlannedSequence,
    TrainingSequence,
    lay_out,
    microbatch_multiple,
    pack_sequences,
)
from nemocascade.rl.collector import Collector, Gathered, Group
from nemocascade.rl.exchange import send_sequences, send_transcripts
from nemocascade.rl.journal import heldout_journal
from nemocascade.rl.rollout_metrics import fault_examples, faults_text, rollout_values
from nemocascade.rl.rollouts import Rollout, Transcript
from nemocascade.rl.tasks import Task, TaskStream
from nemocascade.rl.trajectories import extremes, logged
from nemocascade.rl.win_rate import over_start
from nemocascade.rollout.engine import Engine, Sampling
from nemocascade.runtime.files import write_text
from nemocascade.runtime.jsonl import json_text
from nemocascade.runtime.logging import LOGGER
from nemocascade.runtime.world import World
from nemocascade.train.checkpointing import Checkpoints
from nemocascade.train.evaluation import token_logprobs, whole_rows
from nemocascade.train.metrics import MetricsWriter
from nemocascade.train.trainer import Trainer
from nemocascade.train.weight_swap import WeightSwap
from nemocascade.types import Artifact, Environment, PackedBatch

REFERENCE = "start"
"""Name of the weight set of the stage's start, the reference policy."""


@dataclass(eq=False)
class PolicyRun:
    """A running RL or MOPD stage: its policy, tasks, checkpoints and reports."""

    recipe: PolicyRecipe
    world: World
    trainer: Trainer
    tokenizer: Tokenizer
    engine: Engine
    environments: dict[str, Environment]
    collector: Collector
    stream: TaskStream
    heldout: list[Task]
    checkpoints: Checkpoints
    parent: Artifact
    start_answers: dict[int, str]

    def metrics_writer(self, first_step: int) -> MetricsWriter:
        """The metrics writer of this run, starting at `first_step`."""
        return MetricsWriter(self.recipe, self.world, first_step)

    def evaluate(self) -> dict[str, float]:
        """Mean reward of greedy answers to the held-out tasks, by domain; {} without such tasks.
        Domains with pairwise verdicts also report the win rate against the stage's start.

        Excluded: answers whose verifier failed. They are counted in the log.
        """
        if not self.heldout:
            return {}
        with self.collector.journalled(heldout_journal(self.trainer.step_number)):
            groups = self.collector.roll_out(
                self.heldout, 1, greedy_sampling(self.recipe, self.collector)
            )
        found: dict[str, list[float]] = {}
        errors = 0
        for group in groups:
            reward = group.rollouts[0].verdict.reward
            if reward is None:
                compared = self.environments[group.task.prompt.domain].by_group
                # Without a baseline, only the start's answer is there to compare with.
                errors += not (compared and group.task.prompt.answer.get("baseline") is None)
            else:
                found.setdefault(group.task.prompt.domain, []).append(reward)
        if errors:
            LOGGER.warning("held out: %d verifiers failed, their answers are not counted", errors)
        scores = {f"heldout/{name}": sum(r) / len(r) for name, r in sorted(found.items())}
        scores |= over_start(self.collector, groups, self.start_answers)
        self.engine.release()
        # They are not those of a step.
        self.collector.take_times()
        return scores

    def keep_start_scores(self, scores: dict[str, float]) -> None:
        """Write the scores before the first step to RUN/heldout_start.json."""
        if self.world.is_main:
            path = Path(self.recipe.run_dir) / "heldout_start.json"
            write_text(path, json.dumps(scores, indent=1) + "\n")

    def log_scores(self, when: str, scores: dict[str, float]) -> None:
        """Log the scores."""
        text = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        LOGGER.info("%s: %s", when, text)

    def rollout_values(self, gathered: Gathered, seconds: float) -> dict[str, Any]:
        """Rollout statistics of a step for metrics.jsonl; warns of verifiers that fail often."""
        values = rollout_values(gathered, seconds, self.environments) | self.engine.metrics()
        values |= self.collector.take_times()
        values["verifier_slots"] = self.collector.verifier_slots
        values["rollouts_restored"] = self.collector.restored
        examples = fault_examples(gathered, values)
        texts = self.transcripts([rollout for _, rollout in examples.values()])
        if text := faults_text(self.trainer.step_number, examples, values, texts):
            LOGGER.warning("%s", text)
        return values

    def transcripts(self, rollouts: Sequence[Rollout]) -> list[Transcript]:
        """The texts of some rollouts, in order, on the main rank; [] on the others. Every rank
        calls it with the same rollouts."""
        found = send_transcripts(self.world, rollouts, [[0]] * len(rollouts))
        return list(found.values())

    def watch_mismatch(self, step: int, metrics: dict[str, float]) -> None:
        """Warn if training and rollout log-probabilities of the same tokens differ too much.

        step: counted from 0.
        """
        limits = self.recipe.rollout
        mean, largest = metrics["mismatch_mean"], metrics["mismatch_max"]
        if mean > limits.mismatch_mean_alarm or largest > limits.mismatch_max_alarm:
            LOGGER.warning(
                "step %d: |log pi_train - log pi_rollout| has mean %.3g and largest %.3g: the "
                "rollouts are not of the policy that is trained",
                step + 1,
                mean,
                largest,
            )

    def free_mismatch(self, batches: Sequence[PackedBatch]) -> dict[str, float]:
        """`mismatch_mean_free`: mean |log pi_train - log pi_rollout| without router replay, on the
        first micro-batch of every rank; {} if nothing is replayed. It costs one forward pass.

        batches: this rank's. Every rank calls it.
        """
        if not self.recipe.rollout.replay_routing:
            return {}
        first = list(batches[: microbatch_multiple(self.world.parallel)])
        sums = torch.zeros(2, dtype=torch.float64)
        for batch, found in zip(first, logprobs_of(self, first), strict=True):
            trained = batch.token_weight != 0
            assert batch.rollout_logprob is not None
            difference = (found - batch.rollout_logprob)[trained].abs().double()
            sums += torch.tensor([difference.sum(), trained.sum()])
        total, count = self.world.sum_over_data_parallel(sums).tolist()
        return {"mismatch_mean_free": total / max(1.0, count)}

    def keep_samples(self, step: int, groups: Sequence[Group]) -> None:
        """Write the best and worst rollout of some groups of the step as text to RUN/rollouts.

        step: counted from 0; the file and its lines count from 1.
        """
        count = self.recipe.rollout.samples
        chosen = [(g, number) for g in groups[:count] for number in extremes(g)]
        texts = self.transcripts([g.rollouts[number] for g, number in chosen])
        if not self.world.is_main or not count:
            return
        folder = Path(self.recipe.run_dir) / "rollouts"
        folder.mkdir(parents=True, exist_ok=True)
        lines = [
            logged(step + 1, g, number, text)
            for (g, number), text in zip(chosen, texts, strict=True)
        ]
        text = "".join(json_text(line) + "\n" for line in lines)
        write_text(folder / f"step_{step + 1:08d}.jsonl", text)

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        self.checkpoints.save(self.trainer, self.stream)

    def abandon_step(self) -> NoReturn:
        """Save a checkpoint of the last finished step and stop, after `StopAsked`."""
        self.engine.release()
        self.checkpoints.stop(self.trainer, self.stream)

    def stop_if_asked(self) -> None:
        """Save a checkpoint and stop if a scheduler asked for it."""
        self.checkpoints.stop_if_asked(self.trainer, self.stream)

    def write_artifact(self, scores: dict[str, float], **data: Any) -> Path:
        """Write RUN/artifact and return its folder. data: further manifest entries on the data."""
        data |= {
            "domains": [d.domain for d in self.recipe.domains],
            "tasks": {name: len(found) for name, found in self.stream.prompts.items()},
            "heldout": len(self.heldout),
        }
        folder = self.checkpoints.write_artifact(
            self.trainer, self.recipe, self.recipe.stage, self.tokenizer, data, scores
        )
        if self.collector.journals is not None:
            self.collector.journals.clear()
        return folder


def training_batches(
    run: PolicyRun, sequences: Sequence[PlannedSequence], reference: WeightSwap | None
) -> list[PackedBatch]:
    """This rank's micro-batches of a step, with reference log-probabilities if `reference` is
    given."""
    batches = my_batches(run, sequences)
    if reference is None:
        return batches
    with reference.using(REFERENCE):
        found = logprobs_of(run, batches)
    return [replace(b, ref_logprob=r) for b, r in zip(batches, found, strict=True)]


def my_batches(run: PolicyRun, planned: Sequence[PlannedSequence]) -> list[PackedBatch]:
    """This rank's micro-batches of a step; every rank gets the same number. The sequences come from
    the ranks that hold them, and their numbers become the `document_ids`."""
    layout = layout_of(run, planned, run.recipe.capacity)
    sequences = send_sequences(run.world, planned, [layout])
    return packed_bins(run, sequences, layout[run.world.dp_rank], run.recipe.capacity)


def layout_of(
    run: PolicyRun, planned: Sequence[PlannedSequence], capacity: int
) -> list[list[list[int]]]:
    """Numbers of the sequences by data-parallel rank and micro-batch, see `lay_out`."""
    return lay_out(
        [p.rollout.tokens for p in planned],
        capacity,
        ranks=run.world.dp_size,
        multiple=microbatch_multiple(run.world.parallel),
    )


def packed_bins(
    run: PolicyRun,
    sequences: Mapping[int, TrainingSequence],
    bins: Sequence[Sequence[int]],
    capacity: int,
) -> list[PackedBatch]:
    """This rank's rows of a micro-batch of each bin of sequence numbers, which become the
    `document_ids`."""
    pad, world = run.tokenizer.pad_id, run.world
    return [
        pack_sequences([sequences[i] for i in b], capacity, pad, b).shard(
            world.cp_rank, world.parallel.cp
        )
        for b in bins
    ]


def logprobs_of(run: PolicyRun, batches: Sequence[PackedBatch]) -> list[torch.Tensor]:
    """Log-probabilities of the trained rows under the current weights, see `token_logprobs`."""
    return token_logprobs(
        run.world,
        run.trainer.config,
        run.trainer.chunks,
        batches,
        temperature=run.recipe.rollout.temperature,
    )


def sequence_logprobs(
    recipe: PolicyRecipe, trainer: Trainer, pad_id: int, tokens: torch.Tensor, prompt: int
) -> torch.Tensor:
    """Log-probabilities of a sequence's tokens after the first `prompt`, [n - prompt] float32 on
    the host, by the training forward at the rollouts' temperature. Every rank passes the same.

    tokens: [n] int64, at most `recipe.capacity`.
    """
    count = tokens.numel()
    written = torch.arange(count) >= prompt
    sequence = TrainingSequence(tokens, written, torch.zeros(count), weight=1.0)
    world = trainer.world
    batch = pack_sequences([sequence], recipe.capacity, pad_id)
    batch = batch.shard(world.cp_rank, world.parallel.cp)
    found = token_logprobs(
        world,
        trainer.config,
        trainer.chunks,
        [batch] * microbatch_multiple(trainer.world.parallel),
        temperature=recipe.rollout.temperature,
    )
    return whole_rows(world, found[0], batch)[prompt - 1 : count - 1]


def training_sequences(groups: Sequence[Group], recipe: GrpoRecipe) -> list[PlannedSequence]:
    """Training sequences with their advantages and token weights.

    Excluded: rollouts whose verifier failed, and truncated ones under overlong filtering.
    """
    chosen = []
    for number, group in enumerate(groups):
        assert group.advantage is not None
        for rollout, advantage in zip(group.rollouts, group.advantage.tolist(), strict=True):
            filtered = rollout.truncated and recipe.rollout.overlong_filter
            if rollout.verdict.reward is not None and not filtered and rollout.length:
                chosen.append((number, rollout, advantage))
    if not chosen:
        return []
    weights = token_weights(
        torch.tensor([rollout.length for _, rollout, _ in chosen]),
        torch.tensor([number for number, _, _ in chosen]),
        recipe.grpo,
    )
    return [
        PlannedSequence(rollout, weight, advantage, groups[number].task.prompt.domain)
        for (number, rollout, advantage), weight in zip(chosen, weights.tolist(), strict=True)
    ]


def greedy_sampling(recipe: PolicyRecipe, collector: Collector) -> Sampling:
    """Sampling settings for held-out tasks: temperature 0 and the evaluation's length limit."""
    limit = recipe.eval.max_response_tokens or recipe.rollout.max_response_tokens
    return replace(collector.sampling(), temperature=0.0, max_tokens=limit)
