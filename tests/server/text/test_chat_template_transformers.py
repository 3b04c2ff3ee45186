"""Chat templates render what `transformers` renders from the same template, messages and tools."""

from typing import Any

import pytest
from jinja2 import TemplateError

from server.errors import InvalidRequestError
from server.text.chat_template import ChatTemplate
from tests.server.text import templates

pytestmark = pytest.mark.slow  # importing transformers takes seconds


@pytest.fixture(scope="module")
def reference() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    library = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "<unk>": 2}, []))
    return PreTrainedTokenizerFast(tokenizer_object=library, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _ours(text: str) -> ChatTemplate:
    return ChatTemplate(text, bos_token="<s>", eos_token="</s>", special_tokens={"unk_token": "<unk>"})


@pytest.mark.parametrize("tools", [None, templates.TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("prompts", [True, False], ids=["prompt", "no prompt"])
@pytest.mark.parametrize("chat", templates.CHATS)
@pytest.mark.parametrize("name", templates.ALL)
def test_equals_transformers(reference: Any, name: str, chat: str, prompts: bool, tools: Any) -> None:
    text, messages = templates.ALL[name], templates.CHATS[chat]
    options = {"enable_thinking": False, "documents": [{"title": "é", "text": "<x>"}]}
    arguments = {"tools": tools, "add_generation_prompt": prompts}
    try:
        expected = reference.apply_chat_template(messages, chat_template=text, tokenize=False, **arguments, **options)
    except (TemplateError, TypeError) as error:  # whatever the template raises there, ours must refuse
        with pytest.raises(InvalidRequestError, match=str(error)[:20]):
            _ours(text).render(messages, template_kwargs=options, **arguments)
        return
    assert _ours(text).render(messages, template_kwargs=options, **arguments) == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "mistral"])
@pytest.mark.parametrize("content", ["The answer", "The answer is ", " \n spaced \n"])
def test_continuation_equals_transformers(reference: Any, name: str, content: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    expected = reference.apply_chat_template(
        messages, chat_template=templates.ALL[name], tokenize=False, continue_final_message=True
    )
    assert expected == _ours(templates.ALL[name]).render(
        messages, tools=None, add_generation_prompt=False, continue_final_message=True
    )
