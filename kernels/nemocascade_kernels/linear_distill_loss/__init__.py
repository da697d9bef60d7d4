"""A divergence between two linear heads, with its gradients computed in the same pass."""
