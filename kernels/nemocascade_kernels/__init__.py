"""Fused kernels for post-training language models: public functions only.

kernels/README.md holds the table of ops, their shapes and their measured numbers.
"""

from nemocascade_kernels.common.documents import PackedSeq
from nemocascade_kernels.common.linear_head.chunks import logits_bytes
from nemocascade_kernels.common.linear_head.truncation import (
    Truncation,
    kept_log_mass,
    kept_tokens,
)
from nemocascade_kernels.common.routing import RouterSettings, Routing
from nemocascade_kernels.decode_step.op import (
    step_attention,
    step_draw,
    step_experts,
    step_linear,
    step_mamba,
    step_norm,
    step_route,
)
from nemocascade_kernels.decode_step.routed_rows import RoutedRows, SharedExpert
from nemocascade_kernels.decode_step.sampling import SampleSettings
from nemocascade_kernels.decode_step.steps import Steps, decode_steps
from nemocascade_kernels.decode_step.weights import MambaWeights
from nemocascade_kernels.linear_distill_loss.op import DistillLoss, linear_distill_loss
from nemocascade_kernels.linear_distill_loss.reference import DIVERGENCES, Divergence
from nemocascade_kernels.linear_logprob.op import LinearLogprob, linear_logprob
from nemocascade_kernels.linear_policy_loss.objectives import Grpo, Mopd, Nll, Objective
from nemocascade_kernels.linear_policy_loss.op import PolicyLoss, linear_policy_loss
from nemocascade_kernels.mamba2.op import mamba2, mamba2_final_state
from nemocascade_kernels.moe_experts.op import (
    grouped_gemm,
    moe_experts,
    moe_permute,
    moe_unpermute,
)
from nemocascade_kernels.moe_router.logits import router_logits
from nemocascade_kernels.moe_router.losses import load_balance_loss, update_expert_bias, z_loss
from nemocascade_kernels.moe_router.op import make_routing, moe_route
from nemocascade_kernels.mopd_advantage.op import (
    MopdAdvantage,
    mopd_advantage,
    mopd_advantage_metrics,
)
from nemocascade_kernels.rms_norm.op import rms_norm
from nemocascade_kernels.version import __version__

__all__ = [
    "DIVERGENCES",
    "DistillLoss",
    "Divergence",
    "Grpo",
    "LinearLogprob",
    "MambaWeights",
    "Mopd",
    "MopdAdvantage",
    "Nll",
    "Objective",
    "PackedSeq",
    "PolicyLoss",
    "RoutedRows",
    "RouterSettings",
    "Routing",
    "SampleSettings",
    "SharedExpert",
    "Steps",
    "Truncation",
    "__version__",
    "decode_steps",
    "grouped_gemm",
    "kept_log_mass",
    "kept_tokens",
    "linear_distill_loss",
    "linear_logprob",
    "linear_policy_loss",
    "load_balance_loss",
    "logits_bytes",
    "make_routing",
    "mamba2",
    "mamba2_final_state",
    "moe_experts",
    "moe_permute",
    "moe_route",
    "moe_unpermute",
    "mopd_advantage",
    "mopd_advantage_metrics",
    "rms_norm",
    "router_logits",
    "step_attention",
    "step_draw",
    "step_experts",
    "step_linear",
    "step_mamba",
    "step_norm",
    "step_route",
    "update_expert_bias",
    "z_loss",
]
