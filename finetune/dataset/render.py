"""Token ids of a prompt and of the answer that a model should have given to it, by the code that serves.

Prompts go through the server's own planner (template, or tools folded in) and tokenizer. An answer that was served has
its logged ids; any other (a correction, an import) is rendered as the conversation's last message, and what follows the
prompt in that rendering, up to the end of turn, is what the model would have had to generate. Then it is read back by
the server's parsers: an answer that does not come back as the message it was made from is not trained on.

Not here: which answers are trained on (filters.py), and weights (examples.py).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from finetune.dataset.errors import UnrenderableError
from finetune.dataset.token_classes import classify_tokens
from quant.model_file import open_model
from server.backends.chat_plan import ChatPlanner
from server.errors import InvalidRequestError
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.messages import AssistantMessage, template_message
from server.text.chat_template import ChatTemplate
from server.text.messages import normalize_messages
from server.text.tokenizer import Tokenizer, build_tokenizer
from server.tools.constraint import ConstraintFactory
from server.tools.parser import ContentDelta, ToolCallParser, ToolCallStart
from server.tools.reasoning import CLOSE, OPEN, ReasoningDelta, ReasoningSplitter, opens_reasoning

_REQUEST_KEYS = ("messages", "tools", "tool_choice", "response_format")
_SAMPLING_KEYS = (
    "reasoning_effort",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "parallel_tool_calls",
)


@dataclass(frozen=True)
class Identity:
    """What the token ids depend on."""

    base_digest: str
    template_digest: str
    tokenizer_digest: str


@dataclass(frozen=True)
class Rendered:
    prompt_ids: list[int]
    answer_ids: list[int]  # the end of turn included
    classes: NDArray[np.uint8]  # TokenClass of each of `answer_ids`


class Renderer:
    """One model's template and tokenizer."""

    def __init__(self, tokenizer: Tokenizer, template_text: str, base_digest: str) -> None:
        template = ChatTemplate(
            template_text,
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            special_tokens=tokenizer.special_tokens,
        )
        constraints = ConstraintFactory(tokenizer, mask_words=-(-tokenizer.vocab_size // 32))  # never asked for one
        self.tokenizer = tokenizer
        self.planner = ChatPlanner(tokenizer, template, constraints, template_text=template_text)
        self.identity = Identity(base_digest, "sha256:" + sha256(template_text.encode()).hexdigest(), tokenizer.digest)

    @classmethod
    def open(cls, model: Path, *, template_text: str | None = None, digest_cache: Path | None = None) -> Self:
        """`template_text`: what the server was given instead of the model's own. Raises ModelFileError, ConfigError."""
        file = open_model(model, digest_cache=digest_cache)
        try:
            tokenizer = build_tokenizer(file.tokenizer, file.config.vocab_size)
            text = template_text or tokenizer.chat_template_text
            if text is None:
                raise UnrenderableError(
                    f"{model} has no chat template: there is no way to render a conversation for it"
                )
            return cls(tokenizer, text, file.digest)
        finally:
            file.close()

    def prompt(self, request: ChatRequest) -> list[int]:
        """What the server feeds the model for this request."""
        try:
            return self.tokenizer.encode_chat(self.planner.render(request))
        except InvalidRequestError as error:
            raise UnrenderableError(str(error)) from None

    def answer(self, request: ChatRequest, message: Mapping[str, Any]) -> Rendered:
        """The ids of `message` as the answer. Raises UnrenderableError."""
        plain = _plain_answer(message)
        try:
            prompt = self.planner.render(request)
            whole = self.planner.render(request, answer=plain)
        except InvalidRequestError as error:
            raise UnrenderableError(str(error)) from None
        if not whole.startswith(prompt):
            raise UnrenderableError("the template does not render an answer as the continuation of its prompt")
        prompt_ids = self.tokenizer.encode_chat(prompt)
        answer_ids = self._to_end(self._continuation(whole, prompt, prompt_ids))
        self._check(request, prompt, answer_ids, plain)
        return Rendered(prompt_ids, answer_ids, self.classes(request, answer_ids, prompt=prompt))

    def served(self, request: ChatRequest, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> Rendered | None:
        """An answer by its logged ids; None when it did not end with an end of turn (a stop string cut it)."""
        ends = [index for index, token_id in enumerate(answer_ids) if token_id in self.tokenizer.eog_token_ids]
        if ends != [len(answer_ids) - 1]:
            return None
        return Rendered(list(prompt_ids), list(answer_ids), self.classes(request, answer_ids))

    def classes(self, request: ChatRequest, answer_ids: Sequence[int], prompt: str | None = None) -> NDArray[np.uint8]:
        """TokenClass of each token of an answer to `request`."""
        prompt = self.planner.render(request) if prompt is None else prompt
        return classify_tokens(
            self.tokenizer,
            self.planner.tool_format,
            offered_names(request),
            answer_ids,
            opened=opens_reasoning(prompt),
        )

    def parse(self, request: ChatRequest, prompt: str, answer_ids: Sequence[int]) -> dict[str, Any]:
        """The message that the server would make of these ids: content, reasoning, (name, arguments' text) of calls."""
        ids = [token_id for token_id in answer_ids if token_id not in self.tokenizer.eog_token_ids]
        names = offered_names(request)
        text = self.tokenizer.decode(ids, skip_special=False, at_start=False)
        splitter = ReasoningSplitter(opened=opens_reasoning(prompt))
        pieces = [*splitter.push(text), *splitter.finish()]
        reasoning = "".join(piece.text for piece in pieces if isinstance(piece, ReasoningDelta))
        content = "".join(piece.text for piece in pieces if isinstance(piece, ContentDelta))
        calls: list[list[str]] = []
        if names:
            parallel = request.parallel_tool_calls is not False
            parser = ToolCallParser(self.planner.tool_format, names, parallel_tool_calls=parallel)
            events = [*parser.push(content), *parser.finish()]
            content = "".join(event.text for event in events if isinstance(event, ContentDelta))
            for event in events:
                if isinstance(event, ToolCallStart):
                    calls.append([event.name, ""])
                elif not isinstance(event, ContentDelta):
                    calls[event.index][1] += event.text
        return {"content": content, "reasoning": reasoning, "calls": [tuple(call) for call in calls]}

    def _continuation(self, whole: str, prompt: str, prompt_ids: Sequence[int]) -> list[int]:
        """Ids of the text after the prompt, which begin a token of their own: the prompt's are fixed by then."""
        ids = self.tokenizer.encode_chat(whole)
        if ids[: len(prompt_ids)] == list(prompt_ids):
            return ids[len(prompt_ids) :]
        # A token spans the seam (a prompt's "\n" and an answer's "\n" as "\n\n"): the model could not have made it.
        rest = whole[len(prompt) :]
        ids = self.tokenizer.encode(rest, add_special=False, parse_special=True)
        if self.tokenizer.decode(ids, skip_special=False, at_start=False) != rest:
            raise UnrenderableError("the answer's tokens cannot be told from the prompt's")
        return ids

    def _to_end(self, ids: Sequence[int]) -> list[int]:
        for index, token_id in enumerate(ids):
            if token_id in self.tokenizer.eog_token_ids:
                return list(ids[: index + 1])
        if self.tokenizer.eos_token_id is None:
            raise UnrenderableError("neither template nor tokenizer knows an end of turn")
        return [*ids, self.tokenizer.eos_token_id]

    def _check(self, request: ChatRequest, prompt: str, answer_ids: Sequence[int], wanted: Mapping[str, Any]) -> None:
        form = self.planner.tool_format
        allowed = {form.marker, form.closing, OPEN, CLOSE}
        for token_id in answer_ids[:-1]:
            if self.tokenizer.is_special(token_id) and self.tokenizer.token_bytes(token_id).decode() not in allowed:
                raise UnrenderableError("the answer's text spells a special token")
        (plain,) = normalize_messages([wanted])
        read = self.parse(request, prompt, answer_ids)
        if read["content"].strip() != plain["content"].strip():
            raise UnrenderableError("the answer's text does not come back from the parser as it was meant")
        if read["reasoning"].strip() != plain.get("reasoning_content", "").strip():
            raise UnrenderableError("the template leaves out the answer's reasoning")
        meant = [(call["function"]["name"], call["function"]["arguments"]) for call in plain.get("tool_calls", ())]
        if [(name, _parsed(text)) for name, text in read["calls"]] != [(name, _parsed(args)) for name, args in meant]:
            raise UnrenderableError("the answer's calls do not come back from the parser as they were meant")


def chat_request(logged: Mapping[str, Any]) -> ChatRequest:
    """The request of a trace (its stored `request`), as far as the prompt depends on it. Raises UnrenderableError."""
    body = {key: logged[key] for key in _REQUEST_KEYS if logged.get(key) is not None}
    sampling = logged.get("sampling") or {}
    body |= {key: sampling[key] for key in _SAMPLING_KEYS if sampling.get(key) is not None}
    # `weight` is OpenAI's fine-tuning format: imported histories may hold it, requests may not.
    body["messages"] = [
        {key: value for key, value in message.items() if key != "weight"} for message in logged.get("messages") or ()
    ]
    try:
        return ChatRequest.model_validate({"model": "-", **body})
    except ValidationError as error:
        raise UnrenderableError(error.errors(include_url=False)[0]["msg"]) from None


def offered_names(request: ChatRequest) -> tuple[str, ...]:
    """Tools whose calls the server looks for."""
    return () if request.tool_choice == "none" else tuple(tool.function.name for tool in request.tools or ())


def _plain_answer(message: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return template_message(AssistantMessage.model_validate({k: v for k, v in message.items() if k != "weight"}))
    except ValidationError as error:
        raise UnrenderableError(error.errors(include_url=False)[0]["msg"]) from None


def _parsed(arguments: Any) -> str:
    """Canonical JSON of arguments that are text or an object; text that is no JSON as it is."""
    try:
        value = json.loads(arguments or "{}") if isinstance(arguments, str) else arguments
    except ValueError:
        return str(arguments)
    return json.dumps(value, sort_keys=True)
