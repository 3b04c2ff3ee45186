"""Chat templates: messages and tools to the text of a prompt, by sandboxed Jinja2 as transformers runs it.

Same environment as `transformers.PreTrainedTokenizer.apply_chat_template`: trimmed blocks, loop controls, the
`{% generation %}` tag (renders its body), `tojson` that escapes neither HTML nor non-ASCII, `raise_exception`,
`strftime_now`, and the special tokens by name. The tests compare with it.

Templates come from the model or the operator, never from a request, but models are downloaded: they run in Jinja's
immutable sandbox, whose `range` ends at 100,000, and see plain JSON data only. A template that loops for long in
nested ranges is not stopped.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from server.errors import ConfigError, InvalidRequestError
from server.text.messages import normalize_messages

_RENDER_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a template that does not fit its messages can raise; OverflowError is the sandbox's `range` limit."""
_RESERVED = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
# The trailing space tells whether the template trims the message: then the space is gone.
_CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "


class _GenerationTag(Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text for training; rendering ignores it."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's interface

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Namespace(Namespace):
    """Jinja's `namespace`, without names that reach into Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]  # so that a template may have an attribute called `self`
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace of a chat template cannot have the attribute {name!r}")


def _new_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _new_dict
    environment.globals["namespace"] = _Namespace
    return environment


class ChatTemplate:
    """One compiled template. Raises ConfigError for a syntax error. Safe to use from several threads."""

    def __init__(
        self, text: str, *, bos_token: str, eos_token: str, special_tokens: Mapping[str, str] | None = None
    ) -> None:
        environment = _environment()
        try:
            tree = environment.parse(text)
            self._template = environment.from_string(tree)
        except TemplateSyntaxError as error:
            raise ConfigError(f"chat template: line {error.lineno}: {error.message}") from None
        self._special_tokens = {**(special_tokens or {}), "bos_token": bos_token, "eos_token": eos_token}
        self.supports_tools = "tools" in meta.find_undeclared_variables(tree)
        """The template reads the variable `tools`; otherwise tools must be folded into the messages."""
        self.digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt's text. `continue_final_message` ends it right after the last message's content.

        Raises InvalidRequestError for messages that the template refuses or cannot render.
        """
        chat = normalize_messages(messages)
        extra = dict(template_kwargs or {})
        for name in _RESERVED:
            if name in extra:
                raise InvalidRequestError(f"chat_template_kwargs cannot set {name!r}", param="chat_template_kwargs")
        if continue_final_message:
            _check_continuation(chat, add_generation_prompt)
            final = chat[-1]["content"]
            chat[-1]["content"] = final + _CONTINUE_TAG
        context = {"documents": None, **self._special_tokens, **extra}
        try:
            rendered = self._template.render(
                {**context, "messages": chat, "tools": tools, "add_generation_prompt": add_generation_prompt}
            )
        except _RENDER_ERRORS as error:
            reason = str(error) or type(error).__name__
            raise InvalidRequestError(
                f"the chat template cannot render the messages: {reason}", param="messages"
            ) from None
        return _cut_at_tag(rendered, final) if continue_final_message else rendered


def _check_continuation(chat: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> None:
    if add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt exclude each other", param="continue_final_message"
        )
    if not chat:
        raise InvalidRequestError("continue_final_message needs a message to continue", param="continue_final_message")


def _cut_at_tag(rendered: str, final: str) -> str:
    """The text up to where the final message ends, without the space after it that the template trimmed."""
    place = rendered.rfind(_CONTINUE_TAG.strip())
    if place < 0 or final.strip() not in rendered:
        raise InvalidRequestError(
            "continue_final_message: the chat template does not render the final message as it is",
            param="continue_final_message",
        )
    is_untrimmed = rendered.startswith(_CONTINUE_TAG, place)
    return rendered[:place] if is_untrimmed else rendered[:place].rstrip()
