"""Named failures of the trace room: 404 and 409 on the wire."""

from server.errors import SternaError


class _OfOneItem(SternaError):
    """`param` says which item of a batch it was."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class TraceNotFoundError(_OfOneItem):
    """No trace, response or episode goes by this id, it was deleted, or it belongs to another key."""


class FeedbackConflictError(_OfOneItem):
    """An idempotency key that came before with another body."""
