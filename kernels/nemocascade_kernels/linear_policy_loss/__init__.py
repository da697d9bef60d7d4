"""A policy loss on a linear head, with its gradients computed in the same pass."""
