"""Tasks and their verifiers, one file a domain. `nemocascade.envs.registry` makes them.

This file stays empty: verifiers in child processes import their check alone, without torch.
"""
