"""The default model's own template and tokenizer, on questions with tools: nothing is skewed, everything comes back."""

import asyncio
from pathlib import Path

import pytest

from finetune.dataset.render import Renderer, chat_request
from finetune.dataset.source import read_by_seq
from finetune.dataset.token_classes import TokenClass
from server.app import create_app
from server.config import Settings
from server.runtime import open_runtime
from tests.server.openai.harness import asgi_client, async_test
from tests.server.traces.builders import assistant, call, result, user

pytestmark = pytest.mark.real_model

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "currency_convert",
            "description": "Convert money.",
            "parameters": {"type": "object", "properties": {"amount": {"type": "number"}, "to": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def renderer(default_model: Path) -> Renderer:
    return Renderer.open(default_model)


def test_calls_and_their_classes_on_the_default_model(renderer: Renderer) -> None:
    arguments = '{"amount": 1250.5, "to": "Swiss francs \\u2013 \\"CHF\\""}'
    made = call("currency_convert", '{"amount": 3}', "call_x")
    history = [user("Change 3"), assistant(None, made), result("call_x", "3.3"), user("And 1250.50 to francs?")]
    asked = chat_request({"messages": history, "tools": TOOLS})
    rendered = renderer.answer(asked, assistant(None, call("currency_convert", arguments)))
    assert rendered.prompt_ids == renderer.planner.plan(asked, max_model_len=8192).token_ids

    def text(kind: TokenClass) -> str:
        picked = [i for i, c in zip(rendered.answer_ids, rendered.classes, strict=True) if c == kind]
        return renderer.tokenizer.decode(picked)

    assert text(TokenClass.TOOL_NAME) == "currency_convert"
    assert text(TokenClass.ARGUMENT_KEY) == "amountto"
    assert text(TokenClass.ARGUMENT_VALUE).replace(" ", "").startswith("1250.5Swissfrancs–")
    assert rendered.answer_ids[-1] in renderer.tokenizer.eog_token_ids
    assert rendered.answer_ids[:-1] == renderer.tokenizer.encode(
        renderer.tokenizer.decode(rendered.answer_ids[:-1]), add_special=False, parse_special=True
    )


def test_an_answer_that_begins_with_a_newline_keeps_the_prompts_tokens(renderer: Renderer) -> None:
    """The vocabulary has a token for two newlines; the prompt ends with one."""
    asked = chat_request({"messages": [user("Hi")]})
    rendered = renderer.answer(asked, assistant("\nHello"))
    assert rendered.prompt_ids == renderer.prompt(asked)
    assert renderer.tokenizer.decode(rendered.answer_ids) == "\nHello"


@async_test
async def test_what_the_default_model_was_served_is_what_is_trained_on(default_model: Path, tmp_path: Path) -> None:
    """Through HTTP, the engine and the log: three turns with a call made up by the client, an answer, and a tool
    result. The log's ids are those that are rendered anew, with digests that agree."""
    renderer = await asyncio.to_thread(Renderer.open, default_model)
    settings = Settings(data_dir=tmp_path, model=str(default_model), kv_memory=256 << 20, max_model_len=2048)
    app = create_app(open_runtime(settings), is_loopback=True)
    made = call("currency_convert", '{"amount":3,"to":"francs"}', "call_x")
    messages = [user("Change 3 dollars."), assistant(None, made), result("call_x", '{"francs": 2.7}')]
    async with app.router.lifespan_context(app), asgi_client(app) as http:
        while not app.state.service.is_open:  # noqa: ASYNC110 - loading is a task; it needs a turn or two
            await asyncio.sleep(0.01)
        name = (await http.get("/v1/models")).json()["data"][0]["id"]
        for _ in range(2):
            body = {"model": name, "messages": messages, "tools": TOOLS, "temperature": 0, "max_tokens": 400}
            answer = (await http.post("/v1/chat/completions", json=body)).json()["choices"][0]
            messages = [*messages, answer["message"], user("Thanks. And is that much?")]
        found = read_by_seq(app.state.service.parts().records.database, [1, 2])
    mine = renderer.identity
    num_whole = 0
    for trace in found.values():
        assert (trace.template_digest, trace.tokenizer_digest) == (mine.template_digest, mine.tokenizer_digest)
        asked = chat_request(trace.request)
        assert trace.prompt_ids == renderer.prompt(asked)
        if trace.answers[0]["finish_reason"] == "stop":
            assert trace.completion_ids is not None
            rendered = renderer.answer(asked, trace.answers[0]["message"])
            assert rendered.prompt_ids == trace.prompt_ids
            assert rendered.answer_ids == list(trace.completion_ids[0])
            num_whole += 1
    assert num_whole
