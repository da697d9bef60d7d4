"""Instruction kinds of IFEval, verifiable-instructions and IFBench in one registry."""
