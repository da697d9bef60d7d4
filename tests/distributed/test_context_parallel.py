"""Packs cut over context-parallel ranks: gradients of one process, and isolated documents."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.packed import check_batch
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
LAYOUTS = {
    "CP2": (2, {"cp": 2}),
    "CP4": (4, {"cp": 4}),
    "CP2, recompute": (2, {"cp": 2}),
    "CP4, recompute, scan": (4, {"cp": 4}),
}
TOLERANCE = 1e-5


def make_batch(lengths: tuple[int, ...], poisoned: int | None = None) -> Any:
    """A whole pack with random constants of every objective.

    poisoned: the document whose first token is the last of the vocabulary, which no other has.
    """
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


def make_trainer(parallel: dict[str, Any], recompute: bool, **model: Any) -> Any:
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
        small_model("relu2", **{"pattern": "M*EM-*E", "rope": True, **model}),
        engine=engine,
        moe=MoeTrainingConfig(load_balance="sequence", load_balance_coef=0.1, z_loss_coef=1e-2),
        # Every gradient is whole on every rank, and nothing moves.
        optimizer=OptimizerConfig(lr=0.0, min_lr=0.0, clip_grad=0.0, distributed=False),
        accelerators=Accelerators(),
        seed=3,
        run_dir=Path("/nonexistent"),
    )


def gradients_of_packs(
    folder: str, parallel: dict[str, int], recompute: bool = False, scan: bool = False
) -> dict[str, Any]:
    """A step on each pack. One process writes its values; others return how far theirs are off."""
    import torch
    from helpers.policy import gradients

    from nemocascade.megatron.layers import border_states
    from nemocascade.recipe import GrpoConfig
    from nemocascade.train.evaluation import whole_rows
    from nemocascade.train.objectives import grpo_objective, mopd_objective, nll_objective

    if scan:
        border_states.MOST_GATHERED = 0
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
            check_batch(batch)
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
    settings["scan"] = "scan" in layout
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
        bounds = make_batch(lengths).cu_seqlens.tolist()
        whole = make_batch(lengths).shard(world.cp_rank, world.parallel.cp)
        before = values_of_rows(trainer, whole)
        for number in range(len(lengths)):
            own = torch.zeros(CAPACITY, dtype=torch.bool)
            own[bounds[number] : bounds[number + 1]] = True
            own = torch.cat([own[s] for s in whole.segments])
            poisoned = make_batch(lengths, number).shard(world.cp_rank, world.parallel.cp)
            after = values_of_rows(trainer, poisoned)
            changed = 0
            for a, b in zip(before, after, strict=True):
                changed += int((a[~own] != b[~own]).sum()) + int(a[~own].isnan().sum())
            trained = own & (whole.token_weight != 0)
            found.append([changed, int((~after[0][trained].isnan()).sum()), int(trained.sum())])
    return found


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_nan_stays_in_its_document(ranks: int) -> None:
    """Log-probabilities and gradients of all other documents are bit-identical, on every rank."""
    for found in run_ranks(poison_each, ranks, {"parallel": {"cp": ranks}}):
        assert len(found) == sum(len(lengths) for lengths in PACKS.values())
        assert {(changed, finite) for changed, finite, _ in found} == {(0, 0)}
        assert sum(trained for *_, trained in found) > 50


def states_of_both_forms() -> dict[str, list[float]]:
    """For each pack, the largest relative differences between scan and gather of border states.

    These are states that enter, and gradients of those that leave. NaNs are in states that nobody
    reads.
    """
    import torch

    from nemocascade.megatron.context import ContextShard
    from nemocascade.megatron.layers.border_states import _gathered, _scanned
    from nemocascade.megatron.microbatch import Microbatch
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, ParallelConfig

    world = start_world(ParallelConfig(cp=4), EngineConfig(precision="fp32"))
    generator = torch.Generator().manual_seed(world.cp_rank)
    errors: dict[str, list[float]] = {}
    for name, lengths in PACKS.items():
        packed = Microbatch.from_batch(make_batch(lengths).shard(world.cp_rank, 4), world.device)
        shard = packed.shard
        assert isinstance(shard, ContextShard)
        left = torch.randn(2, 3, 5, generator=generator)
        left[:, :, -1].sigmoid_()
        for part, own in zip(shard.parts, left, strict=True):
            if not part.continues:
                own.fill_(float("nan"))
        found = []
        for form in (_gathered, _scanned):
            leaf = left.clone().requires_grad_()
            states, last = form(leaf, packed, shard, world.groups.cp)
            weights = torch.arange(12.0).view(3, 4)
            total = sum((s * weights).sum() for s in states) + last.sum() * 0
            total.backward()
            found.append([*states, leaf.grad])
        errors[name] = [
            float((a - b).abs().max() / a.abs().max().clamp(min=1e-30))
            for a, b in zip(*found, strict=True)
        ]
    return errors


def test_scanned_border_states_equal_gathered_ones() -> None:
    results = run_ranks(states_of_both_forms, 4)
    assert [len(r["one document"]) for r in results] == [2, 3, 3, 3]
    for errors in results:
        for name, found in errors.items():
            assert all(error <= 1e-6 for error in found), (name, found)


def rounding_of_key_gradients() -> float:
    """The largest error of gradients of bf16 keys, of the exact sums in float64, in units of the
    last place."""
    import torch

    from nemocascade.megatron.context import ContextShard, gather_keys
    from nemocascade.megatron.world import start_world
    from nemocascade.recipe import EngineConfig, ParallelConfig

    world = start_world(ParallelConfig(cp=4), EngineConfig(precision="bf16"))
    whole = make_batch(PACKS["one document"])
    exact = torch.zeros(CAPACITY, 2, 8, dtype=torch.float64)
    for rank in range(4):
        generator = torch.Generator().manual_seed(rank)
        shard = ContextShard(whole.shard(rank, 4), world.device)
        drawn = []
        for keys in shard.keys:
            size = keys.rows.stop - keys.rows.start
            drawn.append(torch.randn(size, 2, 8, generator=generator).bfloat16())
            exact[keys.rows] += drawn[-1].double()
        if rank == world.cp_rank:
            own, weights = shard, drawn
    k = torch.randn(CAPACITY // 4, 2, 8).bfloat16().requires_grad_()
    gathered = gather_keys(k, k.detach(), own, world.groups.cp)
    sum((pair[0] * w).sum() for pair, w in zip(gathered, weights, strict=True)).backward()  # type: ignore[union-attr]
    expected = torch.cat([exact[s] for s in whole.shard(world.cp_rank, 4).segments])
    assert k.grad is not None
    place = torch.frexp(expected)[1].double().sub(8).exp2()
    return float(((k.grad - expected).abs() / place).max())


def test_gradients_of_bf16_keys_round_once() -> None:
    """Sums of 8 gradients are made in float32."""
    assert max(run_ranks(rounding_of_key_gradients, 4)) <= 0.5001


def test_more_than_16_ranks_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    from nemocascade.megatron.layers import border_states

    for form in ("gathered", "scanned"):
        monkeypatch.setattr(border_states, f"_{form}", lambda *_, form=form: ([], form))
    chosen = {
        size: border_states.entering_states(Any, Any, SimpleNamespace(size=size), Any)[1]  # type: ignore[arg-type]
        for size in (2, 16, 17, 64)
    }
    assert chosen == {2: "gathered", 16: "gathered", 17: "scanned", 64: "scanned"}


def test_a_scan_over_32_ranks_takes_7_rounds() -> None:
    """One document of 64 segments: each rank moves at most 2 states a round, to those that expect
    them. Documents of 3 segments take 2 rounds."""
    import torch

    from nemocascade.megatron.context import ContextShard
    from nemocascade.megatron.layers.border_states import _rounds

    rows = 64 * 8
    for length, count in ((rows, 7), (24, 2)):
        starts = torch.arange(0, rows, length)
        batch = replace(
            make_batch((CAPACITY,)),
            tokens=torch.zeros(rows, dtype=torch.int64),
            cu_seqlens=torch.cat([starts, torch.tensor([rows])]).int(),
            num_tokens=rows,
        )
        shards = [
            replace(batch, tokens=batch.tokens[:16], cp_rank=r, cp_size=32) for r in range(32)
        ]
        schedules = [_rounds(ContextShard(b, torch.device("cpu"))) for b in shards]
        assert {len(s) for s in schedules} == {count}
        for rounds in zip(*schedules, strict=True):
            assert max(sum(one.sent) for one in rounds) <= 2
            sent = torch.tensor([one.sent for one in rounds])
            assert torch.equal(sent.T, torch.tensor([one.received for one in rounds]))
            assert int(sent.sum()) > 0


MILLION = 1_048_576
# Segments of 131,072 rows on four ranks: the long document crosses two borders.
MILLION_LENGTHS = (100_000, 170_000, *[4_096] * 180, 31_000, 5_000)


def step_of_a_million_tokens() -> dict[str, float]:
    """A step on one pack: the error of its last document's log-probabilities, against those it has
    alone, and bytes of the process."""
    import resource

    import torch
    from nemocascade_kernels import Nll

    from nemocascade.megatron.microbatch import Microbatch
    from nemocascade.train.evaluation import whole_rows
    from nemocascade.train.objectives import nll_objective
    from nemocascade.types import Document, pack_documents

    trainer = make_trainer({"cp": 4}, True, pattern="M*E", num_heads=2, num_kv_heads=1)
    world, generator = trainer.world, torch.Generator().manual_seed(1)
    documents = []
    for n in MILLION_LENGTHS:
        tokens = torch.randint(0, 95, (n,), generator=generator, dtype=torch.int32)
        documents.append(Document(tokens, torch.ones(n, dtype=torch.bool), "test"))
    batch = pack_documents(documents, MILLION)
    kept: list[torch.Tensor] = []

    def keep(_world: Any, outputs: Any, batches: Any) -> dict[str, float]:
        kept.append(whole_rows(world, outputs[0].logprob, batches[0]))
        return {}

    alone = pack_documents(documents[-1:], MILLION_LENGTHS[-1])
    with torch.no_grad():
        (model,), batches = trainer.modules, Microbatch.from_batch(alone, world.device)
        expected = model(batches, Nll(alone.token_weight)).logprob
    own = batch.shard(world.cp_rank, world.parallel.cp)
    result = trainer.train_step([own], nll_objective, measure=keep)
    end = sum(MILLION_LENGTHS)
    found = kept[0][end - MILLION_LENGTHS[-1] : end]
    trained = alone.token_weight != 0
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "tokens": result.tokens,
        "error": float((found - expected)[trained].abs().max()),
        "peak_bytes": 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "cpu_s": sum(resource.getrusage(resource.RUSAGE_SELF)[:2]),
    }


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_pack_of_a_million_tokens_trains() -> None:
    """A step takes eight minutes of a processor's time in all, and 1.5 GB a rank."""
    for found in run_ranks(step_of_a_million_tokens, 4, timeout_s=2900):
        assert found["tokens"] == sum(MILLION_LENGTHS)
        assert found["loss"] == pytest.approx(4.56, rel=0.02)
        assert 0 < found["grad_norm"] < 10
        assert found["error"] < 1e-5
        assert found["peak_bytes"] < 2e9
