"""The optimizer step over packed batches, with metrics, evaluation and checkpoint policy."""
