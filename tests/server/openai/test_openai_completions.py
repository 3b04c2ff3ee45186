"""Text completions through the official client over a scripted engine."""

from typing import Any

import pytest

from tests.server.openai.harness import MODEL, Harness, async_test, serving
from tests.server.openai.scripted import FINGERPRINT, Answer, bytes_to_ids


async def complete(h: Harness, **fields: Any) -> Any:
    return await h.client.completions.create(**{"model": MODEL, "prompt": "hi", **fields})


@async_test
async def test_answer_and_defaults() -> None:
    async with serving("a story that goes on and on") as h:
        answer = await complete(h)
    assert answer.choices[0].text == "a story that goe"
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].logprobs is None
    assert answer.system_fingerprint == FINGERPRINT
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 16)
    params = h.engine.submitted[0].params
    assert (params.max_tokens, params.temperature, params.num_logprobs) == (16, 1.0, None)


@pytest.mark.parametrize("kind", ["string", "strings", "ids", "id lists"])
@async_test
async def test_every_kind_of_prompt(kind: str) -> None:
    async with serving(lambda ids, params: Answer(str(len(ids)))) as h:
        abc, de = (bytes_to_ids(h.engine.tokenizer, text) for text in (b"abc", b"de"))
        prompt = {"string": "abc", "strings": ["abc", "de"], "ids": abc, "id lists": [abc, de]}[kind]
        answer = await complete(h, prompt=prompt)
    assert h.engine.submitted[0].token_ids == abc
    expected = ["3", "2"] if kind in ("strings", "id lists") else ["3"]
    assert [choice.text for choice in answer.choices] == expected
    assert [choice.index for choice in answer.choices] == list(range(len(expected)))


@async_test
async def test_several_prompts_with_n_are_numbered_by_prompt() -> None:
    async with serving(lambda ids, params: Answer(f"{len(ids)}{params.choice}")) as h:
        answer = await complete(h, prompt=["a", "bb"], n=2)
    assert [choice.text for choice in answer.choices] == ["10", "11", "20", "21"]
    assert answer.usage.prompt_tokens == 3


@async_test
async def test_stream() -> None:
    async with serving("Hé") as h:
        stream = await complete(h, stream=True, stream_options={"include_usage": True})
        *chunks, usage = [chunk async for chunk in stream]
    assert [chunk.choices[0].text for chunk in chunks] == ["H", "é", ""]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "stop"]
    assert usage.usage.completion_tokens == 4


@async_test
async def test_logprobs_of_the_answer() -> None:
    async with serving("aé") as h:
        answer = await complete(h, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs.tokens == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert logprobs.text_offset == [0, 1, 1]
    assert logprobs.token_logprobs == [-0.5, -0.5, -0.5]
    assert all(token in top for token, top in zip(logprobs.tokens, logprobs.top_logprobs, strict=True))


@async_test
async def test_echo_with_logprobs_scores_the_prompt() -> None:
    async with serving("cd") as h:
        answer = await complete(h, prompt="ab", echo=True, logprobs=0)
    choice = answer.choices[0]
    assert choice.text == "abcd"
    assert choice.logprobs.tokens == ["a", "b", "c", "d"]
    assert choice.logprobs.text_offset == [0, 1, 2, 3]
    assert choice.logprobs.token_logprobs == [0.0, -1.5, -0.5, -0.5]
    assert choice.logprobs.top_logprobs[0] == {}
    assert h.engine.submitted[0].params.num_prompt_logprobs == 0


@async_test
async def test_echo_with_zero_tokens_only_scores() -> None:
    async with serving("cd") as h:
        answer = await complete(h, prompt="ab", echo=True, logprobs=1, max_tokens=0)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == ("ab", "length")
    assert choice.logprobs.tokens == ["a", "b"]
    assert answer.usage.completion_tokens == 0


@async_test
async def test_echo_of_token_ids_is_their_text() -> None:
    async with serving("!") as h:
        answer = await complete(h, prompt=bytes_to_ids(h.engine.tokenizer, "né".encode()), echo=True)
    assert answer.choices[0].text == "né!"


@async_test
async def test_best_of_ranks_by_mean_logprob() -> None:
    scores = [-2.0, -0.25, -1.0]
    async with serving(lambda ids, params: Answer(f"<{params.choice}>", logprob=scores[params.choice])) as h:
        answer = await complete(h, best_of=3, n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "<1>"), (1, "<2>")]
    assert answer.choices[0].logprobs is None
    assert answer.usage.completion_tokens == 12  # all three were computed


@async_test
async def test_stop_string_over_token_boundaries() -> None:
    async with serving(Answer("one\n\ntwo", cuts=[4, 3])) as h:
        answer = await complete(h, stop="\n\n")
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("one", "stop")
    assert answer.usage.completion_tokens == 5


@async_test
async def test_a_torn_character_at_the_end_is_a_replacement_character() -> None:
    async with serving(Answer("é".encode()[:1])) as h:
        answer = await complete(h)
    assert answer.choices[0].text == "\ufffd"


@async_test
async def test_tokenize_and_detokenize_in_vllms_shapes() -> None:
    async with serving() as h:
        ids = bytes_to_ids(h.engine.tokenizer, b"ab")
        tokens = (await h.post("/tokenize", {"model": MODEL, "prompt": "ab", "return_token_strs": True})).json()
        text = (await h.post("/detokenize", {"model": MODEL, "tokens": ids})).json()
        messages = [{"role": "user", "content": "hi"}]
        rendered = (await h.post("/tokenize", {"model": MODEL, "messages": messages})).json()
        await h.client.chat.completions.create(model=MODEL, messages=messages)
    assert tokens == {"count": 2, "max_model_len": 2048, "tokens": ids, "token_strs": ["a", "b"]}
    assert text == {"prompt": "ab"}
    assert rendered["tokens"] == h.engine.submitted[0].token_ids
