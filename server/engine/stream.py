"""What a client of the engine holds: an async iterator over one sequence's outputs.

The engine posts a whole step to the event loop with one `call_soon_threadsafe`; `push` then runs there for every
stream. A deque and one future do what an asyncio.Queue would, at a fraction of its cost; outputs that pile up behind a
slow reader are handed over as one. Used from the event loop's thread only.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import TracebackType

from server.engine.params import EngineOutput, TokenLogprob


class TokenStream:
    """Ends after the output with a `finish_reason`. Leaving early (`aclose`, `async with`, cancelled await) cancels."""

    __slots__ = ("_is_finished", "_on_cancel", "_pending", "_waiter")

    def __init__(self, on_cancel: Callable[[], None]) -> None:
        self._on_cancel: Callable[[], None] | None = on_cancel
        self._pending: list[EngineOutput] = []
        self._waiter: asyncio.Future[None] | None = None
        self._is_finished = False

    def push(self, output: EngineOutput) -> None:
        """Engine side. Outputs after the last one are dropped."""
        if self._is_finished:
            return
        self._pending.append(output)
        if output.finish_reason is not None:
            self._is_finished = True
            self._on_cancel = None
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> EngineOutput:
        while not self._pending:
            if self._is_finished:
                raise StopAsyncIteration
            assert self._waiter is None, "one reader per stream"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:  # as an async generator would: its reader went away
                self.cancel()
                raise
            finally:
                self._waiter = None
        pending, self._pending = self._pending, []
        return pending[0] if len(pending) == 1 else merge_outputs(pending)

    def cancel(self) -> None:
        """Free the sequence's work at the next step; harmless when it has ended. The last output says `cancelled`."""
        if self._on_cancel is not None:
            on_cancel, self._on_cancel = self._on_cancel, None
            on_cancel()

    async def aclose(self) -> None:
        self.cancel()

    async def __aenter__(self) -> "TokenStream":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


def merge_outputs(outputs: Sequence[EngineOutput]) -> EngineOutput:
    """Several consecutive outputs of one sequence as one."""
    logprobs: list[TokenLogprob] | None = None
    for output in outputs:
        if output.logprobs is not None:
            logprobs = [*(logprobs or ()), *output.logprobs]
    last = outputs[-1]
    return EngineOutput(
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        logprobs=logprobs,
        prompt_logprobs=next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None),
        finish_reason=last.finish_reason,
        stop_token_id=last.stop_token_id,
        error=last.error,
        num_cached_tokens=last.num_cached_tokens,
    )


def split_output(output: EngineOutput) -> list[EngineOutput]:
    """The outputs of one token each that merge to `output`."""
    count = len(output.token_ids)
    if count <= 1:
        return [output]
    parts = [
        EngineOutput(
            token_ids=(token_id,),
            logprobs=None if output.logprobs is None else output.logprobs[index : index + 1],
            num_cached_tokens=output.num_cached_tokens,
        )
        for index, token_id in enumerate(output.token_ids)
    ]
    parts[0] = replace(parts[0], prompt_logprobs=output.prompt_logprobs)
    parts[-1] = replace(
        parts[-1], finish_reason=output.finish_reason, stop_token_id=output.stop_token_id, error=output.error
    )
    return parts
