"""Errors that end a cascade with a message."""

from nemocascade.recipe import UserError


class CascadeError(UserError, ValueError):
    """A cascade that cannot go on; the message says why and what to do."""


class ReportError(CascadeError):
    """There is no cascade run to report on; the message says what is wrong and what to do."""


class AlarmError(CascadeError):
    """A stage has harmed a domain by more than the recipe allows."""

    exit_code = 5
