"""Whether the result of a tool call reports an error. OpenAI's wire has no field for it, so the content has to tell.

It is an error when the content, spaces around it left out,
- is a JSON object with a truthy `error`, `errors`, `is_error` or `isError`, with `success` or `ok` false, or with a
  `status` of "error", "failed", "failure" or a number from 400 to 599;
- or is text that begins with "Error", "Exception", "Failed" or "Fatal" as a word of its own followed by a colon or a
  few more words before one ("Error executing tool x: ..."), with the name of a Python exception and a colon
  ("ValueError: ..."), or with "Traceback (most recent call last)".
Anything else is a success, also an empty result. The rules prefer to miss an error over seeing one where there is none.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

_TRUTHY_MEANS_ERROR = ("error", "errors", "is_error", "isError")
_FALSE_MEANS_ERROR = ("success", "ok")
_BAD_STATUS = ("error", "failed", "failure")

_BEGINS_WITH_ERROR = re.compile(
    r"(?:error|exception|failed|fatal)\b[^:\n.]{0,60}:"  # 60: a tool's name and "executing tool" before the colon
    r"|(?:[a-z_][\w.]{0,80})?(?:error|exception)\s*:"
    r"|traceback \(most recent call last\)",
    re.IGNORECASE,
)


def is_error_result(message: Mapping[str, Any]) -> bool:
    """`message`: one of role tool."""
    content = message.get("content")
    if not isinstance(content, str):
        content = "".join(str(part.get("text", "")) for part in content or ())
    content = content.strip()
    if content.startswith("{"):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and _reports_error(value)
    return _BEGINS_WITH_ERROR.match(content) is not None


def _reports_error(value: dict[str, Any]) -> bool:
    if any(value.get(key) for key in _TRUTHY_MEANS_ERROR):
        return True
    if any(value.get(key) is False for key in _FALSE_MEANS_ERROR):
        return True
    status = value.get("status")
    if isinstance(status, str):
        return status.strip().lower() in _BAD_STATUS
    return isinstance(status, int) and not isinstance(status, bool) and 400 <= status <= 599
