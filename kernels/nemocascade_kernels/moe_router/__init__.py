"""The MoE router: scores, choice of experts, weights, counts and the sort by expert."""

from nemocascade_kernels.moe_router.losses import load_balance_loss, update_expert_bias, z_loss
from nemocascade_kernels.moe_router.op import make_routing, moe_route
from nemocascade_kernels.moe_router.routing import RouterSettings, Routing

__all__ = [
    "RouterSettings",
    "Routing",
    "load_balance_loss",
    "make_routing",
    "moe_route",
    "update_expert_bias",
    "z_loss",
]
