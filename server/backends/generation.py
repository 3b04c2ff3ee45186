"""Runs the engine sequences of one request: submits all or none, feeds every output to its choice, frees what is left.

Also what is known per request: its metrics and its `usage`. The same for chat and completions.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from server.backends.base import Call
from server.backends.merge import TokenSource, merge
from server.backends.text_pipe import TextPipe
from server.engine.adapters import LoadedAdapter
from server.engine.params import EngineOutput, Grammar, SamplingParams
from server.metrics import RequestMetrics, RequestOutcome
from server.openai.protocol.chunks import Usage


class TokenEngine(Protocol):
    """What the backend needs of server.engine.engine.Engine."""

    def submit(
        self,
        token_ids: Sequence[int],
        params: SamplingParams,
        *,
        adapter: LoadedAdapter | None = None,
        grammar: Grammar | None = None,
        cache_salt: bytes = b"",
    ) -> TokenSource: ...

    def health(self) -> str | None: ...


class ChoiceState(Protocol):
    """ChatChoiceState or CompletionChoiceState: engine outputs in, wire choices out."""

    pipe: TextPipe
    is_finished: bool

    def push(self, output: EngineOutput) -> list[Any]: ...


@dataclass(frozen=True, slots=True)
class Submission:
    """One sequence. A grammar has state, so every sequence brings its own."""

    token_ids: Sequence[int]
    params: SamplingParams
    grammar: Grammar | None = None


@contextmanager
def submitted(engine: TokenEngine, submissions: Sequence[Submission], call: Call) -> Iterator[list[TokenSource]]:
    """All sequences or none; leaving frees whatever still runs."""
    streams: list[TokenSource] = []
    try:
        for one in submissions:
            streams.append(
                engine.submit(
                    one.token_ids, one.params, adapter=call.handle, grammar=one.grammar, cache_salt=call.cache_salt
                )
            )
        yield streams
    finally:
        for stream in streams:
            stream.cancel()


@contextmanager
def measured(call: Call) -> Iterator[None]:
    """Records how the request ended unless `call.meter.finish` was called inside."""
    outcome: RequestOutcome = "error"
    try:
        yield
    except (GeneratorExit, asyncio.CancelledError):
        outcome = "cancelled"
        raise
    finally:
        call.meter.finish(outcome, num_prompt_tokens=call.num_prompt_tokens)


async def wire_choices(
    streams: Sequence[TokenSource], states: Sequence[ChoiceState], meter: RequestMetrics
) -> AsyncGenerator[Any, None]:
    """The wire choices of all streams, in the order in which they come, until every choice is finished."""
    num_open = len(states)
    async with aclosing(merge(streams)) as outputs:
        async for index, output in outputs:
            state = states[index]
            if state.is_finished:
                continue  # tokens that were under way when a stop string ended the choice
            if output.token_ids:
                meter.on_output(len(output.token_ids), index)
            for choice in state.push(output):
                yield choice
            if state.is_finished:
                streams[index].cancel()
                num_open -= 1
                if not num_open:
                    return


async def best_of(
    choices: AsyncGenerator[Any, None], states: Sequence[ChoiceState], call: Call, *, num_candidates: int, num_kept: int
) -> AsyncGenerator[Any, None]:
    """Of every prompt's candidates the `num_kept` with the highest mean log-probability, best first, renumbered.

    The call's token ids become those of the kept ones.
    """
    call.completion_token_ids.clear()
    held: list[list[Any]] = [[] for _ in states]
    async for choice in choices:
        held[choice["index"]].append(choice)
    index = 0
    for start in range(0, len(states), num_candidates):
        ranked = sorted(
            range(start, start + num_candidates), key=lambda candidate: -states[candidate].pipe.mean_logprob
        )
        for candidate in ranked[:num_kept]:
            for choice in held[candidate]:
                yield {**choice, "index": index}
            call.completion_token_ids.append(states[candidate].pipe.token_ids)
            index += 1


def usage_of(num_prompt_tokens: int, states: Sequence[ChoiceState], *, num_candidates: int) -> Usage:
    """A prompt's tokens count once, its cached ones as its first choice found them; every generated token counts."""
    num_completion_tokens = sum(state.pipe.num_tokens for state in states)
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": sum(state.pipe.num_cached_tokens for state in states[::num_candidates])
        },
    }
