"""Query parameters of the admin API: known names, each once.

Read here and not by FastAPI, whose own reading takes unknown names and answers in another error shape.
"""

from collections.abc import Collection, Mapping
from typing import Any

from starlette.requests import Request

from server.errors import InvalidRequestError


def read_query(http: Request, known: Mapping[str, str], *required: str) -> dict[str, str]:
    """Raises InvalidRequestError for a name that is unknown, given twice, or missing."""
    found: dict[str, str] = {}
    for name, value in http.query_params.multi_items():
        if name not in known:
            raise InvalidRequestError(
                f"Unrecognized query parameter: {name[:100]} (there are {', '.join(known)})",
                param=name[:100],
                code="unknown_parameter",
            )
        if name in found:
            raise InvalidRequestError(f"'{name}' is given twice.", param=name, code="invalid_value")
        found[name] = value
    for name in required:
        if name not in found:
            raise InvalidRequestError(
                f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
            )
    return found


def query_parameters(
    known: Mapping[str, str], *required: str, choices: Mapping[str, Collection[str]] | None = None
) -> dict[str, Any]:
    """`openapi_extra` of a route that reads a query. `choices`: the accepted values of some."""
    enums = choices or {}
    return {
        "parameters": [
            {
                "name": name,
                "in": "query",
                "required": name in required,
                "description": text,
                "schema": {"type": "string"} | ({"enum": list(enums[name])} if name in enums else {}),
            }
            for name, text in known.items()
        ]
    }
