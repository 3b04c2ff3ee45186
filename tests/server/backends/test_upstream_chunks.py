"""Answers of differing servers become one shape: checked against the `openai` package's models, and put together."""

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from server.backends.upstream_chunks import ChatAnswer, CompletionAnswer
from server.errors import ServerUnavailableError
from server.openai.assemble import chat_draft, completion_draft
from tests.server.backends.fake_upstream import HEAD, HELLO, USAGE, delta
from tests.server.openai.validator import check_chat, check_chat_chunk, check_completion, check_completion_chunk

OUR_USAGE = {
    "prompt_tokens": 11,
    "completion_tokens": 4,
    "total_tokens": 15,
    "prompt_tokens_details": {"cached_tokens": 8},
}


def chat(*values: dict[str, Any], is_done: bool = True) -> dict[str, Any]:
    """The unstreamed answer; every chunk on the way is checked."""
    answer, draft = ChatAnswer("asked-for"), chat_draft()
    kept: list[dict[str, Any]] = []
    for value in values:
        kept += [{**answer.head, "choices": [choice]} for choice in answer.push(value)]
    answer.stem.end(is_done=is_done)
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in kept)
    kept += [{**answer.head, "choices": [choice]} for choice in answer.finish()]
    kept.append({**answer.head, "choices": [], "usage": answer.stem.usage})
    for chunk in kept:
        check_chat_chunk(chunk)
        draft.add(chunk)
    body = draft.body()
    check_chat(body)
    return body


def choice(*values: dict[str, Any], is_done: bool = True) -> dict[str, Any]:
    [only] = chat(*values, is_done=is_done)["choices"]
    return only


def message(part: dict[str, Any]) -> dict[str, Any]:
    return choice(delta(part), delta({}, end="stop"))["message"]


def test_openais_own_stream() -> None:
    body = chat(*HELLO)
    assert body == {
        "id": "chatcmpl-AbC123",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "asked-for",
        "system_fingerprint": "fp_1",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello!", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": OUR_USAGE,
    }


def test_a_whole_answer_is_read_like_a_stream() -> None:
    calls = [
        {"id": "call_8Xk2mQ9vT4bR7nL3pW6sZ1yD", "type": "function", "function": {"name": "f", "arguments": "{}"}},
        {"id": "call_9Xk2mQ9vT4bR7nL3pW6sZ1yD", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]
    spoken = {"role": "assistant", "content": None, "refusal": None, "tool_calls": calls, "annotations": []}
    whole = {"index": 0, "message": spoken, "logprobs": None, "finish_reason": "tool_calls"}
    body = chat({**HEAD, "object": "chat.completion", "choices": [whole], "usage": USAGE})
    [answered] = body["choices"]
    assert answered["message"] == {"role": "assistant", "content": None, "refusal": None, "tool_calls": calls}
    assert answered["finish_reason"] == "tool_calls"
    assert body["usage"] == OUR_USAGE


def test_nulls_and_missing_fields_mean_nothing() -> None:
    nulls = {"role": None, "content": None, "tool_calls": None, "refusal": None, "reasoning": None}
    answered = choice(
        {"choices": None},
        {"choices": [], "prompt_filter_results": []},
        {"id": None, "choices": [{"delta": nulls, "finish_reason": ""}], "usage": None},
        {"choices": [{"delta": None, "text": None}]},
        {"choices": [{"delta": {"content": "x"}}], "x_groq": {"id": "1"}},
        {"choices": [{"delta": {}, "finish_reason": "stop"}]},
    )
    assert answered["message"] == {"role": "assistant", "content": "x", "refusal": None}


def test_what_the_head_lacks_is_made_up() -> None:
    first = chat({"choices": [{"delta": {"content": "x"}}]})
    second = chat({"id": "", "created": "now", "choices": [{"delta": {"content": "x"}}]})
    assert first["id"].startswith("chatcmpl-")
    assert first["id"] != second["id"]
    assert first["created"] > 1_700_000_000
    assert first["system_fingerprint"] is None
    assert first["usage"] is None


def test_all_chunks_have_the_first_ones_id() -> None:
    body = chat({**delta({"content": "a"}), "id": "one"}, {**delta({"content": "b"}), "id": "two"})
    assert (body["id"], body["choices"][0]["message"]["content"]) == ("one", "ab")


def test_choices_may_come_in_any_order() -> None:
    body = chat(
        delta({"content": "b"}, index=1),
        delta({"content": "a"}, index=0),
        delta({}, index=1, end="length"),
        delta({"content": "a"}, index=0, end="stop"),
    )
    assert [(one["message"]["content"], one["finish_reason"]) for one in body["choices"]] == [
        ("aa", "stop"),
        ("b", "length"),
    ]
    whole = chat({"choices": [{"message": {"content": text}} for text in "ab"]})
    assert [one["message"]["content"] for one in whole["choices"]] == ["a", "b"]


@pytest.mark.parametrize(
    ("part", "content", "reasoning"),
    [
        ({"content": "x", "reasoning_content": "why"}, "x", "why"),
        ({"content": "x", "reasoning": "why"}, "x", "why"),
        ({"content": "x", "reasoning": "why", "reasoning_content": "why"}, "x", "why"),
        ({"content": "x", "reasoning": {"effort": "high"}, "reasoning_details": []}, "x", None),
        ({"content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}, "xy", None),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "why"}]},
                    {"type": "text", "text": "x"},
                ]
            },
            "x",
            "why",
        ),
    ],
)
def test_content_and_reasoning(part: dict[str, Any], content: str, reasoning: str | None) -> None:
    answered = message(part)
    assert answered["content"] == content
    assert answered.get("reasoning_content") == reasoning


def test_a_refusal_is_kept() -> None:
    answered = choice(delta({"refusal": "I "}), delta({"refusal": "won't."}), delta({}, end="stop"))
    assert answered["message"] == {"role": "assistant", "content": None, "refusal": "I won't."}


@pytest.mark.parametrize(
    ("given", "ours"),
    [("stop", "stop"), ("content_filter", "content_filter"), ("STOP", "stop"), ("MAX_TOKENS", "length"),
     ("end_turn", "stop"), ("eos", "stop"), ("tool_use", "tool_calls"), ("model_length", "length")],
)  # fmt: skip
def test_finish_reasons(given: str, ours: str) -> None:
    assert choice(delta({"content": "x"}), delta({}, end=given))["finish_reason"] == ours


def test_an_unknown_finish_reason_is_a_stop_that_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert choice(delta({"content": "x"}, end="vibes"))["finish_reason"] == "stop"
    assert "'vibes' is not known" in caplog.text


def test_done_without_finish_reasons() -> None:
    assert choice(delta({"content": "x"}))["finish_reason"] == "stop"
    called = delta({"tool_calls": [{"index": 0, "id": "1", "function": {"name": "f", "arguments": "{}"}}]})
    assert choice(called)["finish_reason"] == "tool_calls"


def test_finish_reasons_without_done() -> None:
    assert choice(delta({"content": "x"}, end="stop"), is_done=False)["finish_reason"] == "stop"


def test_the_last_usage_counts_and_the_cached_tokens_have_two_names() -> None:
    early = {**delta({"content": "x"}), "usage": {**USAGE, "completion_tokens": 1}}
    late = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 7, "prompt_cache_hit_tokens": 3}}
    assert chat(early, late)["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 7,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3},
    }
    assert chat(early, {"choices": [], "usage": {"prompt_tokens": 5}})["usage"]["completion_tokens"] == 1


def test_logprobs() -> None:
    top = {"token": "a", "logprob": -0.5, "bytes": [97]}
    entries = [{**top, "top_logprobs": [top]}, {"token": "b", "logprob": -1, "bytes": None, "extra": 1}]
    first = delta({"content": "a"})
    first["choices"][0]["logprobs"] = {"content": entries[:1]}
    second = delta({})
    second["choices"][0]["logprobs"] = {"content": entries[1:], "refusal": None}
    assert choice(first, second)["logprobs"]["content"] == [
        entries[0],
        {"token": "b", "logprob": -1, "bytes": None, "top_logprobs": []},
    ]


@pytest.mark.parametrize(
    "value",
    [
        {"choices": {}},
        {"choices": ["x"]},
        {"choices": [{"delta": "x"}]},
        {"choices": [{"delta": {"content": 1}}]},
        {"choices": [{"delta": {"content": [{"type": "image_url"}]}}]},
        {"choices": [{"delta": {"reasoning_content": []}}]},
        {"choices": [{"delta": {"tool_calls": "x"}}]},
        {"choices": [{"delta": {}, "finish_reason": 1}]},
        {"choices": [{"delta": {}, "finish_reason": "error"}]},
        {"choices": [{"delta": {}, "finish_reason": "abort"}]},
        {"choices": [{"delta": {}, "logprobs": {"content": [{"token": "a"}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 0, "id": "1"}]}}]},
    ],
)
def test_what_cannot_be_read_is_a_failure(value: dict[str, Any]) -> None:
    with pytest.raises(ServerUnavailableError, match="upstream"):
        chat(value)


@pytest.mark.parametrize("values", [[], [{"choices": []}], [{"id": "x", "choices": [], "usage": USAGE}]])
def test_an_answer_without_a_choice_is_a_failure(values: Sequence[dict[str, Any]]) -> None:
    with pytest.raises(ServerUnavailableError, match="without a single choice"):
        chat(*values)


def test_an_answer_that_breaks_off_is_a_failure() -> None:
    ended, open_ = delta({"content": "a"}, end="stop"), delta({"content": "b"}, index=1)
    with pytest.raises(ServerUnavailableError, match="before it was complete"):
        chat(ended, open_, is_done=False)


def completion(*values: dict[str, Any]) -> dict[str, Any]:
    answer, draft = CompletionAnswer("asked-for"), completion_draft()
    choices = [one for value in values for one in answer.push(value)]
    answer.stem.end(is_done=True)
    for one in [*choices, *answer.finish()]:
        chunk = {**answer.head, "choices": [one]}
        check_completion_chunk(chunk)
        draft.add(chunk)
    draft.add({**answer.head, "choices": [], "usage": answer.stem.usage})
    body = draft.body()
    check_completion(body)
    return body


def test_completions_streamed_and_whole() -> None:
    logprobs = {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": None, "text_offset": [0]}
    streamed = completion(
        {"id": "cmpl-1", "choices": [{"index": 0, "text": "a", "logprobs": logprobs, "finish_reason": None}]},
        {"id": "cmpl-1", "choices": [{"index": 0, "text": "b", "logprobs": None, "finish_reason": "length"}]},
        {"id": "cmpl-1", "choices": [], "usage": USAGE},
    )
    [one] = streamed["choices"]
    assert (one["text"], one["finish_reason"]) == ("ab", "length")
    assert one["logprobs"] == {**logprobs, "top_logprobs": []}
    assert streamed["usage"] == OUR_USAGE
    whole = completion({"choices": [{"text": text, "finish_reason": "stop"} for text in "xy"]})
    assert [one["text"] for one in whole["choices"]] == ["x", "y"]
    assert whole["id"].startswith("cmpl-")


@pytest.mark.parametrize("value", [{"choices": [{"text": 1}]}, {"choices": [{"text": "x", "finish_reason": "abort"}]}])
def test_an_unreadable_completion_is_a_failure(value: dict[str, Any]) -> None:
    with pytest.raises(ServerUnavailableError, match="upstream"):
        completion(value)
