"""Description of a planned job: the recipe's settings, its accelerator, and further memory use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemocascade.megatron.generation.kv_cache import MOST_SLOTS
from nemocascade.megatron.workspace import MixerBackend, planned_mixer, scan_problems
from nemocascade.plan.errors import PlanError
from nemocascade.plan.gpus import Gpu
from nemocascade.plan.parameters import RankCoordinates, StateBytes, state_bytes
from nemocascade.plan.workload import RolloutAssumptions, StepWork, work_of_recipe
from nemocascade.recipe import (
    PRESETS,
    CheckpointConfig,
    EngineConfig,
    LoraConfig,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    PolicyRecipe,
    RolloutParallelConfig,
)


@dataclass(frozen=True)
class RolloutLoad:
    """Rollouts on the training ranks: concurrent sequences over the whole world, and their length.

    slots: of a replica. length: of the longest. prompt: of the longest prompt. live: mean cached
    tokens of a sequence, if fewer, because the KV cache has blocks. chunk: tokens of a
    sequence that are prefilled at a time; 0 = all. parallel: layout of generation. offload:
    gradients and optimizer state are not on the device meanwhile. is_open: memory decides the
    number of slots, and `slots` is its limit. kv_gib, kv_memory_fraction: memory of the caches, see
    `RolloutConfig`.
    """

    sequences: int = 0
    slots: int = 0
    length: int = 0
    prompt: int = 0
    live: float = 0.0
    chunk: int = 0
    parallel: RolloutParallelConfig = field(default_factory=RolloutParallelConfig)
    offload: bool = False
    is_open: bool = False
    kv_gib: float = 0.0
    kv_memory_fraction: float = 0.8


@dataclass(frozen=True)
class Job:
    """A job to plan.

    capacity: tokens of a micro-batch. sequences_per_step: micro-batches over all data-parallel
    ranks. document: length of the documents that fill a micro-batch. imbalance: rows of the
    busiest experts' rank over the mean. teachers: further copies of the weights on each rank's
    device, in the run's precision. margin: share of the device's memory left for fragmentation
    and communication buffers. mixer: backend of Mamba-2 on a GPU. work: a step of rollouts; it has
    as many packs as its sequences need, rounded up for each layout.
    """

    model: ModelConfig
    parallel: ParallelConfig
    engine: EngineConfig
    moe: MoeTrainingConfig
    optimizer: OptimizerConfig
    capacity: int
    sequences_per_step: int
    gpu: Gpu
    world_size: int
    document: int = 0
    imbalance: float = 1.5
    teachers: int = 0
    rollout: RolloutLoad = RolloutLoad()
    margin: float = 0.08
    mixer: MixerBackend = "triton"
    work: StepWork | None = None
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)

    @property
    def on_gpu(self) -> bool:
        return self.gpu.name != "cpu"

    @property
    def document_length(self) -> int:
        """Length of the documents; a pack counts as one document if it is unknown."""
        return min(self.document or self.capacity, self.capacity)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch on one context-parallel rank."""
        return self.capacity // self.parallel.cp

    @property
    def exact_teachers(self) -> int:
        """Teachers of an exact divergence: their LM heads are on the device with the student's."""
        return self.work.teachers if self.work is not None and self.work.exact else 0

    @property
    def replicas(self) -> int:
        """Ranks with the same dense weights: dp x cp. Each generates rollouts of its own."""
        return max(1, self.world_size // (self.parallel.tp * self.parallel.pp))

    @property
    def microbatches(self) -> int:
        """Micro-batches of one data-parallel rank in a step."""
        return self.sequences_per_step // max(1, self.parallel.data_parallel(self.world_size))

    @property
    def round_tokens(self) -> int:
        """Tokens that the micro-batches of all data-parallel ranks hold at a time: steps have whole
        numbers of these."""
        ranks = max(1, self.parallel.data_parallel(self.world_size))
        return self.capacity * ranks * (self.parallel.pp if self.parallel.vpp > 1 else 1)

    def problems(self) -> list[str]:
        """Rules that the layout breaks, each with its remedy."""
        found = self.model.problems() or self.parallel.problems(
            self.model,
            self.world_size,
            capacity=self.capacity,
            sequences_per_step=self.sequences_per_step,
        )
        if not found:
            found = self.engine.layout_problems(self.parallel, self.model)
        if not found and self.rollout.sequences:
            found = self.rollout.parallel.problems(self.parallel, self.model, self.world_size)
        if not found and self.on_gpu and self.mixer == "fla" and "M" in self.model.pattern:
            found = scan_problems(self.model, self.tokens, tp=self.parallel.tp)
        if self.engine.experts == "fp8" and not self.gpu.fp8_experts:
            found.append(
                f"engine.experts(fp8) needs Hopper GPUs, and the job has {self.gpu.name}: set "
                "--engine.experts bf16"
            )
        return found

    def state(self, place: RankCoordinates) -> StateBytes:
        """Parameters, gradients and optimizer state of the rank at `place`."""
        return state_bytes(
            self.model,
            # It depends on dp x cp only, so layouts that divide it differently share the result.
            self.parallel if self.parallel.cp == 1 else replace(self.parallel, cp=1),
            self.world_size,
            place,
            precision=self.engine.precision,
            moe=self.moe,
            optimizer=self.optimizer,
            on_gpu=self.on_gpu,
            gradients_in=self.engine.gradients,
            lora=self.lora,
        )

    def with_layout(
        self, parallel: ParallelConfig, *, recompute: bool, recompute_layers: str = ""
    ) -> Job:
        """The same job on another layout."""
        engine, wanted = self.engine, (recompute, recompute_layers)
        if (engine.recompute, engine.recompute_layers) != wanted:
            engine = replace(engine, recompute=recompute, recompute_layers=recompute_layers)
        if self.work is None:
            return replace(self, parallel=parallel, engine=engine)
        multiple = max(1, parallel.data_parallel(self.world_size))
        multiple *= parallel.pp if parallel.vpp > 1 else 1
        packs = -(-self.work.packs(self.capacity) // multiple) * multiple
        return replace(self, parallel=parallel, engine=engine, sequences_per_step=packs)


def is_scan_problem(problems: list[str]) -> bool:
    """True if `Job.problems` names what fla-core cannot scan, and nothing else is wrong."""
    return bool(problems) and problems[0].startswith("fla-core: ")


def job_of_recipe(
    recipe: Any,
    gpu: Gpu,
    world_size: int,
    *,
    preset: str = "",
    model: ModelConfig | None = None,
    assumed: RolloutAssumptions | None = None,
    **options: Any,
) -> Job:
    """The job that `recipe` describes; options are further fields of Job.

    preset: model preset for a recipe whose start artifact does not exist yet. model: the same, if
    it is known from earlier stages. document: 0 = the length of the recipe's sequences.

    A reinforcement-learning recipe trains packed episodes. It is planned with the packs that its
    sequences need on average, and with the concurrent sequences of its rollout settings. assumed:
    about its rollouts.

    Raises PlanError if the recipe names neither a model nor an artifact that defines one.
    """
    known: dict[str, Any] = {
        name: getattr(recipe, name)
        for name in ("parallel", "engine", "moe", "optimizer", "checkpoint", "lora")
    }
    model = model or _model_of(recipe, preset)
    known |= {"model": model, "gpu": gpu, "world_size": world_size}
    known["mixer"] = planned_mixer(model, recipe.engine)
    if hasattr(recipe, "data"):
        known |= {n: getattr(recipe.data, n) for n in ("capacity", "sequences_per_step")}
    else:
        work = work_of_recipe(recipe, assumed or RolloutAssumptions())
        known |= {"capacity": recipe.capacity, "sequences_per_step": 1, "work": work}
        known["document"] = min(recipe.capacity, int(work.lengths.token_mean(work.prompt)))
        known["rollout"] = _load(recipe, work, world_size)
    if not options.get("document"):
        options.pop("document", None)
    made = Job(**known | options)
    return made.with_layout(
        recipe.parallel,
        recompute=recipe.engine.recompute,
        recompute_layers=recipe.engine.recompute_layers,
    )


def _load(recipe: PolicyRecipe, work: StepWork, world_size: int) -> RolloutLoad:
    """Rollouts on the training ranks; none if servers generate."""
    r = recipe.rollout
    if r.engine == "server":
        return RolloutLoad()
    replicas = max(1, r.parallel.layout(recipe.parallel).data_parallel(world_size))
    slots = r.slots or min(MOST_SLOTS, -(-work.rollouts // replicas))
    return RolloutLoad(
        sequences=min(slots * replicas, work.rollouts),
        slots=slots,
        length=r.max_prompt_tokens + r.max_response_tokens,
        live=work.live_tokens,
        chunk=r.prefill_chunk,
        parallel=r.parallel,
        offload=r.offload,
        is_open=not r.slots,
        prompt=r.max_prompt_tokens,
        kv_gib=r.kv_gib,
        kv_memory_fraction=r.kv_memory_fraction,
    )


def _model_of(recipe: Any, preset: str) -> ModelConfig:
    model = getattr(recipe, "model", None)
    if isinstance(model, ModelConfig):
        return model
    if preset:
        if preset not in PRESETS:
            raise PlanError(f"--model {preset!r} is not a preset: use {', '.join(PRESETS)}")
        return PRESETS[preset]()
    folder = Path(recipe.init_from)
    if not recipe.init_from or not folder.is_dir():
        raise PlanError(
            f"the recipe takes its model from init_from({recipe.init_from!r}), which is not a "
            "artifact folder: name one, or say --model with a preset to plan ahead"
        )
    # Imported here: Megatron-Core takes 3 s, and a recipe with a model of its own needs none.
    from nemocascade.megatron.artifact import artifact_model, read_artifact

    return artifact_model(read_artifact(folder))
