"""Fixtures, jobs of several ranks, and references that tests share."""
