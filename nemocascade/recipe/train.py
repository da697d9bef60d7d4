"""Settings of the optimizer, numerics, checkpoints, evaluation and logging."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from nemocascade.recipe.rules import Decay, LearningRate, Natural, NonNegative, Positive, Range

Accelerator = Literal["auto", "on", "off"]


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
    """Precision of weights and activations. Gradients and optimizer state are always fp32."""

    recompute: bool = False
    """Recompute each layer's activations in the backward pass instead of storing them."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    transformer_engine: Accelerator = "auto"
    """Fused Adam and attention of Transformer Engine, if it is installed."""

    apex: Accelerator = "auto"
    """Fused Adam and weight-gradient accumulation of apex, if it is installed."""

    fla: Accelerator = "auto"
    """Triton scan and convolution of fla-core for Mamba-2 on GPUs, if it is installed."""

    timeout_s: Annotated[float, Range(1, 30 * 86_400)] = 1800.0
    """Timeout of a collective in seconds. The watchdog names a rank that is silent or stalled for
    four fifths of it."""

    preflight: bool = True
    """Check disk space, predicted memory, devices and collectives at the start."""


@dataclass(frozen=True)
class CheckpointConfig:
    """Schedule and retention of checkpoints."""

    every: Natural = 500
    """Steps between checkpoints; 0 = only at the end."""

    keep: Natural = 2
    """Number of newest checkpoints to keep; 0 = all."""


@dataclass(frozen=True)
class EvalConfig:
    """Held-out loss during training."""

    every: Natural = 500
    """Steps between held-out evaluations; 0 = only at the end."""


@dataclass(frozen=True)
class LogConfig:
    """Settings of the logged metrics."""

    every: Natural = 1
    """Steps between lines of metrics.jsonl and TensorBoard."""

    tensorboard: bool = True
