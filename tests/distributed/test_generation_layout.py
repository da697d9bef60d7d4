"""Rollouts on a layout of their own: tokens, log-probabilities, weights, and a step on them.

Each case generates, takes an optimizer step on the rollouts, and generates again. One process gives
the expected values.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.ranks import run_ranks

TRAINING: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "EP2": (2, {"ep": 2}),
    "TP2 EP2": (4, {"tp": 2, "ep": 2}),
}
GENERATION: dict[str, dict[str, Any]] = {
    "1": {"tp": 1, "pp": 1, "ep": 1},
    "TP2": {"tp": 2, "pp": 1, "ep": 1},
    "EP2": {"tp": 1, "pp": 1, "ep": 2},
}
# Interleaved and expert-tensor-parallel training, tied embeddings, and pipelined generation.
FURTHER: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "PP2 VPP2 -> 1, tied": ("tied", {"pp": 2, "vpp": 2}, {"pp": 1}),
    "ETP2 -> PP2, tied": ("tied", {"etp": 2}, {"pp": 2}),
    "TP2 -> PP2, swiglu": ("swiglu", {"tp": 2}, {"tp": 1, "pp": 2}),
}
CASES = {
    f"{a} -> {b}": (ranks, "even", training, generation)
    for a, (ranks, training) in TRAINING.items()
    for b, generation in GENERATION.items()
} | {name: (2, *case) for name, case in FURTHER.items()}
SHAPES = ("even", "tied", "swiglu")
TOLERANCE = 1e-5
LOGPROB = 2e-5  # as two layouts of training differ


def model_of(shape: str) -> Any:
    from helpers.rollout import EVEN, QWEN3

    return {
        "even": EVEN,
        "tied": replace(EVEN, tie_embeddings=True),
        "swiglu": replace(EVEN, pattern="*E*E", **QWEN3),
    }[shape]


def run_case(
    shape: str, training: dict[str, Any], generation: dict[str, Any], folder: str, *, offload: bool
) -> dict[str, Any]:
    """Two rounds of rollouts with a step between them, and what is wrong with the copies."""
    import torch
    from helpers.rollout import draw_tokens

    from nemocascade.megatron.config import Accelerators
    from nemocascade.megatron.replica import Replica, TrainingMemory
    from nemocascade.megatron.world import generation_world, shares_weights, start_world
    from nemocascade.recipe import (
        EngineConfig,
        MoeTrainingConfig,
        OptimizerConfig,
        ParallelConfig,
        RolloutParallelConfig,
    )
    from nemocascade.rollout.engine import Request, Sampling
    from nemocascade.rollout.live import LiveEngine
    from nemocascade.train.trainer import Trainer

    model, engine_config = model_of(shape), EngineConfig(precision="fp32")
    parallel = ParallelConfig(**training)
    world = start_world(parallel, engine_config)
    layout = RolloutParallelConfig(**generation).layout(parallel)
    rollout_world = generation_world(world, layout, engine_config)
    trainer = Trainer(
        world,
        model,
        engine=engine_config,
        moe=MoeTrainingConfig(load_balance="none"),
        # Large enough that rounding of a gradient does not turn a step around.
        optimizer=OptimizerConfig(lr=1e-2, eps=1e-2, warmup_steps=0, schedule="constant"),
        accelerators=Accelerators(),
        seed=1,
        run_dir=Path(folder),
    )
    with torch.no_grad():
        for chunk in trainer.modules:
            for name, value in chunk.named_parameters():
                if value.dim() > 1 and "conv1d" not in name:
                    value.mul_(4.0)
    replica = None
    if not shares_weights(world, rollout_world):
        replica = Replica(
            world,
            trainer.modules,
            rollout_world,
            model,
            engine_config,
            Accelerators(),
            # Some tensors need several buckets, others share one.
            bucket_bytes=20_000 if offload else 1 << 28,
        )
    memory = TrainingMemory(trainer.chunks, trainer.optimizer, world.device)
    engine = LiveEngine(
        rollout_world,
        trainer.modules if replica is None else replica.chunks,
        slots=4,
        replica=replica,
        training=memory if offload else None,
    )
    requests = [
        Request(3 * p + g, tuple(draw_tokens(model.vocab_size, 4 + 5 * p, seed=p).tolist()))
        for p in range(3)
        for g in range(3)
    ]
    mine = requests[rollout_world.dp_rank :: rollout_world.dp_size]
    found: dict[str, Any] = {"faults": [], "replicas": rollout_world.dp_size}
    faults = found["faults"]
    for round_ in range(2):
        state = [t.clone() for t in trainer.optimizer.state_tensors()]
        done = list(engine.run(mine, Sampling(max_tokens=10, seed=3)))
        if replica is not None:
            faults += copy_faults(world, trainer.modules, rollout_world, replica.chunks)
        if offload and any(t.untyped_storage().nbytes() for t in gradients_of(trainer)):
            faults.append("gradient buffers stay allocated")
        engine.release()
        if engine._model is not None or (replica is not None and held_bytes(replica)):
            faults.append("memory of generation stays allocated")
        restored = trainer.optimizer.state_tensors()
        if len(state) != len(restored) or not all(map(torch.equal, state, restored)):
            faults.append("the optimizer's state has changed")
        texts: dict[int, Any] = {}
        for part in world.all_gather_object(
            {c.request.id: [c.tokens.tolist(), c.logprob.tolist()] for c in done}
        ):
            faults += [
                f"{i} differs on two ranks" for i in part if texts.get(i, part[i]) != part[i]
            ]
            texts |= part
        ordered = [texts[r.id] for r in requests]
        found[f"texts {round_}"] = ordered
        found[f"logprobs {round_}"] = training_logprobs(world, trainer, requests, ordered)
        if round_ == 0:
            of_one = rollouts_of_one(world, Path(folder) / f"{shape}.json", ordered)
            trainer.train_step(batches_of(world, requests, of_one))
            engine.weights_changed()
    found["faults"] += weight_faults(world, trainer.modules, Path(folder) / f"{shape}.safetensors")
    world.close()
    return found


def rollouts_of_one(world: Any, path: Path, ordered: list[Any]) -> list[Any]:
    """The rollouts of one process, which writes them: all layouts train on the same ones."""
    if world.size == 1:
        path.write_text(json.dumps(ordered))
    found: list[Any] = json.loads(path.read_text())
    return found


def gradients_of(trainer: Any) -> list[Any]:
    return [b.grad_data for c in trainer.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]


def held_bytes(replica: Any) -> int:
    return sum(p.untyped_storage().nbytes() for chunk in replica.chunks for p in chunk.parameters())


def sequences_of(requests: Any, texts: Any) -> list[Any]:
    import torch

    from nemocascade.rl.batches import TrainingSequence

    return [
        TrainingSequence(
            torch.tensor(tokens),
            torch.arange(len(tokens)) >= len(request.prompt),
            torch.tensor(logprobs),
            weight=1.0 + request.id % 3,
        )
        for request, (tokens, logprobs) in zip(requests, texts, strict=True)
    ]


def batches_of(world: Any, requests: Any, texts: Any) -> list[Any]:
    """This rank's micro-batches of all rollouts."""
    from nemocascade.rl.batches import lay_out, pack_sequences

    sequences = sequences_of(requests, texts)
    multiple = world.parallel.pp if world.parallel.vpp > 1 else 1
    lengths = [s.tokens.numel() for s in sequences]
    bins = lay_out(lengths, 64, ranks=world.dp_size, multiple=multiple)[world.dp_rank]
    return [pack_sequences([sequences[i] for i in b], 64, 0, list(b)) for b in bins]


def training_logprobs(world: Any, trainer: Any, requests: Any, texts: Any) -> list[list[float]]:
    """Log-probabilities of the generated tokens by the training forward, by request."""
    from nemocascade.rl.batches import pack_sequences
    from nemocascade.train.evaluation import token_logprobs

    found = []
    for sequence in sequences_of(requests, texts):
        batch = pack_sequences([sequence], 64, 0)
        count = world.parallel.pp if world.parallel.vpp > 1 else 1
        rows = token_logprobs(world, trainer.config, trainer.chunks, [batch] * count)[0]
        length, prompt = sequence.tokens.numel(), int((~sequence.written).sum())
        found.append(rows[prompt - 1 : length - 1].tolist())
    return found


def gathered(world: Any, chunks: Any) -> dict[str, Any]:
    """The Hugging Face tensors of a model that this rank assembles."""
    from nemocascade.megatron.convert import LiveTensors

    return {
        spec.name: tensor.clone()
        for bucket in LiveTensors(world, chunks).stream()
        for spec, tensor in bucket
    }


def copy_faults(world: Any, chunks: Any, rollout_world: Any, copies: Any) -> list[str]:
    """Differences of the copies on all ranks from the training weights, bit for bit."""
    import hashlib

    import torch
    import torch.distributed as dist

    def digests(world: Any, chunks: Any) -> dict[str, str]:
        mine = {
            name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
            for name, tensor in gathered(world, chunks).items()
        }
        return functools.reduce(lambda a, b: a | b, world.all_gather_object(mine))

    wanted, found = digests(world, chunks), digests(rollout_world, copies)
    faults = [f"the copy of {name} differs" for name in wanted if wanted[name] != found[name]]
    # A gathered tensor has one source: compare the copies of a shard with each other.
    groups = rollout_world.groups
    for chunk in copies:
        for name, value in chunk.state_dict().items():
            if not isinstance(value, torch.Tensor):
                continue
            group = groups.expt_dp if ".experts." in name else groups.dp
            for reduce in (dist.ReduceOp.MAX, dist.ReduceOp.MIN):
                other = value.clone()
                dist.all_reduce(other, op=reduce, group=group)
                if not torch.equal(other, value):
                    faults.append(f"copies of {name} differ")
        if any(p.requires_grad or p.grad is not None for p in chunk.parameters()):
            faults.append("a copy has gradients")
    return faults


def weight_faults(world: Any, chunks: Any, path: Path) -> list[str]:
    """Weights after the step that differ from those of one process, which writes them."""
    from safetensors.torch import load_file, save_file

    mine = gathered(world, chunks)
    if world.size == 1:
        save_file(mine, path)
        return []
    wanted = load_file(path)
    faults = []
    for name, value in mine.items():
        error = float((value - wanted[name]).abs().max())
        if not error < TOLERANCE:
            faults.append(f"{name} is off by {error} after the step")
    return faults


def expected(folder: str) -> dict[str, Any]:
    """The cases of one process."""
    return {shape: run_case(shape, {}, {}, folder, offload=False) for shape in SHAPES}


def run_cases(cases: dict[str, Any], folder: str) -> dict[str, Any]:
    """The cases of some ranks; every other one offloads training's memory."""
    return {
        name: run_case(shape, training, generation, folder, offload=number % 2 == 0)
        for number, (name, (shape, training, generation)) in enumerate(cases.items())
    }


class Results:
    """Findings of each rank, by case; ranks start when the first of their cases is looked at."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)
        [self.one] = run_ranks(expected, 1, {"folder": self.folder})
        self._found: dict[int, list[Any]] = {}

    def of(self, name: str) -> list[Any]:
        """The findings of each rank."""
        ranks = CASES[name][0]
        if ranks not in self._found:
            cases = {other: case[1:] for other, case in CASES.items() if case[0] == ranks}
            arguments = {"cases": cases, "folder": self.folder}
            self._found[ranks] = run_ranks(run_cases, ranks, arguments, timeout_s=300)
        return [found[name] for found in self._found[ranks]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return Results(tmp_path_factory.mktemp("layouts"))


@pytest.mark.parametrize("name", CASES)
def test_rollouts_on_a_layout_of_their_own(name: str, results: Results) -> None:
    ranks, shape, _, generation = CASES[name]
    one = results.one[shape]
    replicas = ranks // (generation.get("tp", 1) * generation.get("pp", 1))
    for found in results.of(name):
        assert not found["faults"]
        assert found["replicas"] == replicas
        for round_ in range(2):
            pairs = zip(found[f"texts {round_}"], one[f"texts {round_}"], strict=True)
            edges = 0
            for (tokens, logprobs), (wanted, wanted_logprobs) in pairs:
                same = first_difference(tokens, wanted)
                assert largest(logprobs[:same], wanted_logprobs[:same]) < LOGPROB
                if same < len(wanted):
                    edges += 1
                    assert abs(tokens[same] - wanted[same]) == 1
            # A draw between two tokens may fall on either, by the last bits of their probabilities.
            assert edges <= 1
            own = [logprobs[-10:] for _, logprobs in found[f"texts {round_}"]]
            for rollout, trained in zip(own, found[f"logprobs {round_}"], strict=True):
                assert largest(rollout, trained) < TOLERANCE


def test_the_step_changes_the_rollouts(results: Results) -> None:
    """The second round shows nothing if the weights of the first would do."""
    for shape in SHAPES:
        assert results.one[shape]["texts 0"] != results.one[shape]["texts 1"]


def first_difference(found: list[int], wanted: list[int]) -> int:
    assert len(found) == len(wanted)
    unequal = (i for i, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
    return next(unequal, len(wanted))


def largest(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(found, wanted, strict=True))


def copy_on_nodes_of_two_sizes() -> str:
    """Digest of the weights copied from TP2 to every rank, on nodes of 2, 1 and 1 ranks."""
    import hashlib
    import os

    import torch

    from nemocascade.megatron.config import Accelerators, make_config
    from nemocascade.megatron.model import build_model
    from nemocascade.megatron.replica import Replica
    from nemocascade.megatron.world import generation_world, start_world
    from nemocascade.recipe import EngineConfig, MoeTrainingConfig, ParallelConfig

    os.environ["LOCAL_WORLD_SIZE"] = "2" if int(os.environ["RANK"]) < 2 else "1"
    engine, shape = EngineConfig(precision="fp32", timeout_s=60), model_of("even")
    world = start_world(ParallelConfig(tp=2), engine)
    config = make_config(shape, world.parallel, engine, MoeTrainingConfig(), seed=3)
    chunks = build_model(world, config, Accelerators())
    alone = generation_world(world, ParallelConfig(), engine)
    copy = Replica(world, chunks, alone, shape, engine, Accelerators())
    copy.load()
    weights = torch.cat([p.flatten() for chunk in copy.chunks for p in chunk.parameters()])
    assert bool(weights.any())
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()


def test_ranks_agree_on_the_sources_where_a_node_has_fewer_ranks() -> None:
    found = run_ranks(copy_on_nodes_of_two_sizes, 4)
    assert len(set(found)) == 1
