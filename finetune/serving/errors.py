"""Failures of the server that a round tells apart."""

from server.errors import ServerUnavailableError, SternaError


class ServerDownError(ServerUnavailableError):
    """It did not come back within our patience."""


class RefusedError(SternaError):
    """It answered, and said no: `status` and its own message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
