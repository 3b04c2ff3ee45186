"""Failures of the adapter registry that callers tell apart; a broken adapter file is server.errors.AdapterError."""

from server.errors import ModelNotFoundError, SternaError


class VersionNotFoundError(ModelNotFoundError):
    """No adapter, or no version of it, goes by that name."""


class AdapterConflictError(SternaError):
    """Somebody else changed the adapter first: read it again and decide again."""


class AdapterStateError(AdapterConflictError):
    """The version's state does not allow what was asked for; the message says which states do."""
