"""Errors of the planner, preflight and Slurm commands."""

from nemocascade.recipe import UserError


class PlanError(UserError, ValueError):
    """Settings cannot be planned or submitted; the message says why and what to do."""
