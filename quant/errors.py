"""Named failures of the quant room. No HTTP here: the server maps them to an exit code."""


class ModelFileError(ValueError):
    """A model file that cannot be served, named by file, tensor (or metadata key) and reason."""

    def __init__(self, path: object, reason: str, *, tensor: str | None = None) -> None:
        self.path = str(path)
        self.tensor = tensor
        self.reason = reason
        where = f"{self.path}: {_printable(tensor)}" if tensor else self.path
        super().__init__(f"{where}: {reason}")


def _printable(name: str) -> str:
    """A name from an untrusted file, kept to one short line."""
    shown = name if name.isprintable() else ascii(name)
    return shown if len(shown) <= 120 else f"{shown[:117]}..."
