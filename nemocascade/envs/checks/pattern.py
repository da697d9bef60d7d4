"""Matching of untrusted regular expressions."""

from __future__ import annotations

import re


def last_match(pattern: str, text: str) -> str | None:
    """Return the rightmost match of `pattern`: its first group, or all of it without groups."""
    found = None
    for match in re.finditer(pattern, text):
        found = match
    if found is None:
        return None
    return found.group(1) if found.re.groups else found.group(0)
