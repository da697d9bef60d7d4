"""Cases of the dry run: a training step or a rollout of one rank, at a layout.

A case returns the counts of a steady state. A training case runs a first step, one of one
micro-batch, and one of two, if `Case.steps` says nothing else; the difference is what a micro-batch
costs. A rollout case differs in the same way by one decode step.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_dry import device as dry
from gpu_dry import kernel_calls, played, triton_driver
from torch.testing._internal.distributed.fake_pg import FakeStore

from nemocascade.megatron import model as model_module
from nemocascade.megatron.config import Accelerators
from nemocascade.megatron.generation.cached_layers import AttentionSlotLayer, MambaSlotLayer
from nemocascade.megatron.generation.layers import DecodeStep, MlpSlotLayer, MoeSlotLayer
from nemocascade.megatron.user_buffers import user_buffers
from nemocascade.megatron.world import start_world
from nemocascade.recipe import (
    EngineConfig,
    GrpoConfig,
    LoraConfig,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
)
from nemocascade.rollout.engine import Request, Sampling
from nemocascade.rollout.live import LiveEngine
from nemocascade.runtime.world import World
from nemocascade.train import trainer as trainer_module
from nemocascade.train.evaluation import last_states, policy_metrics, token_logprobs
from nemocascade.train.objectives import (
    distill_objective,
    grpo_objective,
    mopd_objective,
    nll_objective,
)
from nemocascade.train.trainer import Trainer
from nemocascade.types import Document, PackedBatch, TeacherStates, pack_documents

Counts = Counter[tuple[str, str, dry.Place]]

NANO_TOKENS = 262_144
"""Capacity of a packed sequence of the 30B recipes."""


@dataclass(frozen=True)
class Case:
    """One run of the dry run.

    stage: sft, grpo, mopd, distill (mopd with an exact divergence), rollout, or kernels, which runs
    no model. rank, world: of the rank that
    is played. tokens: capacity of a micro-batch; of a prompt for a rollout. requests: texts of a
    rollout in 8 slots; more of them need steps of several sizes. strings: the rollout has stop
    strings. steps: micro-batches of each step of a training case; the optimizer has its state from
    the second step on. lora: adapters, which are trained alone if they have a rank. architecture:
    that of the device, for kernels. quick: part of the quick tests. packages: optional packages
    that can be imported, as stand-ins.
    """

    name: str
    stage: str
    model: ModelConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    world: int = 1
    rank: int = 0
    tokens: int = 512
    engine: EngineConfig = field(default_factory=EngineConfig)
    accelerators: Accelerators = field(default_factory=Accelerators)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    requests: int = 8
    strings: bool = False
    steps: tuple[int, ...] = (1, 1, 2)
    architecture: int = 90
    quick: bool = False
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """Result of a case.

    parts: counts by part of the run. live: bytes between two steps, or before the first prompt.
    peak: bytes at most. at_peak: number of live storages then, by place and bytes. kernels:
    entries of `nemocascade_kernels.compile`. graphs: bytes of the pools of CUDA graphs, at most.
    layers: kernels and collectives of each layer in a captured decode step, by name.
    """

    parts: dict[str, Counts]
    live: int
    peak: int
    faults: list[str]
    at_peak: Counter[tuple[dry.Place, int]]
    kernels: list[dict[str, Any]] = field(default_factory=list)
    graphs: int = 0
    layers: dict[str, Counter[str]] = field(default_factory=dict)


def run_case(case: Case, *, explain: bool = False) -> Outcome:
    """Play a case in this process, which is spent afterwards. explain: fill `at_peak`."""
    dry.MEMORY.explain = explain
    if case.stage == "kernels":
        return _kernels(case)
    axes: dict[str, str] = {}
    with played.dry_run(lambda name: axes.get(name, name)):
        triton_driver.install()
        world = _join(case)
        axes.update(_axes(world))
        with tempfile.TemporaryDirectory() as folder, _buffers(case, world):
            trainer = _trainer(case, world, Path(folder))
            run = _rollout if case.stage == "rollout" else _training
            return run(case, world, trainer)


def _kernels(case: Case) -> Outcome:
    """Call every public kernel on `case.architecture`; a call that waits for the device fails."""
    dry.PROPERTIES.major, dry.PROPERTIES.minor = divmod(case.architecture, 10)
    with played.dry_run() as mode:
        triton_driver.install()
        mode.strict = True
        for op, label, call in kernel_calls.calls():
            triton_driver.CALL[:] = [op, label]
            call()
        return Outcome({}, 0, 0, dry.RECORD.faults, Counter(), triton_driver.listed())


def _join(case: Case) -> World:
    """Rank `case.rank` of a world whose collectives do nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=case.rank, world_size=case.world)
    new_group = dist.new_group

    def fake_group(ranks: Any = None, *_args: Any, **_kwargs: Any) -> Any:
        return new_group(ranks, backend="fake")

    for module in (dist, dist.distributed_c10d):
        module.new_group = fake_group  # type: ignore[attr-defined]
    return start_world(case.parallel, case.engine)


def _axes(world: World) -> dict[str, str]:
    """The shortest name among those of each process group, such as `tp` or `expt_dp`."""
    found: dict[str, str] = {}
    for f in fields(world.groups):  # type: ignore[arg-type]
        group = getattr(world.groups, f.name, None)
        for one in group if isinstance(group, list) else [group]:
            if isinstance(one, dist.ProcessGroup):
                name = found.get(one.group_name, f.name)
                found[one.group_name] = min(name, f.name, key=len)
    return found


def _buffers(case: Case, world: World) -> contextlib.AbstractContextManager[None]:
    """User buffers for the linears that overlap with their communication, as in a stage."""
    if not case.accelerators.te_overlap:
        return contextlib.nullcontext()
    return user_buffers(world, case.model.hidden_size, case.tokens // case.parallel.cp)


def _trainer(case: Case, world: World, folder: Path) -> Trainer:
    build = model_module.build_model

    def on_device(*args: Any) -> Any:
        """Build without values, which a fake device would drop."""
        with torch.device("meta"):
            chunks = build(*args)
        return [played.to_device(chunk) for chunk in chunks]

    monkey: Any = trainer_module
    monkey.build_model = on_device
    return Trainer(
        world,
        case.model,
        engine=case.engine,
        moe=MoeTrainingConfig(),
        optimizer=case.optimizer,
        accelerators=case.accelerators,
        seed=0,
        run_dir=folder,
        lora=case.lora,
    )


def batch_of(case: Case) -> PackedBatch:
    """Three documents and padding, a third of the tokens a prompt."""
    lengths = (case.tokens // 2, case.tokens // 4, case.tokens // 8)
    generator = torch.Generator().manual_seed(0)
    documents = [
        Document(
            torch.randint(0, 100, (n,), dtype=torch.int32, generator=generator),
            torch.arange(n) >= n // 3,
            "dry run",
        )
        for n in lengths
    ]
    batch = pack_documents(documents, case.tokens)
    row = torch.zeros(case.tokens)
    if case.stage == "grpo":
        return replace(batch, advantage=row, ref_logprob=row, rollout_logprob=row)
    if case.stage == "mopd":
        return replace(batch, teacher_logprob=row, rollout_logprob=row)
    return batch


OBJECTIVES: dict[str, Callable[[], Any]] = {
    "sft": lambda: nll_objective,
    "grpo": lambda: grpo_objective(GrpoConfig(kl_coef=0.01)),
    "mopd": lambda: mopd_objective(0.5, 2.0),
    "distill": lambda: distill_objective("reverse_kl"),
}


def _taught(batch: PackedBatch, world: World, trainer: Trainer) -> PackedBatch:
    """The batch with the states of one teacher on the host, and its head on the device."""
    if not world.is_last_stage:
        return batch
    rows = batch.token_weight.nonzero()[:, 0]
    config = trainer.config
    states = torch.zeros(rows.numel(), config.hidden_size, dtype=config.params_dtype)
    head = trainer.modules[-1].lm_head().detach().clone()
    return replace(
        batch,
        rollout_logprob=torch.zeros(batch.tokens.numel()),
        taught=(TeacherStates(rows, states, head),),
    )


def _training(case: Case, world: World, trainer: Trainer) -> Outcome:
    dry.Host.integer = _rows_of_owner(case)
    objective = OBJECTIVES[case.stage]()
    batch = batch_of(case).shard(world.cp_rank, case.parallel.cp)
    if case.stage == "distill":
        batch = _taught(batch, world, trainer)
    measure = None if case.stage == "sft" else policy_metrics
    taken = []
    for count in case.steps:
        live = dry.MEMORY.live
        dry.RECORD.taken()
        dry.MEMORY.reset_peak()
        trainer.train_step([batch] * count, objective, measure=measure)
        taken.append(dry.RECORD.taken())
        # Outputs of the last step are still referred to by cycles.
        gc.collect()
    parts = {"step": taken[-1]}
    if len(taken) > 2:
        parts["step"], parts["micro-batch"] = _difference(*taken[-2:])
    peak, at_peak = dry.MEMORY.peak, dry.MEMORY.at_peak()
    if case.stage == "distill":
        last_states(world, trainer.config, trainer.chunks, [batch])
        parts["scoring"] = dry.RECORD.taken()
    elif case.stage != "sft":
        token_logprobs(world, trainer.config, trainer.chunks, [batch])
        parts["scoring"] = dry.RECORD.taken()
    return Outcome(parts, live, peak, dry.RECORD.faults, at_peak)


def _rollout(case: Case, world: World, trainer: Trainer) -> Outcome:
    dry.Host.integer = 1
    _name_layers()
    engine = LiveEngine(world, trainer.modules, slots=8, decode=lambda ids: "x")
    taken, live = [], dry.MEMORY.live
    for length in (4, 4, 5):
        dry.RECORD.taken()
        requests = [Request(i, tuple(range(2, 2 + case.tokens))) for i in range(case.requests)]
        sampling = Sampling(
            max_tokens=length,
            stop_tokens=((0,),),
            stop_strings=("</tool>",) if case.strings else (),
        )
        done = list(engine.run(requests, sampling))
        assert len(done) == len(requests)
        taken.append(dry.RECORD.taken())
    if case.requests > engine.limits.slots:
        parts = {"rollout": taken[1]}
    else:
        prompts, step = _difference(taken[1], taken[2])
        decode = Counter({key: count * (4 - 1) for key, count in step.items()})
        parts = {"prefill": prompts - decode + step, "decode step": step}
    parts["graph"], layers = Counter(), defaultdict[str, Counter[str]](Counter)
    for (layer, kind, name, where), count in dry.RECORD.captured.items():
        parts["graph"][kind, name, where] += count
        layers[layer][name] += count
    layers.pop("", None)
    memory = dry.MEMORY
    return Outcome(
        parts,
        live,
        memory.peak,
        dry.RECORD.faults,
        memory.at_peak(),
        graphs=memory.graphs,
        layers=dict(layers),
    )


def _name_layers() -> None:
    """Let the record know which layer's step runs."""
    for kind in (MambaSlotLayer, AttentionSlotLayer, MoeSlotLayer, MlpSlotLayer):
        _name_steps(kind)


def _name_steps(kind: Any) -> None:
    step = kind.step

    def named(layer: Any, hidden: torch.Tensor, rows: DecodeStep) -> torch.Tensor:
        dry.RECORD.layer = f"layer {layer.block.layer_number}, {kind.__name__}"
        out: torch.Tensor = step(layer, hidden, rows)
        dry.RECORD.layer = ""
        return out

    kind.step = named


def _rows_of_owner(case: Case) -> int:
    """Rows that every rank sends to every owner of experts: their counts are read by the host."""
    p = case.parallel
    if p.ep == 1:
        return 1
    return case.tokens // p.cp // p.tp * case.model.experts_per_token // p.ep


def _difference(once: Counts, twice: Counts) -> tuple[Counts, Counts]:
    """The counts that do not repeat, and those that do."""
    more = Counter({key: twice[key] - once[key] for key in twice if twice[key] != once[key]})
    rest = Counter({key: once[key] - more[key] for key in once if once[key] != more[key]})
    return rest, more
