"""The engine on the live training weights, or on their copy in a generation layout: continuous
batching over slots.

A decode step processes one token of every sequence. A slot is reused as soon as its sequence has
finished, and while it waits for its environment if others need it. A prompt is prefilled once for
all its requests, and environment turns are prefilled from the cached state of their slot: no token
is processed twice.

**Memory.** The KV cache is a pool of blocks, of which a sequence has as many as its tokens fill;
the sequences of a prompt share its full blocks. If blocks run out, the state of a sequence moves to
host memory until there are some (`residency`). Chunked prefill processes at most `prefill_chunk`
tokens of a sequence in a pass, from the state that the previous pass wrote. Activation memory
therefore does not grow with the prompt, but for a copy of one layer's keys and values on a GPU.

**Reproducibility.** A draw depends on the seed, the request's id, the position and the logits.
On a CPU, logits are batch-invariant unless `prefill_tokens` is set: prompts are prefilled alone,
and `nemocascade_kernels.decode_step` is batch-invariant. On a GPU the number of slots fixes the
shapes of a step, and these may affect rounding.

**Copy.** With a layout of its own, the weights are copied before the first run after a change, and
the memory of the copy exists until `release`.

**Ranks.** The ranks of one data-parallel group run the same requests and make the same decisions;
the last pipeline stage draws and broadcasts. If experts are sharded over several data-parallel
ranks, these agree on the kind of each pass. A rank that has finished takes part with zero rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from nemocascade.megatron.generation.kv_cache import CacheMemory, Load, block_size, state_bytes
from nemocascade.megatron.generation.model_runner import ModelRunner
from nemocascade.megatron.model import CascadeModel
from nemocascade.megatron.replica import Replica, TrainingMemory
from nemocascade.recipe.rl import RolloutConfig
from nemocascade.rollout.capacity import budget, check_capacity, least_of_ranks, load_of
from nemocascade.rollout.engine import (
    Completion,
    Counts,
    Observe,
    Request,
    Respond,
    Sampling,
    Work,
    as_work,
)
from nemocascade.rollout.generation import Generation
from nemocascade.rollout.slots import BatchLimits
from nemocascade.rollout.stops import Decode
from nemocascade.runtime.cores import slots_of_rank
from nemocascade.runtime.world import World


class LiveEngine:
    """An `Engine` on the chunks of `build_model`, whose weights it reads in place.

    world: in the layout of the chunks. replica: what the chunks belong to, if they are a copy of
    the training weights; all ranks then call `run` at the same time. training: memory that is
    offloaded from the first run until `release`; None offloads nothing.
    slots, prefill_tokens, prefill_chunk: see `BatchLimits`; 0 slots are as many as memory allows.
    kv_gib, kv_memory_fraction: memory of the caches, see `RolloutConfig`. decode: token ids to
    text, needed for stop strings. vocabulary: ids from here on are never drawn; 0 excludes none.
    record_routing: completions carry the experts of their tokens, for router replay. tool_calls:
    concurrent calls of tools on a rank; 0 = one a core of the rank.

    Raises ValueError if there is no slot, or a size is negative.
    """

    is_shared = True

    def __init__(
        self,
        world: World,
        chunks: Sequence[CascadeModel],
        *,
        slots: int = 64,
        kv_gib: float = 0.0,
        kv_memory_fraction: float = RolloutConfig.kv_memory_fraction,
        prefill_tokens: int = 0,
        prefill_chunk: int = 0,
        decode: Decode | None = None,
        vocabulary: int = 0,
        record_routing: bool = False,
        replica: Replica | None = None,
        training: TrainingMemory | None = None,
        tool_calls: int = 0,
    ) -> None:
        self.world, self.chunks = world, list(chunks)
        self.replica, self.training = replica, training
        self._is_outdated = True
        self.limits = BatchLimits(
            slots or 1, prefill_tokens, prefill_chunk, slots_of_rank(tool_calls)
        )
        self._are_slots_chosen = bool(slots)
        self._kv_gib, self._kv_memory_fraction = kv_gib, kv_memory_fraction
        self.decode = decode
        self.record_routing = record_routing
        self.vocabulary = vocabulary or chunks[0].config.shape.vocab_size
        self.counts = Counts()
        self._runs: list[Counts] = []
        """Counts of the runs since the last release, or before it until the next run."""
        self._is_released = True
        self._model: ModelRunner | None = None

    def run(
        self,
        requests: Sequence[Request] | Work,
        sampling: Sampling,
        respond: Respond | None = None,
        *,
        load: Load | None = None,
        observe: Observe | None = None,
    ) -> Iterator[Completion]:
        """Implements `Engine.run`. Every rank of a data-parallel group passes the same requests;
        ranks that share experts call it at the same time and consume it to its end.

        load: of work whose requests are not known yet. observe: called with every drawn token.
        """
        work = as_work(requests)
        self._prepare()
        load = load or load_of(self.world, work, sampling)
        generation = Generation(
            self.world,
            self.reserve(load),
            work,
            sampling,
            respond,
            limits=self.limits,
            load=load,
            decode=self.decode,
            vocabulary=self.vocabulary,
            observe=observe,
        )
        self.counts = generation.counts
        if self._is_released:
            self._runs.clear()
        self._runs.append(self.counts)
        self._is_released = False
        return generation.completions()

    def reserve(self, load: Load) -> ModelRunner:
        """The runner with the slots and blocks that memory allows; collective, as `run`.

        Raises CapacityError if a single sequence does not fit.
        """
        world = self.world
        if self._model is None:
            config, parallel = self.chunks[0].config, world.parallel
            stages = parallel.layout(config.shape.pattern).split("|")
            layers = "".join(stages[world.pp_rank :: parallel.pp])
            width = config.params_dtype.itemsize
            self._memory = CacheMemory(
                budget(world, self._kv_gib, self._kv_memory_fraction),
                state_bytes(config.shape, layers, parallel.tp, width),
                block_size(world.device.type),
            )
            if not self._are_slots_chosen:
                slots = least_of_ranks(world, self._memory.slots(load))
                self.limits = replace(self.limits, slots=slots)
                # A later run has the same shapes, whatever memory is free then.
                self._are_slots_chosen = True
            # One extra slot stores the state of a prompt until all its requests have started.
            self._model = ModelRunner(
                world, self.chunks, self.limits.slots + 1, record_routing=self.record_routing
            )
        slots = self.limits.slots
        blocks = least_of_ranks(world, self._memory.blocks(load, slots))
        needed = -least_of_ranks(world, -self._memory.needed_bytes(load, slots))
        check_capacity(self._memory, load, slots, blocks, needed)
        self._model.allocate(blocks, load.longest)
        self._model.most_rows = min(slots, load.requests)
        return self._model

    def _prepare(self) -> None:
        """Offload training's memory and copy the weights, where that has not been done yet."""
        if self.training is not None:
            self.world.watch.enter("rollout: offload")
            self.training.offload()
        if self.replica is not None and self._is_outdated:
            self.world.watch.enter("rollout: weights")
            self.replica.load()
        self._is_outdated = False

    def weights_changed(self) -> None:
        """Implements `Engine.weights_changed`: the next run copies them, unless they are read in
        place."""
        self._is_outdated = True

    def metrics(self) -> dict[str, float]:
        """Implements `Engine.metrics`: slots, and the work, time, preemptions and offloads of this
        rank's replica since the release before last; the planner's `--from` reads them."""
        names = {
            "decode_steps": "steps",
            "decode_rows": "rows",
            "decode_time_s": "decode_s",
            "prefill_tokens": "prefill_tokens",
            "prefill_time_s": "prefill_s",
            "idle_time_s": "idle_s",
            "preemptions": "preemptions",
            "offloads": "offloads",
        }
        return {"rollout_slots": float(self.limits.slots)} | {
            name: float(sum(getattr(counts, field) for counts in self._runs))
            for name, field in names.items()
        }

    def release(self) -> None:
        """Implements `Engine.release`: free the slots and the copy, restore training's memory."""
        self._free()
        self._is_released = True
        if self.training is not None:
            self.training.restore()

    def close(self) -> None:
        """Implements `Engine.close`."""
        self._free()

    def _free(self) -> None:
        self._model = None
        if self.replica is not None:
            self.replica.free()
            self._is_outdated = True
        if self.world.device.type == "cuda":
            # Training allocates blocks of other sizes.
            torch.cuda.empty_cache()
