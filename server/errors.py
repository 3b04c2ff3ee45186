"""Named failures of the serving room; `server/openai/errors.py` maps them to HTTP, the CLI to an exit code."""


class SternaError(Exception):
    """Base of everything that is the caller's or the operator's fault."""


class InvalidRequestError(SternaError):
    """The request is wrong: `param` names the field, `code` is OpenAI's machine-readable code if it has one."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class ModelNotFoundError(SternaError):
    """No model or adapter goes by the requested name."""


class QueueFullError(SternaError):
    """The waiting queue is full; try again after `retry_after_seconds`."""

    def __init__(self, message: str, *, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class ServerUnavailableError(SternaError):
    """The server is loading, draining or broken; the message says which."""


class UpstreamError(SternaError):
    """The server behind us refused the request: `status` and the rest are what our client is told.

    `retry_after` is its Retry-After header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        retry_after: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.type = type
        self.param = param
        self.code = code
        self.retry_after = retry_after


class AdapterError(SternaError):
    """An adapter that cannot be served, with the tensor or key and the reason."""


class ConfigError(SternaError):
    """Settings, a model name or the machine do not allow what was asked for."""


class UsageError(ConfigError):
    """The command line, the environment or the settings file is wrong: exit code 2."""
