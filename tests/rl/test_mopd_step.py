"""A MOPD step against a plain autograd implementation of Eq. 2-4, and weight swaps of teachers."""

from __future__ import annotations

import functools
import json
import re
import resource
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.policy import (
    CAPACITY,
    ENGINE,
    TEMPERATURE,
    gradients,
    plain_distributions,
    plain_logprobs,
    rollout,
    sequence_of,
    sft_batch,
    small_trainer,
)
from nemocascade_kernels import DIVERGENCES, Divergence
from nemocascade_kernels.linear_distill_loss.reference import divergence_of
from torch import Tensor

from nemocascade.megatron.artifact import Provenance, write_artifact
from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.distillation import Distillation
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    DomainConfig,
    MopdConfig,
    MopdRecipe,
    ParallelConfig,
    RecipeError,
    RolloutConfig,
    TeacherConfig,
)
from nemocascade.rl.batches import PlannedSequence, capacity_grain, fit_capacity, lay_out
from nemocascade.rl.collector import Group
from nemocascade.rl.tasks import Task
from nemocascade.rl.teacher_states import StateScores
from nemocascade.rl.teachers import LogprobScores, Teachers
from nemocascade.runtime.world import World
from nemocascade.stages.mopd import open_teachers, student_sequences
from nemocascade.train.evaluation import distill_metrics, mopd_metrics
from nemocascade.train.objectives import distill_objective, mopd_objective
from nemocascade.train.trainer import Measure, Trainer
from nemocascade.train.weight_swap import WeightSwap, live_tensors
from nemocascade.types import Artifact, PackedBatch, Prompt

LOW, HIGH = 0.5, 2.0


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = start_world(ParallelConfig(), ENGINE)
    yield world
    world.close()


@pytest.fixture
def trainer(world: World, tmp_path: Path) -> Trainer:
    return small_trainer(world, tmp_path)


def recipe(**rollout_settings: object) -> MopdRecipe:
    return MopdRecipe(
        rollout=RolloutConfig(
            temperature=TEMPERATURE,
            dynamic_filtering=False,
            **rollout_settings,  # type: ignore[arg-type]
        ),
        mopd=MopdConfig(capacity=CAPACITY),
    )


def groups(trainer: Trainer) -> list[Group]:
    """Two domains, two rollouts each; one has no verdict. Their rollout log-probabilities lie
    around the policy's own, some beyond the gate."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for number, domain in enumerate(("math", "code")):
        rollouts = []
        for reward in (1.0, None):
            r = rollout(generator, reward, truncated=reward == 1.0)
            known = sequence_of(r)
            with torch.no_grad():
                logprob = plain_logprobs(trainer, known.tokens)
            noise = torch.randn(logprob.shape, generator=generator) * 0.7
            shifted = torch.cat([torch.zeros(1), logprob + noise])
            shifted = torch.where(known.written, shifted, 0.0)
            rollouts.append(replace(r, sequence=replace(known, logprob=shifted)))
        prompt = Prompt(str(number), domain, (), {})
        found.append(Group(Task(prompt, np.ones(1, np.int32), number), tuple(rollouts)))
    return found


def plain_loss(trainer: Trainer, swap: WeightSwap, found: list[Group]) -> Tensor:
    """Eq. 2-4 as they are printed: a loop over rollouts, the mean of each over V(y)."""
    teachers: dict[int, Tensor] = {}
    for group in found:
        with torch.no_grad(), swap.using(group.task.prompt.domain):
            teachers |= {
                id(r): plain_logprobs(trainer, sequence_of(r).tokens) for r in group.rollouts
            }
    losses = []
    for group in found:
        for r in group.rollouts:
            teacher = teachers[id(r)]
            logprob = plain_logprobs(trainer, sequence_of(r).tokens)
            advantage = (teacher - logprob).detach()
            ratio = torch.exp(logprob.detach() - sequence_of(r).logprob[1:])
            inside = (ratio >= LOW) & (ratio <= HIGH)
            weight = torch.where(inside, ratio, torch.zeros_like(ratio))
            losses.append((weight * advantage * logprob)[sequence_of(r).written[1:]].mean())
    return -torch.stack(losses).mean()


def batches(
    trainer: Trainer, swap: WeightSwap, planned: list[PlannedSequence], *, states: bool = False
) -> list[PackedBatch]:
    """By the stage's own packing, where a batch holds sequences of both teachers."""
    run: Any = SimpleNamespace(
        world=trainer.world,
        trainer=trainer,
        recipe=recipe(),
        tokenizer=SimpleNamespace(pad_id=0),
    )
    teachers = object.__new__(Teachers)
    teachers.run, teachers.swap = run, swap
    teachers.by_domain = {"math": "math", "code": "code"}
    teachers.scores = StateScores(run) if states else LogprobScores(run)
    found, fills = teachers.batches(planned)
    rows = sum(b.capacity for b in found)
    assert fills["fill"] == sum(p.rollout.tokens for p in planned) / rows
    assert any(len({planned[i].domain for i in b.document_ids}) == 2 for b in found)
    assert sorted(i for b in found for i in b.document_ids) == list(range(len(planned)))
    return found


def two_teachers(trainer: Trainer) -> WeightSwap:
    """The weights before and after a step of training; the student has taken two."""
    swap = WeightSwap(trainer.world, trainer.chunks)
    swap.keep("math")
    trainer.train_step([sft_batch()])
    swap.keep("code")
    trainer.train_step([sft_batch()])
    return swap


def measure(sequences: list[PlannedSequence]) -> Measure:
    domains = [s.domain for s in sequences]
    return functools.partial(mopd_metrics, domains=domains, ratio_low=LOW, ratio_high=HIGH)


def test_loss_and_gradients_are_those_of_the_paper(trainer: Trainer) -> None:
    swap = two_teachers(trainer)
    found = groups(trainer)
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    expected = plain_loss(trainer, swap, found)
    expected.backward()
    wanted = gradients(trainer)

    sequences = student_sequences(found, recipe())
    assert len(sequences) == 4, "a rollout without a verdict trains too"
    result = trainer.train_step(
        batches(trainer, swap, sequences),
        mopd_objective(LOW, HIGH),
        temperature=TEMPERATURE,
        measure=measure(sequences),
    )
    assert result.loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    norm = torch.sqrt(sum(g.double().square().sum() for g in wanted)).item()  # type: ignore[arg-type]
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for mine, plain in zip(gradients(trainer), wanted, strict=True):
        assert (mine - plain).norm() <= 1e-5 * norm


def plain_divergences(
    trainer: Trainer, swap: WeightSwap, found: list[Group], kind: Divergence
) -> dict[str, list[Tensor]]:
    """The divergence in each generated token's state, by rollout and domain, from whole
    distributions of both models."""
    written = {id(r): sequence_of(r).written[1:] for group in found for r in group.rollouts}
    teachers: dict[int, Tensor] = {}
    for group in found:
        with torch.no_grad(), swap.using(group.task.prompt.domain):
            for r in group.rollouts:
                log_q = plain_distributions(trainer, sequence_of(r).tokens)[written[id(r)]]
                teachers[id(r)] = log_q
    return {
        group.task.prompt.domain: [
            divergence_of(
                plain_distributions(trainer, sequence_of(r).tokens)[written[id(r)]],
                teachers[id(r)],
                kind,
            )
            for r in group.rollouts
        ]
        for group in found
    }


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_an_exact_divergence_is_that_of_the_distributions(
    trainer: Trainer, kind: Divergence
) -> None:
    """Loss, gradients, and the metrics of two teachers, whose rows share a batch."""
    swap = two_teachers(trainer)
    found = groups(trainer)
    for chunk in trainer.chunks:
        chunk.zero_grad_buffer()
    by_domain = plain_divergences(trainer, swap, found, kind)
    expected = torch.stack([d.mean() for rows in by_domain.values() for d in rows]).mean()
    expected.backward()
    wanted = gradients(trainer)

    sequences = student_sequences(found, recipe())
    packed = batches(trainer, swap, sequences, states=True)
    assert max(len(batch.taught) for batch in packed) == 2
    states = [teacher for batch in packed for teacher in batch.taught]
    assert sum(s.hidden.shape[0] for s in states) == sum(b.num_trained() for b in packed)
    result = trainer.train_step(
        packed,
        distill_objective(kind),
        temperature=TEMPERATURE,
        measure=functools.partial(
            distill_metrics, domains=[s.domain for s in sequences], divergence=kind
        ),
    )
    assert result.loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    norm = torch.sqrt(sum(g.double().square().sum() for g in wanted)).item()  # type: ignore[arg-type]
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for mine, plain in zip(gradients(trainer), wanted, strict=True):
        assert (mine - plain).norm() <= 1e-5 * norm
    for domain, rows in by_domain.items():
        mean = float(torch.cat(rows).detach().mean())
        assert result.metrics[f"{kind}/{domain}"] == pytest.approx(mean, rel=1e-4, abs=1e-6)
    assert result.metrics["mismatch_mean"] > 0, "the rollouts' log-probabilities were shifted"


@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_steps_lower_the_divergence(trainer: Trainer, kind: Divergence) -> None:
    swap = two_teachers(trainer)
    sequences = student_sequences(groups(trainer), recipe())
    losses = []
    for _ in range(8):
        packed = batches(trainer, swap, sequences, states=True)
        losses.append(
            trainer.train_step(packed, distill_objective(kind), temperature=TEMPERATURE).loss
        )
    assert losses[-1] < 0.5 * losses[0]
    assert losses[-1] > 0


def test_a_batch_without_a_trained_row_has_gradients_of_zero() -> None:
    """The pipeline's backward and the gradient buffers' hooks expect both."""
    hidden = torch.randn(5, 3, requires_grad=True)
    head = torch.randn(7, 3, requires_grad=True)
    objective = Distillation(torch.zeros(5), "reverse_kl", ())
    out = objective.loss(hidden, head, torch.zeros(5, dtype=torch.int64), temperature=1.0)
    out.loss.backward()
    assert out.loss.item() == 0
    assert out.metrics == {"tokens": 0, "divergence": 0, "logprob": 0}
    for leaf in (hidden, head):
        assert leaf.grad is not None
        assert not leaf.grad.any()


def test_metrics_are_those_of_each_domain(trainer: Trainer) -> None:
    swap = two_teachers(trainer)
    found = groups(trainer)
    expected = {}
    for group in found:
        gaps, gates = [], []
        for r in group.rollouts:
            with torch.no_grad():
                own = plain_logprobs(trainer, sequence_of(r).tokens)
                with swap.using(group.task.prompt.domain):
                    teacher = plain_logprobs(trainer, sequence_of(r).tokens)
            ratio = torch.exp(own - sequence_of(r).logprob[1:])
            gaps.append((own - teacher)[sequence_of(r).written[1:]])
            gates.append(((ratio < LOW) | (ratio > HIGH))[sequence_of(r).written[1:]])
        expected[f"reverse_kl/{group.task.prompt.domain}"] = float(torch.cat(gaps).mean())
        expected[f"gated/{group.task.prompt.domain}"] = float(torch.cat(gates).float().mean())
    sequences = student_sequences(found, recipe())
    result = trainer.train_step(
        batches(trainer, swap, sequences),
        mopd_objective(LOW, HIGH),
        temperature=TEMPERATURE,
        measure=measure(sequences),
    )
    for name, value in expected.items():
        assert result.metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert 0 < result.metrics["gated/math"] < 1
    assert result.metrics["advantage/code"] == -result.metrics["reverse_kl/code"]


@pytest.mark.parametrize(("dp", "tp"), [(16, 8), (128, 8), (16, 1), (128, 2)])
def test_packs_of_all_teachers_are_full(dp: int, tp: int) -> None:
    """128 x 4 responses of at most 98,304 tokens, median 15,000, over the paper's 52 steps."""
    settings = MopdRecipe(parallel=ParallelConfig(tp=tp))
    grain = capacity_grain(settings.capacity, settings.parallel)
    tokens = rows = 0
    for step in range(settings.steps):
        drawn = np.random.default_rng(step).lognormal(np.log(15_000), 1.0, 512)
        lengths = [int(n) + 300 for n in np.minimum(drawn, settings.rollout.max_response_tokens)]
        capacity = fit_capacity(lengths, settings.capacity, ranks=dp, grain=grain)
        assert capacity <= settings.capacity
        assert capacity % tp == 0
        layout = lay_out(lengths, capacity, ranks=dp)
        assert len(layout[0]) == len(lay_out(lengths, settings.capacity, ranks=dp)[0])
        tokens += sum(lengths)
        rows += capacity * dp * len(layout[0])
    assert tokens / rows >= 0.9


def test_a_truncated_rollout_leaves_under_the_filter(trainer: Trainer) -> None:
    found = groups(trainer)
    assert len(student_sequences(found, recipe(overlong_filter=True))) == 2


@pytest.mark.parametrize("keep", ["host", "disk"])
def test_a_hundred_turns_of_three_teachers_leave_no_trace(
    trainer: Trainer, tmp_path: Path, keep: str
) -> None:
    """Weights and optimizer bit for bit, memory flat."""
    swap = WeightSwap(trainer.world, trainer.chunks, tmp_path / "t" if keep == "disk" else None)
    for name in ("a", "b", "c"):
        swap.keep(name)
        trainer.train_step([sft_batch()])
    before = [t.detach().clone() for t in live_tensors(trainer.chunks)]
    state = _optimizer_bits(trainer)
    probe = sft_batch()
    memory = 0.0
    one = sum(t.numel() * t.element_size() for t in before)
    for turn in range(100):
        with swap.away() as place:
            for name in ("a", "b", "c"):
                place(name)
                swap.prefetch("b" if name == "a" else "c")
        if turn == 20:
            memory = _resident()
    assert all(torch.equal(a, b) for a, b in zip(before, live_tensors(trainer.chunks), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(state, _optimizer_bits(trainer), strict=True))
    # The student's own, and the teachers; or the one teacher that is prefetched.
    assert swap.num_bytes == 4 * one if keep == "host" else swap.num_bytes <= 2 * one
    assert _resident() - memory < 16, "MiB"
    trainer.train_step([probe])
    if keep == "disk":
        assert len(list((tmp_path / "t").iterdir())) == 3
    swap.close()
    assert not (tmp_path / "t").exists()


def _optimizer_bits(trainer: Trainer) -> list[Tensor]:
    """Moments and fp32 copies of the weights."""
    found: list[Tensor] = []
    for part in getattr(trainer.optimizer.inner, "chained_optimizers", [trainer.optimizer.inner]):
        adam = part.optimizer
        for group in adam.param_groups:
            for weight in group["params"]:
                moments = [v for v in adam.state[weight].values() if isinstance(v, Tensor)]
                found += [t.detach().clone() for t in (weight, *moments)]
    assert len(found) > 20
    return found


def _resident() -> float:
    """Most memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def artifact(
    trainer: Trainer, folder: Path, tokenizer: str = "one", template: str = "chat"
) -> Artifact:
    file = folder.with_suffix(".json")
    file.write_text(json.dumps({"tokenizer": tokenizer}))
    provenance = Provenance("x", 0, {}, {}, {})
    return write_artifact(
        folder, trainer.world, trainer.chunks, provenance, tokenizer=file, template=template
    )


def test_a_teacher_that_does_not_fit_is_rejected(
    world: World, trainer: Trainer, tmp_path: Path
) -> None:
    """Both faults at once, by name, before anything starts."""
    artifact(trainer, tmp_path / "student")
    artifact(trainer, tmp_path / "words", tokenizer="two")
    artifact(trainer, tmp_path / "chat", template="another")
    wide = Trainer(
        world,
        replace(trainer.config.shape, expert_width=64),
        engine=ENGINE,
        moe=trainer.config.moe_training,
        optimizer=trainer.optimizer.settings,
        accelerators=Accelerators(),
        seed=1,
        run_dir=tmp_path,
    )
    artifact(wide, tmp_path / "wide")
    settings = MopdRecipe(
        init_from=str(tmp_path / "student"),
        domains=tuple(
            DomainConfig(domain=d) for d in ("math", "code", "multiple_choice", "preference")
        ),
        teachers=(
            TeacherConfig("preference", str(tmp_path / "chat")),
            TeacherConfig("math", str(tmp_path / "words")),
            TeacherConfig("code", str(tmp_path / "wide")),
            TeacherConfig("multiple_choice", str(tmp_path / "student")),
        ),
    )
    with pytest.raises(RecipeError) as caught:
        open_teachers(settings)
    text = str(caught.value)
    assert "math is taught by" in text
    assert "tokenizer is not the student's" in text
    assert re.search("preference is taught by .*chat template is not the student's", text)
    assert "expert_width 64 is not 128" in text
    assert "multiple_choice" not in text


def test_settings_that_cannot_run_are_named() -> None:
    settings = MopdRecipe(
        domains=(DomainConfig(domain="math"), DomainConfig(domain="code")),
        teachers=(TeacherConfig("math", ""), TeacherConfig("office", "x")),
        rollout=RolloutConfig(max_prompt_tokens=8, max_response_tokens=8),
        mopd=MopdConfig(divergence="forward_kl", ratio_low=3.0),
    )
    text = "\n".join(settings.problems(1))
    for part in (
        "math has no artifact",
        "code 0 times",
        "office is not a domain",
        "ratio_low(3.0)",
        "which mopd.divergence(forward_kl) does not have",
        "dynamic_filtering",
        "init_from is empty",
    ):
        assert part in text
