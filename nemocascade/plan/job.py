"""Description of a planned job: the recipe's settings, its accelerator, and further memory use."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemocascade.megatron.artifact import artifact_model, read_artifact
from nemocascade.megatron.workspace import scan_problems
from nemocascade.plan.errors import PlanError
from nemocascade.plan.gpus import Gpu
from nemocascade.plan.parameters import Place, StateBytes, state_bytes
from nemocascade.recipe import (
    PRESETS,
    EngineConfig,
    ModelConfig,
    MoeTrainingConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutParallelConfig,
)


@dataclass(frozen=True)
class RolloutLoad:
    """Rollouts on the training ranks: concurrent sequences over the whole world, and their length.

    Attention caches keys and values of every token; a Mamba layer keeps one state a sequence.
    parallel: layout of generation. offload: gradients and optimizer state are not on the device
    meanwhile.
    """

    sequences: int = 0
    length: int = 0
    parallel: RolloutParallelConfig = field(default_factory=RolloutParallelConfig)
    offload: bool = False


@dataclass(frozen=True)
class Job:
    """A job to plan.

    capacity: tokens of a micro-batch. sequences_per_step: micro-batches over all data-parallel
    ranks. document: length of the documents that fill a micro-batch. imbalance: rows of the
    busiest experts' rank over the mean. teachers: further copies of the weights on each rank's
    device, in the run's precision. margin: share of the device's memory left for fragmentation
    and communication buffers. fla: the Mamba scan is fla-core's.
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
    fla: bool = True

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
    def replicas(self) -> int:
        """Ranks with the same dense weights: dp x cp. Each generates rollouts of its own."""
        return max(1, self.world_size // (self.parallel.tp * self.parallel.pp))

    @property
    def microbatches(self) -> int:
        """Micro-batches of one data-parallel rank in a step."""
        return self.sequences_per_step // max(1, self.parallel.data_parallel(self.world_size))

    def problems(self) -> list[str]:
        """Rules that the layout breaks, each with its remedy."""
        found = self.model.problems() or self.parallel.problems(
            self.model,
            self.world_size,
            capacity=self.capacity,
            sequences_per_step=self.sequences_per_step,
        )
        if not found and self.rollout.sequences:
            found = self.rollout.parallel.problems(self.parallel, self.model, self.world_size)
        if not found and self.on_gpu and self.fla and "M" in self.model.pattern:
            found = scan_problems(self.model, self.tokens, tp=self.parallel.tp)
        return found

    def state(self, place: Place) -> StateBytes:
        """Parameters, gradients and optimizer state of the rank at `place`."""
        return state_bytes(
            self.model,
            # It depends on dp x cp only, so layouts that divide it differently share the result.
            replace(self.parallel, cp=1),
            self.world_size,
            place,
            precision=self.engine.precision,
            moe=self.moe,
            optimizer=self.optimizer,
            on_gpu=self.on_gpu,
        )

    def with_layout(self, parallel: ParallelConfig, *, recompute: bool) -> Job:
        """The same job on another layout."""
        engine = replace(self.engine, recompute=recompute)
        return replace(self, parallel=parallel, engine=engine)


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
    **options: Any,
) -> Job:
    """The job that `recipe` describes; options are further fields of Job.

    preset: model preset for a recipe whose start artifact does not exist yet. model: the same, if
    it is known from earlier stages.

    A reinforcement-learning recipe trains packed episodes. It is planned with the packs that
    episodes of the largest size need, and with the concurrent sequences of its rollout settings.

    Raises PlanError if the recipe names neither a model nor an artifact that defines one.
    """
    known: dict[str, Any] = {
        name: getattr(recipe, name) for name in ("parallel", "engine", "moe", "optimizer")
    }
    known["fla"] = recipe.engine.fla != "off"
    known |= {"model": model or _model_of(recipe, preset), "gpu": gpu, "world_size": world_size}
    if hasattr(recipe, "data"):
        known |= {n: getattr(recipe.data, n) for n in ("capacity", "sequences_per_step")}
    else:
        r, dp = recipe.rollout, max(1, recipe.parallel.data_parallel(world_size))
        replicas = max(1, r.parallel.layout(recipe.parallel).data_parallel(world_size))
        longest = r.max_prompt_tokens + r.max_response_tokens
        episodes = r.prompts_per_step * r.rollouts_per_prompt
        packs = -(-episodes * longest // recipe.capacity // dp) * dp
        known |= {"capacity": recipe.capacity, "sequences_per_step": max(dp, packs)}
        known["rollout"] = RolloutLoad(r.slots * replicas, longest, r.parallel, r.offload)
    return Job(**known | options)


def _model_of(recipe: Any, preset: str) -> ModelConfig:
    model = getattr(recipe, "model", None)
    if isinstance(model, ModelConfig):
        return model
    if preset:
        if preset not in PRESETS:
            raise PlanError(f"--model {preset!r} is no preset: use {', '.join(PRESETS)}")
        return PRESETS[preset]()
    folder = Path(recipe.init_from)
    if not recipe.init_from or not folder.is_dir():
        raise PlanError(
            f"the recipe takes its model from init_from({recipe.init_from!r}), which is no "
            "artifact folder: name one, or say --model with a preset to plan ahead"
        )
    return artifact_model(read_artifact(folder))
