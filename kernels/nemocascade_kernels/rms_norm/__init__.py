"""RMSNorm, plain or gated by groups as in Mamba-2."""
