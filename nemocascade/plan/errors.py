"""What the planner, preflight and Slurm commands raise."""


class PlanError(ValueError):
    """Settings that cannot be planned or submitted; the message says why and what to do."""
