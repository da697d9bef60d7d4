"""Packs cut over context-parallel ranks: gradients of one process, and isolated documents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks

CAPACITY = 192
# Segments of 48 rows on two ranks, and of 24 on four.
PACKS: dict[str, tuple[int, ...]] = {
    "one document": (192,),
    "across borders": (37, 100, 5, 33, 9),
    "one-token documents": (23, 1, 1, 1, 46, 1, 95, 1, 1, 1),
    "borders on documents": (48, 48, 96),
    "mostly padding": (60,),
}
OBJECTIVES = ("nll", "grpo", "mopd")
LAYOUTS = {"CP2": (2, {"cp": 2}), "CP4": (4, {"cp": 4}), "CP2, recompute": (2, {"cp": 2})}
TOLERANCE = 1e-5


def make_batch(lengths: tuple[int, ...], poisoned: int | None = None) -> Any:
    """A whole pack with random constants of every objective.

    poisoned: the document whose first token is the last of the vocabulary, which no other has.
    """
    from dataclasses import replace

    import torch

    from nemocascade.types import Document, pack_documents

    generator = torch.Generator().manual_seed(sum(lengths) + len(lengths))
    documents = []
    for number, n in enumerate(lengths):
        tokens = torch.randint(0, 95, (n,), generator=generator, dtype=torch.int32)
        if number == poisoned:
            tokens[0] = 95
        documents.append(Document(tokens, torch.rand(n, generator=generator) < 0.7, "test"))

    def draw() -> torch.Tensor:
        return torch.randn(CAPACITY, generator=generator)

    return replace(
        pack_documents(documents, CAPACITY),
        advantage=draw(),
        ref_logprob=draw() - 4.5,
        rollout_logprob=-4.5 + draw() / 10,
        teacher_logprob=draw() - 4.5,
    )


def make_trainer(parallel: dict[str, Any], recompute: bool) -> Any:
    from helpers.checkpoint_jobs import small_model

    from nemocascade.megatron.config import Accelerators
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import (
        EngineConfig,
        MoeTrainingConfig,
        OptimizerConfig,
        ParallelConfig,
    )
    from nemocascade.train.trainer import Trainer

    engine = EngineConfig(precision="fp32", recompute=recompute)
    world = start_world(ParallelConfig(**parallel), engine)
    return Trainer(
        world,
        small_model("relu2", pattern="M*EM-*E", rope=True),
        engine=engine,
        moe=MoeTrainingConfig(load_balance="sequence", load_balance_coef=0.1, z_loss_coef=1e-2),
        # Every gradient is whole on every rank, and nothing moves.
        optimizer=OptimizerConfig(lr=0.0, min_lr=0.0, clip_grad=0.0, distributed=False),
        accelerators=Accelerators(),
        seed=3,
        run_dir=Path("/nonexistent"),
    )


def gradients_of_packs(
    folder: str, parallel: dict[str, int], recompute: bool = False
) -> dict[str, Any]:
    """A step on each pack. One process writes its values; others return how far theirs are off."""
    import torch
    from helpers.policy import gradients

    from nemocascade.recipe import GrpoConfig
    from nemocascade.train.evaluation import whole_rows
    from nemocascade.train.objectives import grpo_objective, mopd_objective, nll_objective

    trainer = make_trainer(parallel, recompute)
    world = trainer.world
    objectives: Any = {
        "nll": nll_objective,
        "grpo": grpo_objective(GrpoConfig(kl_coef=0.1)),
        "mopd": mopd_objective(0.5, 2.0),
    }
    errors: dict[str, Any] = {}
    for name, lengths in PACKS.items():
        for kind in OBJECTIVES if name == "across borders" else OBJECTIVES[:1]:
            batch = make_batch(lengths).shard(world.cp_rank, world.parallel.cp)
            batch.validate()
            kept: dict[str, torch.Tensor] = {}

            def keep(_world: Any, outputs: Any, batches: Any, kept: Any = kept) -> dict[str, float]:
                kept["logprob"] = whole_rows(world, outputs[0].logprob, batches[0])
                return {}

            result = trainer.train_step([batch], objectives[kind], measure=keep)
            names = [n for m in trainer.modules for n, _ in m.named_parameters()]
            kept |= dict(zip(names, gradients(trainer), strict=True))
            kept["loss"] = torch.tensor([result.loss, result.grad_norm])
            kept["expert load"] = result.expert_load
            counts = [result.tokens, result.trained_tokens, result.flops]
            path = Path(folder) / f"{name} {kind}.pt"
            if not parallel:
                torch.save((kept, counts), path)
                continue
            expected, theirs = torch.load(path)
            assert counts == theirs
            assert torch.equal(kept["expert load"], expected["expert load"])
            errors[f"{name}, {kind}"] = {
                key: float((kept[key] - value).abs().max() / value.abs().max().clamp(min=1e-30))
                for key, value in expected.items()
            }
    return errors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_equal_those_of_one_process(layout: str, one: str) -> None:
    ranks, parallel = LAYOUTS[layout]
    settings = {"folder": one, "parallel": parallel, "recompute": "recompute" in layout}
    for errors in run_ranks(gradients_of_packs, ranks, settings):
        assert len(errors) == len(PACKS) + len(OBJECTIVES) - 1
        for name, found in errors.items():
            assert len(found) > 20
            wrong = {key: error for key, error in found.items() if not error <= TOLERANCE}
            assert not wrong, (name, wrong)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("one"))
    run_ranks(gradients_of_packs, 1, {"folder": folder, "parallel": {}})
    return folder


def values_of_rows(trainer: Any, batch: Any) -> tuple[Any, Any]:
    """Log-probabilities [R] and the gradients of the embeddings [R, H]."""
    from nemocascade_kernels import Nll

    from nemocascade.megatron.microbatch import Microbatch

    (model,), kept = trainer.modules, []

    def keep(_module: object, _inputs: object, output: Any) -> None:
        output.retain_grad()
        kept.append(output)

    handle = model.embedding.word_embeddings.register_forward_hook(keep)
    out = model.train()(Microbatch.from_batch(batch, trainer.world.device), Nll(batch.token_weight))
    out.loss.backward()
    handle.remove()
    return out.logprob, kept[0].grad[0]


def poison_each(parallel: dict[str, int]) -> list[list[int]]:
    """For each pack and document: changed values of other documents, and the document's trained
    rows that are not NaN, and all of them."""
    import torch

    trainer = make_trainer(parallel, recompute=False)
    world = trainer.world
    with torch.no_grad():
        trainer.modules[0].embedding.word_embeddings.weight[95] = float("nan")
    found = []
    for lengths in PACKS.values():
        for number in range(len(lengths)):
            whole = make_batch(lengths)
            bounds = whole.cu_seqlens.tolist()
            own = torch.zeros(CAPACITY, dtype=torch.bool)
            own[bounds[number] : bounds[number + 1]] = True
            batches = [
                b.shard(world.cp_rank, world.parallel.cp)
                for b in (whole, make_batch(lengths, number))
            ]
            own = torch.cat([own[s] for s in batches[0].segments])
            before, after = (values_of_rows(trainer, b) for b in batches)
            changed = 0
            for a, b in zip(before, after, strict=True):
                changed += int((a[~own] != b[~own]).sum()) + int(a[~own].isnan().sum())
            trained = own & (batches[0].token_weight != 0)
            found.append([changed, int((~after[0][trained].isnan()).sum()), int(trained.sum())])
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_nan_stays_in_its_document(ranks: int) -> None:
    """Log-probabilities and gradients of all other documents are bit-identical, on every rank."""
    for found in run_ranks(poison_each, ranks, {"parallel": {"cp": ranks}}):
        assert len(found) == sum(len(lengths) for lengths in PACKS.values())
        assert {(changed, finite) for changed, finite, _ in found} == {(0, 0)}
        assert sum(trained for *_, trained in found) > 50
