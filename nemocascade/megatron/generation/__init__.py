"""Generation on the training weights: KV cache, prefill, decode steps and CUDA graphs."""
