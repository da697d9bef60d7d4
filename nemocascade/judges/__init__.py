"""Judges compare and grade responses that no rule verifies. `envs.registry.make_judge` makes one.

This file stays empty.
"""
