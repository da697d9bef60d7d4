"""Chunks, products and row kernels of the ops on a linear head, `softmax(hidden @ weight.T)`."""
