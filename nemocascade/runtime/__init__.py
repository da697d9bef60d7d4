"""Shared by all of a running job: logging, the world of ranks, the watchdog, errors."""
