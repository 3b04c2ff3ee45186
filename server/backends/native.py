"""The native backend: OpenAI requests answered by the embedded engine in this process.

request -> prompt tokens and grammar (chat_plan.py) -> one engine sequence a choice -> detokenizer, stop strings,
reasoning and tool calls (chat_choice.py, completion_choice.py) -> chunks. What is done for every token is
synchronous; the only await a token costs is the engine's.

Not here: which adapter version answers, moving versions in and out (server/adapters), HTTP, putting chunks together.
"""

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypedDict, TypeVar

from server.backends import sampling
from server.backends.base import Call, Health, Identity
from server.backends.chat_choice import ChatChoiceState
from server.backends.chat_plan import ChatPlan, ChatPlanner
from server.backends.completion_choice import CompletionChoiceState, Echo
from server.backends.generation import (
    Submission,
    TokenEngine,
    best_of,
    measured,
    submitted,
    usage_of,
    wire_choices,
)
from server.backends.text_pipe import TextPipe
from server.backends.token_text import TokenTexts
from server.errors import InvalidRequestError
from server.models.inspect import fingerprint
from server.openai.protocol.chat import ChatRequest
from server.openai.protocol.chunks import Body, ChatChunk, ChatHead, CompletionChunk, CompletionHead
from server.openai.protocol.completions import CompletionRequest
from server.openai.protocol.tokens import DetokenizeRequest, TokenizeRequest
from server.text.detokenizer import Detokenizer
from server.text.tokenizer import Tokenizer
from server.tools.parser import ToolCallParser
from server.tools.reasoning import ReasoningSplitter

Result = TypeVar("Result")

LONG_TEXT = 8192
"""Characters from which a prompt is tokenized on a thread: about a millisecond, which other streams should not wait."""


@dataclass(frozen=True, slots=True)
class _Prompt:
    token_ids: Sequence[int]
    text: str | None
    """For `echo`: what the caller wrote, or the decoded ids."""


class _AnswerFields(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str


class NativeBackend:
    """`max_choices`: more sequences than this in one request could never be queued."""

    def __init__(
        self,
        engine: TokenEngine,
        tokenizer: Tokenizer,
        planner: ChatPlanner,
        *,
        identity: Identity,
        max_model_len: int,
        max_choices: int,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._planner = planner
        self._texts = TokenTexts(tokenizer)
        self._fingerprint = fingerprint(identity.model_digest or "")
        self._max_model_len = max_model_len
        self._max_choices = max_choices
        self.identity = identity

    # -- chat ---------------------------------------------------------------------------------------------------------

    async def chat(self, request: ChatRequest, call: Call) -> AsyncGenerator[ChatChunk, None]:
        sampling.check_token_ids(request, self._tokenizer.vocab_size)
        plan = await self._off_loop(
            lambda: self._planner.plan(request, max_model_len=self._max_model_len),
            is_long=self._planner.is_heavy(request),
        )
        limit = sampling.fit_context(len(plan.token_ids), request.token_limit, self._max_model_len, param="messages")
        num_choices = request.n or 1
        self._check_count(num_choices)
        states = [self._chat_state(request, plan, index) for index in range(num_choices)]
        params = sampling.chat_params(request, limit)
        submissions = [
            Submission(
                plan.token_ids, replace(params, choice=index), plan.make_grammar() if plan.make_grammar else None
            )
            for index in range(num_choices)
        ]
        head: ChatHead = {"object": "chat.completion.chunk", **self._answer_fields("chatcmpl-", request.model, call)}
        with submitted(self._engine, submissions, call) as streams:
            call.prompt_token_ids, call.num_prompt_tokens = plan.token_ids, len(plan.token_ids)
            call.completion_token_ids = [state.pipe.token_ids for state in states]
            call.was_constrained = plan.make_grammar is not None
            with measured(call):
                async with aclosing(wire_choices(streams, states, call.meter)) as choices:
                    async for choice in choices:
                        yield {**head, "choices": [choice]}
                call.meter.finish(choice["finish_reason"], num_prompt_tokens=call.num_prompt_tokens)
        yield {**head, "choices": [], "usage": usage_of(call.num_prompt_tokens, states, num_candidates=num_choices)}

    def _chat_state(self, request: ChatRequest, plan: ChatPlan, index: int) -> ChatChoiceState:
        parser = None
        if plan.tool_names:
            parser = ToolCallParser(
                self._planner.tool_format, plan.tool_names, parallel_tool_calls=request.parallel_tool_calls is not False
            )
        detokenizer = Detokenizer(self._tokenizer, skip_special=not plan.keeps_special)
        return ChatChoiceState(
            index,
            TextPipe(detokenizer, request.stop_strings),
            ReasoningSplitter(opened=plan.opens_reasoning),
            parser,
            self._texts if request.logprobs else None,
        )

    # -- completions --------------------------------------------------------------------------------------------------

    async def complete(self, request: CompletionRequest, call: Call) -> AsyncGenerator[CompletionChunk, None]:
        sampling.check_token_ids(request, self._tokenizer.vocab_size)
        candidates = max(request.best_of or 1, request.n or 1)
        self._check_count(len(request.prompts) * candidates)
        length = sum(len(prompt) for prompt in request.prompts)
        prompts = await self._off_loop(
            lambda: [self._prompt(request, index, prompt) for index, prompt in enumerate(request.prompts)],
            is_long=length > LONG_TEXT,
        )
        states: list[CompletionChoiceState] = []
        submissions: list[Submission] = []
        for prompt in prompts:
            limit = sampling.fit_context(
                len(prompt.token_ids), sampling.completion_limit(request), self._max_model_len, param="prompt"
            )
            params = sampling.completion_params(request, limit)
            for candidate in range(candidates):
                states.append(self._completion_state(request, prompt, len(states)))
                submissions.append(Submission(prompt.token_ids, replace(params, choice=candidate)))
        head: CompletionHead = {"object": "text_completion", **self._answer_fields("cmpl-", request.model, call)}
        with submitted(self._engine, submissions, call) as streams:
            call.prompt_token_ids = prompts[0].token_ids if len(prompts) == 1 else None
            call.num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
            call.completion_token_ids = [state.pipe.token_ids for state in states]
            with measured(call):
                generated = wire_choices(streams, states, call.meter)
                if candidates > (request.n or 1):
                    generated = best_of(generated, states, call, num_candidates=candidates, num_kept=request.n or 1)
                async with aclosing(generated) as choices:
                    async for choice in choices:
                        yield {**head, "choices": [choice]}
                call.meter.finish(choice["finish_reason"], num_prompt_tokens=call.num_prompt_tokens)
        yield {**head, "choices": [], "usage": usage_of(call.num_prompt_tokens, states, num_candidates=candidates)}

    def _completion_state(self, request: CompletionRequest, prompt: _Prompt, index: int) -> CompletionChoiceState:
        echo = None
        if request.echo:
            echo = Echo(prompt.text or "", prompt.token_ids, Detokenizer(self._tokenizer, at_start=True))
        return CompletionChoiceState(
            index,
            TextPipe(Detokenizer(self._tokenizer), request.stop_strings),
            self._texts if request.logprobs is not None else None,
            echo,
            only_echo=request.max_tokens == 0,
        )

    def _prompt(self, request: CompletionRequest, index: int, prompt: str | list[int]) -> _Prompt:
        param = f"prompt[{index}]" if request.has_many_prompts else "prompt"
        if isinstance(prompt, str):
            sampling.refuse_hopeless(prompt, self._tokenizer, self._max_model_len, param="prompt")
            token_ids = self._tokenizer.encode(prompt, add_special=True, parse_special=True)
            if not token_ids:
                raise InvalidRequestError("The prompt must not be empty.", param=param, code="empty_string")
            return _Prompt(token_ids, prompt)
        self._check_ids(prompt, param)
        return _Prompt(prompt, self._tokenizer.decode(prompt) if request.echo else None)

    # -- tokens, health -------------------------------------------------------------------------------------

    async def tokenize(self, request: TokenizeRequest) -> Body:
        token_ids = await self._off_loop(
            lambda: self._planner.tokenize(request), is_long=self._planner.is_heavy(request)
        )
        return {
            "count": len(token_ids),
            "max_model_len": self._max_model_len,
            "tokens": token_ids,
            "token_strs": [self._texts.named(token_id)[0] for token_id in token_ids]
            if request.return_token_strs
            else None,
        }

    async def detokenize(self, request: DetokenizeRequest) -> Body:
        self._check_ids(request.tokens, "tokens")
        text = await self._off_loop(
            lambda: self._tokenizer.decode(request.tokens, skip_special=False), is_long=len(request.tokens) > LONG_TEXT
        )
        return {"prompt": text}

    def health(self) -> Health:
        reason = self._engine.health()
        return Health(is_ready=reason is None, reason=reason)

    # -- shared -------------------------------------------------------------------------------------------------------

    async def _off_loop(self, work: Callable[[], Result], *, is_long: bool) -> Result:
        return await asyncio.to_thread(work) if is_long else work()

    def _answer_fields(self, prefix: str, model: str, call: Call) -> _AnswerFields:
        return {
            "id": prefix + uuid.uuid4().hex,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": self._fingerprint + call.fingerprint,
        }

    def _check_count(self, count: int) -> None:
        if count > self._max_choices:
            raise InvalidRequestError(
                f"The request asks for {count} sequences (prompts times choices); {self._max_choices} are accepted.",
                param="n",
            )

    def _check_ids(self, token_ids: Sequence[int], param: str) -> None:
        for position, token_id in enumerate(token_ids):
            if token_id >= self._tokenizer.vocab_size:
                raise InvalidRequestError(
                    f"Token {token_id} in '{param}' is outside the vocabulary of {self._tokenizer.vocab_size}.",
                    param=f"{param}[{position}]",
                )
