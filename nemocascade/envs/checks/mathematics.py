"""Equality of mathematical answers by `math-verify`."""

from __future__ import annotations

from math_verify import parse, verify


def equal(expected: str, answer: str) -> bool:
    """Return True if `math-verify` finds two LaTeX or plain expressions equal.

    The caller's process limit bounds the time, so the library's own alarms are disabled.
    Raises ValueError if `expected` cannot be parsed.
    """
    gold = parse(f"\\boxed{{{expected}}}", parsing_timeout=None)
    if not gold:
        raise ValueError(f"the expected answer {expected!r} cannot be read as mathematics")
    found = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    return bool(found) and bool(verify(gold, found, timeout_seconds=None))
