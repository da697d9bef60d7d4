"""Errors that end a cascade run with a message."""

from nemocascade.recipe import UserError


class CascadeError(UserError, ValueError):
    """The cascade cannot continue; the message says why and what to do."""


class ReportError(CascadeError):
    """No cascade run to report on; the message says what is wrong and what to do."""


class AlarmError(CascadeError):
    """A domain's score fell by more than the recipe allows."""

    exit_code = 5
