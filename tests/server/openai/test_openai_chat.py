"""Chat completions through the official client over a scripted engine."""

import json
from typing import Any

import pytest

from tests.server.openai.harness import MODEL, Harness, async_test, serving
from tests.server.openai.scripted import FINGERPRINT, Answer

USER = [{"role": "user", "content": "hi"}]
PROMPT = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def prompt_of(h: Harness, index: int = -1) -> str:
    return h.engine.tokenizer.decode(h.engine.submitted[index].token_ids, skip_special=False)


async def chat(h: Harness, **fields: Any) -> Any:
    return await h.client.chat.completions.create(**{"model": MODEL, "messages": USER, **fields})


@async_test
async def test_answer_and_usage() -> None:
    async with serving(Answer("Hello!", num_cached_tokens=16)) as h:
        answer = await chat(h)
    assert answer.choices[0].message.content == "Hello!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.system_fingerprint == FINGERPRINT
    assert answer.model == MODEL
    assert prompt_of(h) == PROMPT
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(h.engine.submitted[0].token_ids), 7)
    assert usage.total_tokens == usage.prompt_tokens + 7
    assert usage.prompt_tokens_details.cached_tokens == 16


@async_test
async def test_defaults_are_openais() -> None:
    async with serving() as h:
        await chat(h)
    params = h.engine.submitted[0].params
    assert (params.temperature, params.top_p, params.top_k, params.seed) == (1.0, 1.0, 0, None)
    assert params.max_tokens == 2048 - len(h.engine.submitted[0].token_ids)


@async_test
async def test_every_sampling_field_reaches_the_engine() -> None:
    async with serving() as h:
        await chat(
            h,
            temperature=0.5,
            top_p=0.25,
            presence_penalty=-1,
            frequency_penalty=1.5,
            logit_bias={"5": -100},
            seed=-1,
            max_completion_tokens=9,
            extra_body={
                "top_k": 3,
                "min_p": 0.125,
                "repetition_penalty": 1.25,
                "ignore_eos": True,
                "min_tokens": 2,
                "stop_token_ids": [7],
                "speculation": False,
            },
        )
    params = h.engine.submitted[0].params
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (0.5, 0.25, 3, 0.125)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (-1, 1.5, 1.25)
    assert (params.logit_bias, params.seed, params.max_tokens, params.min_tokens) == ({5: -100.0}, 2**64 - 1, 9, 2)
    assert (params.ignore_eos, params.stop_token_ids, params.speculation) == (True, frozenset({7}), False)


@async_test
async def test_stream_has_a_role_text_a_reason_and_usage_when_asked() -> None:
    async with serving("Hé!") as h:
        stream = await chat(h, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in middle] == ["H", "é", "!"]
    assert last.choices[0].finish_reason == "stop"
    assert usage.choices == []
    assert usage.usage.completion_tokens == 5  # H, two bytes of é, !, and the end
    assert {chunk.id for chunk in chunks} == {first.id}


@async_test
async def test_stream_without_usage_has_no_usage_chunk() -> None:
    async with serving() as h:
        chunks = [chunk async for chunk in await chat(h, stream=True)]
    assert all(chunk.choices for chunk in chunks)
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


@async_test
async def test_several_choices_share_a_seed_and_differ_in_index() -> None:
    async with serving(lambda ids, params: Answer("abc"[params.choice])) as h:
        answer = await chat(h, n=3, seed=5)
        streamed = [chunk async for chunk in await chat(h, n=3, stream=True)]
    assert [choice.message.content for choice in answer.choices] == ["a", "b", "c"]
    assert answer.usage.completion_tokens == 6
    assert answer.usage.prompt_tokens == len(h.engine.submitted[0].token_ids)
    texts = ["", "", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["a", "b", "c"]


@async_test
async def test_stop_string_ends_the_answer_and_frees_the_sequence() -> None:
    async with serving(Answer("one two three", hang=True)) as h:
        answer = await chat(h, stop=["o t", "zzz"])
    assert answer.choices[0].message.content == "one tw"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len("one two t")
    assert h.engine.submitted[0].is_cancelled


@async_test
async def test_length() -> None:
    async with serving("a long answer") as h:
        answer = await chat(h, max_tokens=3)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("a l", "length")


@async_test
async def test_logprobs_cover_the_text_and_nothing_else() -> None:
    async with serving("aé|b") as h:
        answer = await chat(h, logprobs=True, top_logprobs=2, stop="|")
        without_top = await chat(h, logprobs=True)
    entries = answer.choices[0].logprobs.content
    assert [entry.token for entry in entries] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == answer.choices[0].message.content
    assert [len(entry.top_logprobs) for entry in entries] == [2, 2, 2]
    assert without_top.choices[0].logprobs.content[0].top_logprobs == []
    assert h.engine.submitted[1].params.num_logprobs == 0


@async_test
async def test_minus_infinity_becomes_openais_minus_9999() -> None:
    async with serving(Answer("a", logprob=float("-inf"))) as h:
        answer = await chat(h, logprobs=True)
    assert answer.choices[0].logprobs.content[0].logprob == -9999.0


@async_test
async def test_tool_call_unstreamed_and_streamed() -> None:
    async with serving("Let me see. " + CALL) as h:
        answer = await chat(h, tools=[TOOL])
        chunks = [chunk async for chunk in await chat(h, tools=[TOOL], stream=True)]
    message = answer.choices[0].message
    assert answer.choices[0].finish_reason == "tool_calls"
    assert message.content == "Let me see."
    [call] = message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Köln"}
    deltas = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert (deltas[0].index, deltas[0].type, deltas[0].function.name) == (0, "function", "get_weather")
    assert deltas[0].id
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:])
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert "get_weather" in prompt_of(h)


@async_test
async def test_a_message_that_only_calls_has_null_content() -> None:
    async with serving(CALL) as h:
        answer = await chat(h, tools=[TOOL])
    assert answer.choices[0].message.content is None


@async_test
async def test_without_parallel_calls_the_first_is_kept_and_the_rest_not_computed() -> None:
    async with serving(Answer(f"{CALL}\n{CALL}", hang=True)) as h:
        answer = await chat(h, tools=[TOOL], parallel_tool_calls=False)
    assert len(answer.choices[0].message.tool_calls) == 1
    assert answer.choices[0].finish_reason == "tool_calls"
    assert h.engine.submitted[0].is_cancelled


@async_test
async def test_tool_choice_none_neither_shows_tools_nor_looks_for_calls() -> None:
    async with serving(CALL) as h:
        answer = await chat(h, tools=[TOOL], tool_choice="none")
    assert answer.choices[0].message.content == CALL
    assert answer.choices[0].message.tool_calls is None
    assert prompt_of(h) == PROMPT


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
@async_test
async def test_forced_calls_are_constrained(choice: Any) -> None:
    async with serving(CALL) as h:
        answer = await chat(h, tools=[TOOL], tool_choice=choice)
    assert h.engine.submitted[0].grammar is not None
    assert answer.choices[0].finish_reason == "tool_calls"


@async_test
async def test_every_choice_has_a_grammar_of_its_own() -> None:
    async with serving("{}") as h:
        await chat(h, response_format={"type": "json_object"}, n=2)
    first, second = (one.grammar for one in h.engine.submitted)
    assert first is not None
    assert first is not second


@async_test
async def test_response_formats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    async with serving('{"a": 1}') as h:
        await chat(h, response_format={"type": "text"})
        await chat(h, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert h.engine.submitted[0].grammar is None
    assert h.engine.submitted[1].grammar is not None


@async_test
async def test_reasoning_is_split_off() -> None:
    async with serving("<think>Hmm.</think>\n\nYes.") as h:
        answer = await chat(h)
        chunks = [chunk async for chunk in await chat(h, stream=True)]
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("Hmm.", "Yes.")
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "Hmm."


@async_test
async def test_history_with_tools_developer_parts_and_nulls() -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city":'}}
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "hi", "name": "ann"},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
        {"role": "user", "content": "so?"},
    ]
    async with serving() as h:
        await chat(h, messages=messages)
    text = prompt_of(h)
    assert "Be brief." in text
    assert '"get_weather"' in text
    assert "rain" in text


@async_test
async def test_continue_final_message() -> None:
    messages = [*USER, {"role": "assistant", "content": "The answer is"}]
    async with serving(" 4.") as h:
        answer = await chat(h, messages=messages, extra_body={"continue_final_message": True})
    assert prompt_of(h).endswith("<|im_start|>assistant\nThe answer is")
    assert answer.choices[0].message.content == " 4."


@async_test
async def test_harmless_fields_are_accepted() -> None:
    async with serving() as h:
        answer = await chat(
            h,
            user="ann",
            metadata={"a": "b"},
            store=False,
            service_tier="auto",
            safety_identifier="x",
            prompt_cache_key="k",
            reasoning_effort="low",
            verbosity="low",
            modalities=["text"],
            stop=None,
            logit_bias=None,
        )
    assert answer.choices[0].message.content == "Hello!"


@async_test
async def test_a_model_without_template_answers_completions_only() -> None:
    async with serving(template=None) as h:
        refused = await h.post("/v1/chat/completions", {"model": MODEL, "messages": USER})
        answer = await h.client.completions.create(model=MODEL, prompt="hi")
    assert refused.status_code == 400
    assert "no chat template" in refused.json()["error"]["message"]
    assert answer.choices[0].text == "Hello!"
