"""Judges: who compares and grades responses that no rule verifies. `factory.make_judge` makes one.

This file stays empty.
"""
