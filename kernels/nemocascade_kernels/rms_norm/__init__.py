"""RMSNorm, plain, and gated by groups as Mamba-2 has it."""
