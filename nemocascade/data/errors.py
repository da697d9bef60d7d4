"""Errors of tokenizers."""

from __future__ import annotations

from nemocascade.runtime.row_errors import DataError


class TokenizerError(DataError):
    """A tokenizer file is unreadable, or has no token that the template needs."""
