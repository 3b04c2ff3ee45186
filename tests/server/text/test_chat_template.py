"""Chat templates: what they render, what they refuse, and what they may not reach."""

import pytest

from server.errors import ConfigError, InvalidRequestError
from server.text.chat_template import ChatTemplate
from tests.server.text import templates

_HELLO = [{"role": "user", "content": "Hello"}]


def _template(text: str) -> ChatTemplate:
    return ChatTemplate(text, bos_token="<s>", eos_token="</s>")


def _render(text: str, **variables: object) -> str:
    return _template(text).render(_HELLO, tools=None, template_kwargs=variables)


def test_chatml() -> None:
    assert _template(templates.CHATML).render(_HELLO, tools=None) == (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_generation_prompt() -> None:
    text = _template(templates.CHATML).render(_HELLO, tools=None, add_generation_prompt=False)
    assert text.endswith("Hello<|im_end|>\n")


@pytest.mark.parametrize(
    ("text", "supports_tools"),
    [
        (templates.CHATML, False),
        (templates.LLAMA3, True),
        (templates.QWEN25, True),
        (templates.QWEN3, True),
        (templates.MISTRAL, False),
        ("{# tools #}{{ 'tools' }}{{ message.tools }}{% set tools = 1 %}{{ tools }}", False),
        ("{% if tools %}x{% endif %}", True),
        ("{% macro f(tools) %}{{ tools }}{% endmacro %}{{ f(1) }}", False),
    ],
)
def test_tool_support_is_read_from_the_syntax_tree(text: str, supports_tools: bool) -> None:
    assert _template(text).supports_tools is supports_tools


def test_raise_exception_is_the_requests_fault() -> None:
    chat = [{"role": "assistant", "content": "I begin"}]
    with pytest.raises(InvalidRequestError, match="roles must alternate") as caught:
        _template(templates.MISTRAL).render(chat, tools=None)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[5].content }}",
        "{{ 'a' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].content.split(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ missing.attribute }}",
        "{{ {}['x'].y }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ dict.mro() }}",
    ],
)
def test_template_faults_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequestError, match="chat template cannot render"):
        _render(text)


def test_syntax_error_names_the_line() -> None:
    with pytest.raises(ConfigError, match="chat template: line 2"):
        _template("\n{% if %}")


def test_tojson_escapes_neither_html_nor_other_scripts() -> None:
    assert _render("{{ x | tojson }}", x={"a": "<é&'\">"}) == '{"a": "<é&\'\\">"}'
    assert _render("{{ x | tojson(indent=2) }}", x={"a": [1]}) == '{\n  "a": [\n    1\n  ]\n}'
    assert _render("{{ x | tojson(true) }}", x="é") == '"\\u00e9"'
    assert _render("{{ x | tojson(separators=(',', ':'), sort_keys=true) }}", x={"b": 1, "a": 2}) == '{"a":2,"b":1}'


def test_blocks_are_trimmed() -> None:
    assert _render("a\n  {% if true %}\n  b\n  {% endif %}\nc\n") == "a\n  b\nc"


def test_the_generation_tag_renders_its_body() -> None:
    assert _render("[{% generation %}{{ messages[0].content }}{% endgeneration %}]") == "[Hello]"


def test_special_tokens_and_keyword_arguments() -> None:
    template = ChatTemplate(
        "{{ bos_token }}{{ unk_token }}{{ x }}", bos_token="<s>", eos_token="", special_tokens={"unk_token": "<unk>"}
    )
    assert template.render(_HELLO, tools=None, template_kwargs={"x": 5}) == "<s><unk>5"
    assert template.render(_HELLO, tools=None, template_kwargs={"bos_token": "B"}) == "B<unk>"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "chat_template"])
def test_keyword_arguments_cannot_replace_the_request(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=name) as caught:
        _render("x", **{name: []})
    assert caught.value.param == "chat_template_kwargs"


def test_thinking_is_switched_by_a_keyword_argument() -> None:
    template = _template(templates.QWEN3)
    text = template.render(_HELLO, tools=None, template_kwargs={"enable_thinking": False})
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert template.render(_HELLO, tools=None).endswith("<|im_start|>assistant\n")


def test_rendering_does_not_change_the_callers_messages() -> None:
    chat = [{"role": "assistant", "content": "Hel"}]
    _template(templates.CHATML).render(chat, tools=None, add_generation_prompt=False, continue_final_message=True)
    assert chat == [{"role": "assistant", "content": "Hel"}]


@pytest.mark.parametrize(("content", "end"), [("The answer is", "The answer is"), ("It is ", "It is ")])
def test_continue_final_message(content: str, end: str) -> None:
    chat = [*_HELLO, {"role": "assistant", "content": content}]
    text = _template(templates.CHATML).render(
        chat, tools=None, add_generation_prompt=False, continue_final_message=True
    )
    assert text.endswith("<|im_start|>assistant\n" + end)


def test_continue_final_message_that_the_template_trims() -> None:
    chat = [*_HELLO, {"role": "assistant", "content": "It is "}]
    text = _template(templates.LLAMA3).render(
        chat, tools=None, add_generation_prompt=False, continue_final_message=True
    )
    assert text.endswith("\n\nIt is")


def test_continuing_what_the_template_does_not_render_is_refused() -> None:
    chat = [*_HELLO, {"role": "tool", "content": "x"}]
    with pytest.raises(InvalidRequestError, match="does not render the final message") as caught:
        _template(templates.MISTRAL).render(chat, tools=None, add_generation_prompt=False, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_continuing_and_prompting_exclude_each_other() -> None:
    with pytest.raises(InvalidRequestError, match="exclude each other"):
        _template(templates.CHATML).render(_HELLO, tools=None, continue_final_message=True)


def test_digest_is_of_the_text() -> None:
    first, same, other = (_template(text).digest for text in ("a", "a", "b"))
    assert first == same != other
    assert first.startswith("sha256:")
