"""The workplace of NeMo Gym's tool-calling rows: five databases, a directory, and 27 tools.

Names, parameters and effects of the tools, and the comparison of end states, are those of
NVIDIA-NeMo/Gym's `workplace_assistant`. A call that the published tools answer with a message, and
that changes nothing, is a `CallError` here. Searches match plain text, not regular expressions.
"""

from __future__ import annotations

from nemocascade.envs.workplace.correspondence import Correspondence
from nemocascade.envs.workplace.records import Records


class Workplace(Correspondence, Records):
    """All databases and tools of one workplace."""
