"""The MoE router: scores, choice of experts, weights, counts and the sort by expert."""
