"""Shared fixtures, multi-rank jobs, and reference implementations for tests."""
