"""Tasks and their verifiers, one file per domain. `nemocascade.envs.registry` makes them.

This file stays empty: verifiers in child processes import only their check, without torch.
"""
