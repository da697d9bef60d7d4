"""The engine that a recipe names, on a live model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemocascade.megatron.convert import LiveTensors
from nemocascade.megatron.model import CascadeModel
from nemocascade.megatron.replica import Replica, TrainingMemory
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.rollout.engine import Engine, Sampling
from nemocascade.rollout.live import LiveEngine
from nemocascade.rollout.server import ServerEngine
from nemocascade.rollout.stops import Decode
from nemocascade.rollout.transfer import BroadcastTransfer, FolderTransfer, Transfer
from nemocascade.rollout.weight_updates import Logprobs, WeightUpdates
from nemocascade.runtime.world import World


def open_engine(
    world: World,
    chunks: Sequence[CascadeModel],
    settings: RolloutConfig,
    *,
    run_dir: Path,
    decode: Decode,
    vocabulary: int,
    logprobs: Logprobs,
    precision: str,
    tool_calls: int,
    rollout_world: World | None = None,
    replica: Replica | None = None,
    training: TrainingMemory | None = None,
) -> Engine:
    """The engine of `settings` on the chunks of `build_model`; every rank calls it.

    decode: token ids to text. vocabulary: ids from here on are never drawn. logprobs: of the
    trainer, for the probe of servers. precision: of the model, `fp32` or `bf16`. tool_calls: see
    `LiveEngine`. rollout_world: in the generation layout; None is that of training. replica: the
    copy of the weights in another layout. training: memory that is offloaded if the settings say
    so.
    """
    rollout_world = rollout_world or world
    if settings.engine == "live":
        return LiveEngine(
            rollout_world,
            chunks if replica is None else replica.chunks,
            slots=settings.slots,
            kv_gib=settings.kv_gib,
            kv_memory_fraction=settings.kv_memory_fraction,
            prefill_tokens=settings.prefill_tokens,
            prefill_chunk=settings.prefill_chunk,
            decode=decode,
            vocabulary=vocabulary,
            record_routing=settings.replay_routing,
            replica=replica,
            training=training if settings.offload else None,
            tool_calls=tool_calls,
        )
    shape = chunks[0].config.shape
    updates = _weight_updates(
        world,
        chunks,
        settings,
        run_dir,
        vocabulary=vocabulary,
        logprobs=logprobs,
        precision=precision,
    )
    return ServerEngine(
        settings.server,
        vocabulary=vocabulary,
        model_vocabulary=shape.vocab_size,
        world=rollout_world,
        updates=updates,
        routing=shape if settings.replay_routing else None,
    )


def _weight_updates(
    world: World,
    chunks: Sequence[CascadeModel],
    settings: RolloutConfig,
    run_dir: Path,
    *,
    vocabulary: int,
    logprobs: Logprobs,
    precision: str,
) -> WeightUpdates:
    """The updates of the servers' weights, through a folder or a broadcast."""
    server, tensors = settings.server, LiveTensors(world, chunks)
    transfer: Transfer
    if server.weights == "disk":
        folder = Path(server.weights_folder or run_dir / "server_weights")
        transfer = FolderTransfer(world, server, tensors, folder)
    else:
        transfer = BroadcastTransfer(world, server, tensors)
    return WeightUpdates(
        world,
        server,
        transfer,
        logprobs,
        sampling=Sampling(temperature=settings.temperature),
        vocabulary=vocabulary,
        model_vocabulary=chunks[0].config.shape.vocab_size,
        longest=settings.max_prompt_tokens + settings.max_response_tokens,
        alarm=server.alarm(precision),
    )
