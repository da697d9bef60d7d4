"""One step of Mamba-2's mixer for many sequences."""
