"""Settings of the optimizer, numerics, checkpoints, evaluation and logging."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Annotated, Literal

from nemocascade.recipe.model import ModelConfig
from nemocascade.recipe.parallel import ParallelConfig
from nemocascade.recipe.rules import Decay, LearningRate, Natural, NonNegative, Positive, Range

Accelerator = Literal["auto", "on", "off"]
LAYER_SYMBOLS = "M*E-"
"""Kinds of layers in a layer pattern."""
Moments = Literal["fp32", "bf16"]
LARGEST_BF16_BETA = 0.99
"""Largest decay of a moment in bf16: it follows a change of 2^-8 / (1 - beta) = 39 % or more."""
TrackerName = Literal["tensorboard", "wandb", "mlflow"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning-rate schedule."""

    lr: LearningRate = 5e-5
    """Peak learning rate."""

    min_lr: LearningRate = 5e-6
    """Learning rate at the end of the decay."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the decay from `lr` to `min_lr`; constant keeps `lr`."""

    warmup_steps: Natural = 200
    """Steps of linear warm-up."""

    warmup_start_lr: LearningRate = 0.0
    """Learning rate at the start of the warm-up."""

    decay_steps: Natural = 40_000
    """Step at which `min_lr` is reached; may be beyond the last step."""

    beta1: Decay = 0.9
    beta2: Decay = 0.98
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.1
    """Weight decay of matrices; biases, norms and other vectors have none."""

    clip_grad: NonNegative = 1.0
    """Largest global gradient norm; 0 = no clipping."""

    distributed: bool = True
    """Shard optimizer state over data-parallel ranks (Megatron's distributed optimizer)."""

    moments: Moments = "fp32"
    """Precision of AdamW's two moments in memory and checkpoints; updates are in fp32. bf16 saves 4
    bytes for each parameter that a rank owns, and rounds to nearest, so betas must not be above
    0.99: with larger ones most updates would be rounded away."""

    def lr_at(self, step: int) -> float:
        """Learning rate of optimizer step `step`, counted from 0."""
        import math

        if step < self.warmup_steps:
            share = (step + 1) / self.warmup_steps
            return self.warmup_start_lr + (self.lr - self.warmup_start_lr) * share
        if self.schedule == "constant":
            return self.lr
        span = max(1, self.decay_steps - self.warmup_steps)
        done = min(1.0, (step - self.warmup_steps) / span)
        if self.schedule == "cosine":
            done = 0.5 * (1.0 - math.cos(math.pi * done))
        return self.lr + (self.min_lr - self.lr) * done

    def problems(self) -> list[str]:
        """Every rule that these settings break."""
        found = []
        if not self.min_lr <= self.lr:
            found.append(f"optimizer.min_lr({self.min_lr}) must not be above lr({self.lr})")
        if self.schedule != "constant" and self.decay_steps < self.warmup_steps:
            found.append(
                f"optimizer.decay_steps({self.decay_steps}) ends before "
                f"warmup_steps({self.warmup_steps}): raise it or lower the warm-up"
            )
        if self.moments == "bf16":
            found += [
                f"optimizer.{name}({value}) is above {LARGEST_BF16_BETA}, and optimizer.moments"
                "(bf16) would round most updates of that moment away: set --optimizer.moments fp32 "
                f"or --optimizer.{name} {LARGEST_BF16_BETA}"
                for name, value in (("beta1", self.beta1), ("beta2", self.beta2))
                if value > LARGEST_BF16_BETA
            ]
        return found


@dataclass(frozen=True)
class MoeTrainingConfig:
    """Training of the routers."""

    load_balance: Literal["none", "sequence", "global"] = "sequence"
    """Load-balance loss: over each document, over all tokens of a micro-batch, or none."""

    load_balance_coef: NonNegative = 1e-4
    z_loss_coef: NonNegative = 0.0
    """Weight of the mean squared logsumexp of the router's logits."""

    bias_update_rate: NonNegative = 1e-3
    """Step size of an expert's selection bias, which counteracts its load; 0 = frozen."""

    freeze_router: bool = False
    """Freeze the router weights. The bias is still updated."""


@dataclass(frozen=True)
class EngineConfig:
    """Numerics and accelerators."""

    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights and activations. The optimizer has fp32 copies of bf16 weights, and
    moments of `optimizer.moments`."""

    gradients: Literal["fp32", "bf16"] = "fp32"
    """Precision in which gradients of bf16 weights are summed over micro-batches and reduced over
    ranks. bf16 halves their memory and messages, and rounds every sum to 8 bits."""

    recompute: bool = False
    """Recompute each layer's activations in the backward pass instead of storing them."""

    recompute_layers: str = ""
    """Recompute only layers of these kinds, as symbols of the layer pattern: `E` or `ME`. Empty:
    `recompute` decides for all."""

    overlap_parameter_gather: bool = False
    """Gather the updated weights of data-parallel ranks during the next forward pass, layer by
    layer, instead of at the end of the step. For SFT with `optimizer.distributed`: rollouts read
    all weights right after a step."""

    gc_every: Natural = 0
    """Steps between collections of Python's garbage, on all ranks after the same step, instead of
    Python's own collections, which stop ranks at different times; 0 = Python's own."""

    experts: Literal["bf16", "fp8"] = "bf16"
    """Products of the routed experts in training: those of `precision`, or FP8 with a scale for
    each block (e4m3; activations 1 x 128, weights 128 x 128). Master weights, gradients,
    checkpoints, scores and rollouts are not affected. FP8 needs Hopper GPUs; a CPU computes the
    same rounding slowly."""

    linears: Literal["bf16", "fp8"] = "bf16"
    """Products of the linear layers of Mamba-2, attention, MLP and shared expert in training: those
    of `precision`, or Transformer Engine's in FP8 with its blockwise recipe. Scores and rollouts
    are not affected. FP8 needs Transformer Engine 2.3 or newer and Hopper GPUs."""

    expert_exchange: Literal["auto", "direct", "hierarchical", "deepep"] = "auto"
    """How tokens reach the experts of other ranks. direct: one all-to-all over ep x etp, with a row
    for each expert. hierarchical: a row crosses the network once for each node, and is dispatched
    inside it; the same results, bit for bit in fp32. auto: hierarchical if ep x etp fills several
    nodes. deepep: the kernels of DeepEP, through Megatron's fused dispatch, without etp."""

    overlap_shared_expert: Accelerator = "off"
    """Compute the shared expert of a MoE layer while rows travel to the routed experts and back, in
    forward and backward. The results have the same bits. auto: wherever rows travel, except with
    deepep. on: a job whose rows do not travel so is an error. off: after the routed experts."""

    overlap_tensor_parallel: bool = False
    """Overlap the linear layers of Mamba-2, attention, MLP and shared expert in training with the
    gathers and scatters of their sequence-parallel inputs and outputs, in Transformer Engine's user
    buffers (Megatron's `tp_comm_overlap`). Needs tp above 1, bf16, GPUs and Transformer Engine."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    transformer_engine: Accelerator = "auto"
    """Fused Adam and attention of Transformer Engine, if it is installed."""

    flash_attention_3: Accelerator = "auto"
    """FlashAttention-3 for packed attention on sm_90, if its package `flash_attn_interface` is
    installed; otherwise torch's FlashAttention-2."""

    apex: Accelerator = "auto"
    """Fused Adam and weight-gradient accumulation of apex, if it is installed."""

    fla: Accelerator = "auto"
    """Triton scan and convolution of fla-core for Mamba-2 on GPUs, if it is installed. auto: only
    where our own Triton kernels are unavailable, or fail their check at the start."""

    timeout_s: Annotated[float, Range(1, 30 * 86_400)] = 1800.0
    """Timeout of a collective in seconds. The watchdog names a rank that is silent or stalled for
    four fifths of it."""

    preflight: bool = True
    """Check disk space, predicted memory, devices and collectives at the start."""

    def problems(self) -> list[str]:
        """Every rule that these settings break."""
        found = self._recompute_problems()
        if self.gradients == "bf16" and self.precision != "bf16":
            found.append(
                f"engine.gradients(bf16) needs bf16 weights, and engine.precision is "
                f"{self.precision}: set --engine.precision bf16 or --engine.gradients fp32"
            )
        if self.expert_exchange == "deepep" and self.precision != "bf16":
            found.append(
                f"engine.expert_exchange(deepep) moves bf16 rows, and engine.precision is "
                f"{self.precision}: set --engine.precision bf16 or --engine.expert-exchange auto"
            )
        return found + self._linears_problems() + self._tensor_parallel_problems()

    def layout_problems(self, parallel: ParallelConfig, model: ModelConfig) -> list[str]:
        """Every rule that these settings break on a layout, each with its remedy."""
        found = []
        if self.overlap_tensor_parallel and parallel.tp == 1:
            found.append(
                "engine.overlap_tensor_parallel(True) has no effect, for nothing is gathered with "
                "parallel.tp(1): set --engine.overlap-tensor-parallel False, or a larger "
                "--parallel.tp"
            )
        if self.overlap_shared_expert == "on":
            ep, etp = parallel.ep, parallel.etp
            reason = ""
            if "E" not in model.pattern or not model.shared_expert_width:
                reason = "the model has no shared expert"
            elif ep * etp == 1:
                reason = f"rows stay on their rank with ep({ep}) x etp({etp}) = 1"
            elif self.expert_exchange == "deepep":
                reason = "the kernels of engine.expert_exchange(deepep) run alone"
            if reason:
                found.append(
                    f"engine.overlap_shared_expert(on) has no effect, for {reason}: set "
                    "--engine.overlap-shared-expert auto"
                )
        return found

    def overlaps_shared_expert(self, parallel: ParallelConfig, model: ModelConfig) -> bool:
        """True if the shared expert runs while rows travel."""
        travels = parallel.ep * parallel.etp > 1 and self.expert_exchange != "deepep"
        return self.overlap_shared_expert != "off" and travels and model.shared_expert_width > 0

    @property
    def recomputed(self) -> str:
        """Symbols of the layers that backward recomputes."""
        return LAYER_SYMBOLS if self.recompute else self.recompute_layers

    @property
    def recomputed_text(self) -> str:
        """The layers that backward recomputes, in words: `kept`, `recomputed`, `recomputed ME`."""
        if not self.recomputed:
            return "kept"
        return f"recomputed {self.recompute_layers}".strip()

    def _recompute_problems(self) -> list[str]:
        unknown = "".join(sorted(set(self.recompute_layers) - set(LAYER_SYMBOLS)))
        if unknown:
            return [
                f"engine.recompute_layers({self.recompute_layers}) has {unknown!r}, which is not a "
                f"kind of layer: use symbols of {LAYER_SYMBOLS}, such as ME"
            ]
        if self.recompute and self.recompute_layers:
            return [
                f"engine.recompute_layers({self.recompute_layers}) has no effect, for "
                "engine.recompute recomputes every layer: set --engine.recompute False, or leave "
                "the other empty"
            ]
        return []

    def _linears_problems(self) -> list[str]:
        if self.linears != "fp8":
            return []
        wrong = {
            "device": (self.device, "cpu", "cuda"),
            "precision": (self.precision, "fp32", "bf16"),
            "transformer_engine": (self.transformer_engine, "off", "auto"),
        }
        return [
            f"engine.linears(fp8) runs in Transformer Engine, without engine.{name}({value}): set "
            f"--engine.{name} {remedy}, or --engine.linears bf16"
            for name, (value, rejected, remedy) in wrong.items()
            if value == rejected
        ]

    def _tensor_parallel_problems(self) -> list[str]:
        if not self.overlap_tensor_parallel:
            return []
        wrong = {
            "device": (self.device, "cpu", "cuda", "its user buffers are on GPUs"),
            "precision": (self.precision, "fp32", "bf16", "its user buffers are in bf16"),
            "transformer_engine": (self.transformer_engine, "off", "auto", "they are its linears"),
            "linears": (self.linears, "fp8", "bf16", "blockwise FP8 has no user buffers"),
        }
        return [
            f"engine.overlap_tensor_parallel(True) runs in Transformer Engine, and not with "
            f"engine.{name}({value}), for {reason}: set --engine.{name} {remedy}, or "
            "--engine.overlap-tensor-parallel False"
            for name, (value, rejected, remedy, reason) in wrong.items()
            if value == rejected
        ]


@dataclass(frozen=True)
class CheckpointConfig:
    """Schedule and retention of checkpoints."""

    every: Natural = 500
    """Steps between checkpoints; 0 = only at the end."""

    keep: Natural = 2
    """Number of newest checkpoints to keep; 0 = all."""

    asynchronous: bool = True
    """Write while training continues, which waits for a copy of the state in host memory only. If
    the copies need more than half of a node's available memory, saves are synchronous."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during training."""

    every: Natural = 500
    """Steps between held-out evaluations; 0 = only at the end."""


@dataclass(frozen=True)
class LogConfig:
    """Settings of the logged metrics."""

    every: Natural = 1
    """Steps between lines of metrics.jsonl and of the trackers."""

    trackers: tuple[TrackerName, ...] = ("tensorboard",)
    """Where metrics go besides metrics.jsonl. wandb: online if it is logged in, otherwise to
    RUN/wandb for `wandb sync`. mlflow: the server of MLFLOW_TRACKING_URI, otherwise
    RUN/mlflow.db."""

    tensorboard: bool = True
    """False leaves tensorboard out of `trackers`."""

    @property
    def chosen(self) -> tuple[TrackerName, ...]:
        """The trackers to open, each once."""
        names = dict.fromkeys(self.trackers)
        return tuple(n for n in names if n != "tensorboard" or self.tensorboard)

    def problems(self) -> list[str]:
        """Every tracker whose package is not installed."""
        return [
            f"log.trackers({name}) needs the package {name}, which is not installed: "
            f"pip install 'nemocascade[{name}]', or leave it out of --log.trackers"
            for name in self.chosen
            if not _is_installed(name)
        ]


def _is_installed(package: str) -> bool:
    """False also for a folder of that name, such as the `wandb/` that W&B writes."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
