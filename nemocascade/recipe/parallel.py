"""Parallel layout of a model over ranks, and the rules for its sizes."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.rules import Count, Natural, number_problems


@dataclass(frozen=True)
class ParallelConfig:
    """Sizes of the parallel axes. The data-parallel size follows from the world size.

    Dense layers use tp x cp x pp x dp ranks; routed experts use the same ranks as etp x ep x pp x
    (expert dp).
    """

    tp: Count = 1
    """Tensor parallel: every linear, and the sequence between linears, is sharded over this many
    ranks."""

    pp: Count = 1
    """Pipeline parallel: layers are sharded over this many ranks."""

    vpp: Count = 1
    """Model chunks on each pipeline rank (interleaved schedule); 1 = plain 1F1B."""

    ep: Count = 1
    """Expert parallel: experts are distributed over this many ranks."""

    etp: Count = 1
    """Expert tensor parallel: every expert is sharded over this many ranks."""

    cp: Count = 1
    """Context parallel: the tokens of every packed sequence are sharded over this many ranks.
    Generation uses these ranks as further data-parallel ones."""

    pipeline_layout: str = ""
    """The layer pattern split into pp x vpp chunks by `|`, for example `ME|M*|EM|E*`. Empty: equal
    numbers of layers."""

    def data_parallel(self, world_size: int) -> int:
        """Number of replicas of the dense layers; 0 if the world is too small for one."""
        return world_size // (self.tp * self.pp * self.cp)

    def expert_nodes(self, ranks_per_node: int) -> int:
        """Nodes that an expert group spans if it fills each of them, and otherwise 1."""
        ranks = self.ep * self.etp
        fills = ranks % ranks_per_node == 0 and ranks_per_node % self.etp == 0
        return ranks // ranks_per_node if fills else 1

    def layout(self, pattern: str) -> str:
        """The pattern with `|` between the pp x vpp chunks."""
        if self.pipeline_layout:
            return self.pipeline_layout
        chunks = self.pp * self.vpp
        size = -(-len(pattern) // chunks)
        cuts = [pattern[i : i + size] for i in range(0, len(pattern), size)]
        return "|".join(cuts + [""] * (chunks - len(cuts)))

    def problems(
        self, model: ModelConfig, world_size: int, *, capacity: int | None, sequences_per_step: int
    ) -> list[str]:
        """Every rule that these sizes break for this model and world, each with its remedy.

        capacity: of a packed sequence; None: the job only generates, and packs nothing.
        """
        found = number_problems(self, "parallel")
        if found:
            return found
        found += self._world_problems(world_size, sequences_per_step)
        found += self._width_problems(model)
        if capacity is not None:
            found += self._capacity_problems(model, capacity)
        found += self._depth_problems(model)
        return found

    def _world_problems(self, world_size: int, sequences_per_step: int) -> list[str]:
        found = []
        dense, expert = self.tp * self.pp * self.cp, self.etp * self.ep * self.pp
        if world_size % dense:
            found.append(
                f"tp({self.tp}) x pp({self.pp}) x cp({self.cp}) = {dense} does not divide the "
                f"world of {world_size} ranks: start a multiple of {dense} ranks or lower "
                "--parallel.tp, --parallel.pp or --parallel.cp"
            )
        if world_size % expert:
            found.append(
                f"etp({self.etp}) x ep({self.ep}) x pp({self.pp}) = {expert} does not divide the "
                f"world of {world_size} ranks: start a multiple of {expert} ranks or lower "
                "--parallel.ep or --parallel.etp"
            )
        if found:
            return found
        dp = self.data_parallel(world_size)
        if sequences_per_step % dp:
            found.append(
                f"data.sequences_per_step({sequences_per_step}) is not a multiple of dp({dp}) = "
                f"world({world_size}) / (tp x pp x cp): set --data.sequences-per-step to a "
                f"multiple of {dp}"
            )
        elif self.vpp > 1 and (sequences_per_step // dp) % self.pp:
            found.append(
                f"the interleaved schedule needs micro-batches in multiples of pp({self.pp}), but "
                f"sequences_per_step({sequences_per_step}) / dp({dp}) = "
                f"{sequences_per_step // dp}: set --data.sequences-per-step to a multiple of "
                f"{dp * self.pp} or --parallel.vpp 1"
            )
        return found

    def _capacity_problems(self, model: ModelConfig, capacity: int) -> list[str]:
        """Rules of the rows that a rank holds: two segments, each sharded over tp."""
        if self.cp == 1:
            step, product = self.tp, f"tp({self.tp})"
        else:
            step = 2 * self.cp * self.tp
            product = f"2 x cp({self.cp}) x tp({self.tp}) = {step}"
        if capacity % step:
            return [
                f"capacity({capacity}) is not a multiple of {product}: set the capacity to "
                f"{-(-capacity // step) * step}, or lower --parallel.tp or --parallel.cp"
            ]
        segment = capacity // (2 * self.cp)
        if self.cp > 1 and "M" in model.pattern and segment < model.mamba_conv:
            return [
                f"capacity({capacity}) / (2 x cp({self.cp})) = {segment} tokens, but a "
                "segment must hold the convolution's window of "
                f"model.mamba_conv({model.mamba_conv}): lower --parallel.cp or raise the capacity"
            ]
        return []

    def _width_problems(self, model: ModelConfig) -> list[str]:
        found = []
        rules: list[tuple[str, int, str, int]] = [
            ("model.vocab_size", model.vocab_size, "tp", self.tp),
        ]
        if "*" in model.pattern:
            rules.append(("model.num_heads", model.num_heads, "tp", self.tp))
            kv = model.num_kv_heads
            if kv % self.tp and self.tp % kv:
                found.append(
                    f"tp({self.tp}) and model.num_kv_heads({kv}): one must be a multiple of the "
                    f"other: set --parallel.tp {kv}"
                )
        if "M" in model.pattern:
            rules.append(("model.mamba_groups", model.mamba_groups, "tp", self.tp))
        if "-" in model.pattern:
            rules.append(("model.mlp_width", model.mlp_width, "tp", self.tp))
        if "E" in model.pattern:
            rules.append(("model.num_experts", model.num_experts, "ep", self.ep))
            rules.append(("model.expert_width", model.expert_width, "etp", self.etp))
            rules.append(("model.shared_expert_width", model.shared_expert_width, "tp", self.tp))
        for name, value, axis, size in rules:
            if value % size:
                found.append(
                    f"{name}({value}) is not a multiple of {axis}({size}): set "
                    f"--parallel.{axis} to a divisor of {value}"
                )
        if "E" not in model.pattern and (self.ep > 1 or self.etp > 1):
            found.append(
                f"ep({self.ep}) x etp({self.etp}) with no MoE layer in model.pattern"
                f"({model.pattern}): set --parallel.ep 1 --parallel.etp 1"
            )
        return found

    def _depth_problems(self, model: ModelConfig) -> list[str]:
        found = []
        chunks = self.pp * self.vpp
        if self.vpp > 1 and self.pp == 1:
            found.append(
                f"vpp({self.vpp}) interleaves pipeline stages, but pp is 1: set --parallel.vpp 1"
            )
        if self.pipeline_layout:
            if self.pipeline_layout.replace("|", "") != model.pattern:
                found.append(
                    f"parallel.pipeline_layout({self.pipeline_layout}) without its | is not "
                    f"model.pattern({model.pattern})"
                )
            if self.pipeline_layout.count("|") + 1 != chunks:
                found.append(
                    f"parallel.pipeline_layout({self.pipeline_layout}) has "
                    f"{self.pipeline_layout.count('|') + 1} chunks, pp({self.pp}) x "
                    f"vpp({self.vpp}) needs {chunks}"
                )
        elif model.num_layers % chunks:
            found.append(
                f"{model.num_layers} layers don't split evenly over pp({self.pp}) x "
                f"vpp({self.vpp}) = {chunks} chunks: divide them yourself with "
                "--parallel.pipeline-layout or change --parallel.pp"
            )
        return found


@dataclass(frozen=True)
class RolloutParallelConfig:
    """Parallel layout of the model replicas that generate rollouts. By default it is that of
    training, whose weights are read in place. A layout of its own gets a copy of the weights before
    the rollouts of a step, in memory that is freed before training. Its experts are not sharded by
    width (etp 1), and context-parallel ranks generate like data-parallel ones."""

    tp: Natural = 0
    """Tensor parallel in generation; 0 = as in training."""

    pp: Natural = 0
    """Pipeline parallel in generation; 0 = as in training."""

    ep: Natural = 0
    """Expert parallel in generation; 0 = as in training."""

    def layout(self, training: ParallelConfig) -> ParallelConfig:
        """The layout of generation, given that of training."""
        same = replace(training, cp=1)
        tp, pp, ep = self.tp or training.tp, self.pp or training.pp, self.ep or training.ep
        if not (self.tp or self.pp or self.ep) or (
            (tp, pp, ep, 1) == (training.tp, training.pp, training.ep, training.etp)
        ):
            return same
        cuts = training.pipeline_layout if pp == training.pp and training.vpp == 1 else ""
        return ParallelConfig(tp=tp, pp=pp, ep=ep, pipeline_layout=cuts)

    def problems(self, training: ParallelConfig, model: ModelConfig, world_size: int) -> list[str]:
        """Every rule that the layout breaks for this model and world, each with its remedy."""
        own = self.layout(training)
        experts = own.ep * own.etp
        uneven = []
        if experts % own.tp and own.tp % experts:
            # The ranks of a replica would exchange tokens with different ranks.
            uneven = [
                f"rollout.parallel: generation has ep({own.ep}) x etp({own.etp}) = {experts} and "
                f"tp({own.tp}): one must be a multiple of the other: set --rollout.parallel.tp 1"
            ]
        if own == replace(training, cp=1):
            return uneven
        return [*uneven, *_generation_problems(own, model, world_size)]


@functools.lru_cache(maxsize=1024)
def _generation_problems(
    own: ParallelConfig, model: ModelConfig, world_size: int
) -> tuple[str, ...]:
    """Every rule that a layout of generation breaks; cached, since many layouts of training have
    the same one."""
    # Generation packs nothing, so any valid capacity will do.
    sequences = max(1, own.data_parallel(world_size)) * own.pp
    found = own.problems(model, world_size, capacity=own.tp, sequences_per_step=sequences)
    return tuple(
        "rollout.parallel: "
        # Generation has neither setting.
        + problem.replace("divide them yourself with --parallel.pipeline-layout or ", "")
        .replace(" or --parallel.etp", "")
        .replace("--parallel.", "--rollout.parallel.")
        for problem in found
    )
