"""From a chat request to what the engine and the parsers need: prompt tokens, tool format, grammar, reasoning state.

Synchronous and without state of its own, so that heavy requests are planned on a thread. A template that supports tools
gets them as they are; for any other they are folded into the messages in the Hermes convention.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from server.backends.sampling import refuse_hopeless
from server.engine.params import Grammar
from server.errors import InvalidRequestError
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.tokens import TokenizeRequest
from server.openai.protocol.tools import JsonObjectFormat, JsonSchemaFormat, NamedToolChoice, Tools
from server.text.chat_template import ChatTemplate
from server.text.messages import normalize_messages
from server.text.tokenizer import Tokenizer
from server.tools.constraint import CompiledGrammar, ConstraintFactory
from server.tools.formats import ToolFormat, detect_tool_format
from server.tools.hermes import fold_tools
from server.tools.reasoning import CLOSE, OPEN, opens_reasoning

HEAVY_TEXT = 8192
"""Characters of a request from which rendering and tokenizing take about a millisecond and go to a thread."""


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """`tool_names` is empty when calls are not to be looked for; `make_grammar` gives every choice its own."""

    token_ids: list[int]
    tool_names: tuple[str, ...]
    opens_reasoning: bool
    keeps_special: bool
    """Special tokens stay in the text, because the parsers look for some of them."""
    make_grammar: Callable[[], Grammar] | None


class ChatPlanner:
    """`template` is None for a base model without one: chat requests are then refused, completions work."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        constraints: ConstraintFactory,
        *,
        template_text: str | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._constraints = constraints
        self._template_has_tools = template is not None and template.supports_tools
        self.tool_format: ToolFormat = detect_tool_format(template_text, self._template_has_tools)
        ids = (tokenizer.token_to_id(text) for text in (OPEN, CLOSE))
        self._thinks_in_specials = any(i is not None and tokenizer.is_special(i) for i in ids)

    def plan(self, request: ChatRequest, *, max_model_len: int) -> ChatPlan:
        """Raises InvalidRequestError for messages that the template refuses or that cannot fit `max_model_len` tokens,
        and for schemas that cannot be enforced."""
        tools = _offered_tools(request)
        rendered = self.render(request)
        refuse_hopeless(rendered, self._tokenizer, max_model_len, param="messages")
        is_thinking = opens_reasoning(rendered)
        grammar = self._grammar(request, tools, after_reasoning=is_thinking)
        return ChatPlan(
            token_ids=self._tokenizer.encode_chat(rendered),
            tool_names=tuple(tool["function"]["name"] for tool in tools),
            opens_reasoning=is_thinking,
            keeps_special=bool(tools) or self._thinks_in_specials,
            make_grammar=grammar.new if grammar else None,
        )

    def render(self, request: ChatRequest, *, answer: Mapping[str, Any] | None = None) -> str:
        """The prompt's text; with `answer`, an assistant message, the text of the conversation that it ends.

        The latter is for training, which must see what serving sees. Raises InvalidRequestError.
        """
        kwargs = dict(request.chat_template_kwargs or {})
        if request.reasoning_effort is not None:
            kwargs.setdefault("reasoning_effort", request.reasoning_effort)
        messages, is_whole = request.template_messages, answer is not None
        return self._render(
            [*messages, dict(answer)] if answer is not None else messages,
            _offered_tools(request),
            continues=bool(request.continue_final_message) and not is_whole,
            prompts=False if is_whole else request.add_generation_prompt,
            kwargs=kwargs,
        )

    def tokenize(self, request: TokenizeRequest) -> list[int]:
        """Token ids of a prompt, or of messages rendered as a chat request would."""
        if request.prompt is not None:
            add_special = request.add_special_tokens is not False
            return self._tokenizer.encode(request.prompt, add_special=add_special, parse_special=True)
        rendered = self._render(
            request.template_messages,
            _plain_tools(request.tools),
            continues=bool(request.continue_final_message),
            prompts=request.add_generation_prompt,
            kwargs=request.chat_template_kwargs or {},
        )
        if request.add_special_tokens:
            return self._tokenizer.encode(rendered, add_special=True, parse_special=True)
        return self._tokenizer.encode_chat(rendered)

    def is_heavy(self, request: ChatRequest | TokenizeRequest) -> bool:
        """Whether planning may take longer than other streams should wait."""
        if isinstance(request, ChatRequest) and _may_constrain(request):
            return True
        # All of it counts: tools, their schemas and the arguments of earlier calls are rendered and tokenized too.
        return len(request.model_dump_json(exclude_none=True)) > HEAVY_TEXT

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]],
        *,
        continues: bool,
        prompts: bool | None,
        kwargs: dict[str, Any],
    ) -> str:
        if self._template is None:
            raise InvalidRequestError(
                "This model has no chat template; use /v1/completions, or start the server with --chat-template.",
                param="messages",
            )
        if not self._template_has_tools:
            messages, tools = fold_tools(normalize_messages(messages), tools), []
        return self._template.render(
            messages,
            tools=tools or None,
            add_generation_prompt=not continues if prompts is None else prompts,
            continue_final_message=continues,
            template_kwargs=kwargs,
        )

    def _grammar(
        self, request: ChatRequest, tools: list[dict[str, Any]], *, after_reasoning: bool
    ) -> CompiledGrammar | None:
        make, choice = self._constraints, request.tool_choice
        if tools and (choice == "required" or isinstance(choice, NamedToolChoice)):
            return make.forced_tools(
                tools,
                self.tool_format,
                name=choice.function.name if isinstance(choice, NamedToolChoice) else None,
                parallel=request.parallel_tool_calls is not False,
                after_reasoning=after_reasoning,
            )
        form = request.response_format
        if tools:
            return make.free_tools(
                tools, self.tool_format, content_schema=_schema(form), after_reasoning=after_reasoning
            )
        match form:
            case JsonObjectFormat():
                return make.json_object(after_reasoning=after_reasoning)
            case JsonSchemaFormat():
                param = "response_format.json_schema.schema"
                return make.json_schema(_schema(form), param=param, after_reasoning=after_reasoning)
            case _:
                return None


def _offered_tools(request: ChatRequest) -> list[dict[str, Any]]:
    """Those that the prompt shows: none when they are switched off."""
    return [] if request.tool_choice == "none" else _plain_tools(request.tools)


def _plain_tools(tools: Tools | None) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_none=True) for tool in tools or []]


def _schema(form: Any) -> dict[str, Any] | None:
    """The JSON schema that a response format asks for; None for text."""
    match form:
        case JsonObjectFormat():
            return {"type": "object"}
        case JsonSchemaFormat():
            return form.json_schema.schema_ or {}
        case _:
            return None


def _may_constrain(request: ChatRequest) -> bool:
    if request.response_format is not None and request.response_format.type != "text":
        return True
    forces = request.tool_choice == "required" or isinstance(request.tool_choice, NamedToolChoice)
    return forces or any(tool.function.strict for tool in request.tools or [])
