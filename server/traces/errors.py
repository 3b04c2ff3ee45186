"""Named failures of the trace room: 404 and 409 on the wire."""

from server.errors import SternaError


class TraceNotFoundError(SternaError):
    """No trace, response or episode goes by this id, it was deleted, or it belongs to another key."""


class FeedbackConflictError(SternaError):
    """An idempotency key that came before with another body."""
