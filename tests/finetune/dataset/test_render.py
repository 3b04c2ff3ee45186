"""What is trained on is what would be served: prompts, answers and their classes, token by token."""

from typing import Any

import pytest

from finetune.dataset.errors import UnrenderableError
from finetune.dataset.render import Renderer, chat_request
from finetune.dataset.token_classes import TokenClass, classify_text
from server.tools.formats import HERMES, LLAMA3_JSON, MISTRAL
from tests.server.openai.scripted import CHATML, byte_tokenizer
from tests.server.text import templates
from tests.server.traces.builders import Message, assistant, call, result, system, tool, user

TOOLS = [tool("weather"), tool("add")]
OPENS_THINKING = CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(byte_tokenizer(), CHATML, "sha256:base")


def request(messages: list[Message], tools: list[Message] | None = TOOLS, **more: Any) -> Any:
    return chat_request({"messages": messages, "tools": tools} | more)


def text_of(renderer: Renderer, ids: list[int]) -> str:
    return renderer.tokenizer.decode(ids, skip_special=False)


def test_a_call_is_rendered_as_the_parser_reads_it(renderer: Renderer) -> None:
    answer = assistant(None, call("weather", '{"city": "Zürich", "days": 3}'))
    rendered = renderer.answer(request([user("Weather?")]), answer)
    assert text_of(renderer, rendered.answer_ids) == (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Zürich", "days": 3}}\n</tool_call><|im_end|>'
    )
    prompt = text_of(renderer, rendered.prompt_ids)
    assert prompt.endswith("<|im_start|>assistant\n")
    read = renderer.parse(request([user("Weather?")]), prompt, rendered.answer_ids)
    assert read["calls"] == [("weather", '{"city": "Zürich", "days": 3}')]


def test_text_and_two_calls_come_back(renderer: Renderer) -> None:
    answer = assistant("Both:", call("add", '{"a": 1}'), call("weather", "{}"))
    rendered = renderer.answer(request([user("?")]), answer)
    read = renderer.parse(request([user("?")]), "", rendered.answer_ids)
    assert read == {"content": "Both:", "reasoning": "", "calls": [("add", '{"a": 1}'), ("weather", "{}")]}


def test_the_prompt_is_the_planners(renderer: Renderer) -> None:
    """Multi-turn, with tool results: the very ids that serving plans."""
    first = call("add", '{"a":1,"b":2}', "call_1")
    messages = [system("Be brief."), user("1+2?"), assistant(None, first), result("call_1", "3"), user("And 3+4?")]
    asked = request(messages)
    assert renderer.prompt(asked) == renderer.planner.plan(asked, max_model_len=4096).token_ids
    assert renderer.answer(asked, assistant("7")).prompt_ids == renderer.prompt(asked)


def test_switched_off_tools_are_not_in_the_prompt(renderer: Renderer) -> None:
    prompt = text_of(renderer, renderer.prompt(request([user("Hi")], tool_choice="none")))
    assert "<tools>" not in prompt


def test_logged_ids_count_only_with_their_end_of_turn(renderer: Renderer) -> None:
    end = renderer.tokenizer.token_to_id("<|im_end|>")
    assert end is not None
    asked = request([user("Hi")])
    served = renderer.served(asked, [1, 2], [40, 41, end])
    assert served is not None
    assert (served.prompt_ids, served.answer_ids) == ([1, 2], [40, 41, end])
    assert renderer.served(asked, [1], [40, 41]) is None
    assert renderer.served(asked, [1], [40, end, 41, end]) is None


def test_a_template_without_an_end_of_turn_gets_the_tokenizers() -> None:
    plain = Renderer(byte_tokenizer(NO_END), NO_END, "b")
    rendered = plain.answer(request([user("Hi")], None), assistant("Hello"))
    assert rendered.answer_ids[-1] == plain.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (assistant("stop<|im_end|>here"), "does not come back"),
        (assistant("a <|im_start|> b"), "special token"),
        (assistant(None, call("unknown")), "does not come back"),
        (assistant(None, call("add", "not json")), "does not come back"),
        ({"role": "assistant", "content": "x", "reasoning_content": "hm"}, "leaves out the answer's reasoning"),
        ({"role": "assistant"}, "needs 'content' or 'tool_calls'"),
        ({"role": "user", "content": "x"}, "assistant"),
    ],
)
def test_an_answer_that_would_not_come_back_is_refused(renderer: Renderer, answer: Message, reason: str) -> None:
    with pytest.raises(UnrenderableError, match=reason):
        renderer.answer(request([user("?")]), answer)


def test_a_prompt_that_opens_reasoning_is_no_prefix_of_its_answer() -> None:
    thinking = Renderer(byte_tokenizer(OPENS_THINKING), OPENS_THINKING, "b")
    with pytest.raises(UnrenderableError, match="continuation"):
        thinking.answer(request([user("?")], None), assistant("x"))


@pytest.mark.parametrize("style", ["chatml", "qwen2.5"])
@pytest.mark.parametrize("answer", [assistant(None, call("add", '{"a": [1, 2.5]}')), assistant("No tool fits.")])
def test_styles_of_templates_with_tools(style: str, answer: Message) -> None:
    """With an earlier call in the history; what does not come back equal to the message would raise."""
    first = call("add", '{"a": 1}', "call12345")
    check_style(style, request([user("1?"), assistant(None, first), result("call12345", "1"), user("2?")]), answer)


@pytest.mark.parametrize("style", ["qwen3", "mistral"])
def test_styles_of_templates(style: str) -> None:
    check_style(style, request([user("1?"), assistant("One."), user("2?")], None), assistant("Two."))


def check_style(style: str, asked: Any, answer: Message) -> None:
    styled = Renderer(byte_tokenizer(templates.ALL[style]), templates.ALL[style], "b")
    rendered = styled.answer(asked, answer)
    assert rendered.prompt_ids == styled.planner.plan(asked, max_model_len=8192).token_ids
    assert rendered.answer_ids[-1] == styled.tokenizer.eos_token_id


def test_an_answer_may_begin_like_its_prompt_ends(renderer: Renderer) -> None:
    rendered = renderer.answer(request([user("?")], None), assistant("\n\nlines"))
    assert text_of(renderer, rendered.answer_ids) == "\n\nlines<|im_end|>"


def shown(text: str, form: Any = HERMES, *, opened: bool = False) -> str:
    """One letter a character: s, a, t, k, v, n."""
    return "".join("satkvn"[kind] for kind in classify_text(text, form, ("f", "g"), opened=opened))


@pytest.mark.parametrize(
    ("form", "text", "letters"),
    [
        (HERMES, "Hi there", "aaaaaaaa"),
        (
            HERMES,
            'ok <tool_call>{"name": "f", "arguments": {"k": "v", "n": [1, {"m": true}]}}</tool_call>',
            "aaassssssssssssssssssssnssssssssssssssssssksssssvssssksssvssssskssssvvvvsssssssssssssssss",
        ),
        (HERMES, '<tool_call>{"name": "zz", "arguments": {}}</tool_call>', "a" * 54),
        (HERMES, "<tool_call> no", "a" * 14),
        (LLAMA3_JSON, '{"name": "f", "parameters": {"k": 1}}', "ssssssssssnsssssssssssssssssssksssvss"),
        (MISTRAL, '[TOOL_CALLS][{"name":"f","arguments":{"k":"v"}},{"name":"g","arguments":{}}]', None),
    ],
)
def test_characters_by_class(form: Any, text: str, letters: str | None) -> None:
    found = shown(text, form)
    picked = {kind: "".join(c for c, k in zip(text, found, strict=True) if k == kind) for kind in "satkvn"}
    if letters is None:
        assert (picked["n"], picked["k"], picked["v"], picked["a"]) == ("fg", "k", "v", "")
    elif "tool_call" in text and "n" in letters:
        assert (picked["n"], picked["k"], picked["v"], picked["a"]) == ("f", "knm", "v1true", "ok ")
    else:
        assert found == letters


def test_thinking_comes_first() -> None:
    assert shown("<think>hm</think>ok") == "t" * 17 + "aa"
    assert shown("hm</think>ok", opened=True) == "t" * 10 + "aa"
    assert shown("hm", opened=True) == "tt"


def test_tokens_take_their_highest_class_and_the_end_of_turn_goes_with_the_answer(renderer: Renderer) -> None:
    asked = request([user("?")])
    call_classes = renderer.answer(asked, assistant(None, call("add", '{"ä": "ö"}'))).classes
    counts = {kind: int((call_classes == kind).sum()) for kind in TokenClass}
    assert counts[TokenClass.TOOL_NAME] == 3
    assert counts[TokenClass.ARGUMENT_KEY] == counts[TokenClass.ARGUMENT_VALUE] == 2  # two bytes each
    assert counts[TokenClass.ANSWER] == counts[TokenClass.THINKING] == 0
    assert call_classes[-1] == TokenClass.STRUCTURE
    text_classes = renderer.answer(asked, assistant("no tool fits")).classes
    assert set(text_classes.tolist()) == {TokenClass.ANSWER}
