"""Short texts from clients as both databases can store them: PostgreSQL refuses NUL, and columns have a width."""

from typing import overload


@overload
def short(text: str, max_length: int) -> str: ...
@overload
def short(text: None, max_length: int) -> None: ...
@overload
def short(text: str | None, max_length: int) -> str | None: ...


def short(text: str | None, max_length: int) -> str | None:
    """At most `max_length` characters; NUL and lone surrogates become U+FFFD."""
    if text is None:
        return None
    cleaned = text[:max_length].replace("\0", "\ufffd")
    return cleaned.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
