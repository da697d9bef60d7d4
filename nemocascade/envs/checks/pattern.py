"""Regular expressions of unknown origin."""

from __future__ import annotations

import re


def last_match(pattern: str, text: str) -> str | None:
    """The rightmost match of `pattern`: its first group, or all of it where it has none."""
    found = None
    for match in re.finditer(pattern, text):
        found = match
    if found is None:
        return None
    return found.group(1) if found.re.groups else found.group(0)
