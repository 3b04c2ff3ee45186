"""Named failures of the database."""

from server.errors import ServerUnavailableError


class DatabaseUnavailableError(ServerUnavailableError):
    """The database cannot be reached, is locked by somebody else, is full or damaged; the message says which."""
