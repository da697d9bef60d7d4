"""Matching of untrusted regular expressions."""

from __future__ import annotations

import re


def last_match(pattern: str, text: str) -> str | None:
    """Return the rightmost match of `pattern` in any case of letters.

    It is the first group that took part in the match, or all of the match without such a group.
    """
    found = None
    for match in re.finditer(pattern, text, re.IGNORECASE):
        found = match
    if found is None:
        return None
    return next((group for group in found.groups() if group is not None), found.group(0))
