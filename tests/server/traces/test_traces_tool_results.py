"""Which results of tool calls count as errors, and who may say that a request is not logged."""

import pytest

from server.errors import InvalidRequestError
from server.traces.policy import unlogged_reason
from server.traces.tool_results import is_error_result
from tests.server.traces.builders import result

ERRORS = [
    '{"error": "no such file"}',
    ' {"is_error": true, "content": "x"}',
    '{"isError": true}',
    '{"errors": [1]}',
    '{"success": false}',
    '{"ok": false, "result": null}',
    '{"status": "error"}',
    '{"status": "Failed"}',
    '{"status": 404}',
    "Error: not found",
    "error: not found",
    "ERROR: not found",
    "Error executing tool search: timeout",
    "Error calling tool 'x': bad",
    "ValueError: not a number",
    "requests.exceptions.ConnectionError: refused",
    "Exception: x",
    "Traceback (most recent call last):\n  File",
    "Failed to open: x",
]
SUCCESSES = [
    "",
    "42",
    '{"error": null, "result": 1}',
    '{"error": false}',
    '{"errors": []}',
    '{"success": true}',
    '{"status": "ok"}',
    '{"status": 200}',
    '{"status": true}',
    '{"error',
    '["error"]',
    "No errors were found.",
    "Errors were found in 3 files: a, b, c",
    "Error handling in Python is done with try. Note: x",
    "The error: none",
    "failed tests 0",
]


@pytest.mark.parametrize("content", ERRORS)
def test_errors(content: str) -> None:
    assert is_error_result(result("c", content))
    assert is_error_result({"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": content}]})


@pytest.mark.parametrize("content", SUCCESSES)
def test_successes(content: str) -> None:
    assert not is_error_result(result("c", content))


def test_each_can_say_no() -> None:
    assert unlogged_reason(is_enabled=True, key_policy="on", header=None) is None
    assert unlogged_reason(is_enabled=True, key_policy="on", header=" ON ") is None
    assert unlogged_reason(is_enabled=True, key_policy="on", header="Off") == "request"
    assert unlogged_reason(is_enabled=True, key_policy="off", header="on") == "key"
    assert unlogged_reason(is_enabled=False, key_policy="on", header="on") == "settings"
    with pytest.raises(InvalidRequestError, match="'on' or 'off', not 'no'"):
        unlogged_reason(is_enabled=True, key_policy="on", header="no")
