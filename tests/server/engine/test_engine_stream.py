"""TokenStream on its own: order, merging, endings and cancellation."""

import asyncio

import pytest

from server.engine.params import EngineOutput, TokenLogprob
from server.engine.stream import TokenStream, merge_outputs


def output(token: int, **more) -> EngineOutput:
    return EngineOutput(token_ids=(token,), **more)


def test_outputs_come_in_order_and_pile_up_into_one():
    async def main():
        stream = TokenStream(lambda: None)
        stream.push(output(1))
        assert (await anext(stream)).token_ids == (1,)
        stream.push(output(2))
        stream.push(output(3, finish_reason="stop", stop_token_id=3))
        merged = await anext(stream)
        assert merged.token_ids == (2, 3)
        assert (merged.finish_reason, merged.stop_token_id) == ("stop", 3)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        stream.push(output(4))  # too late: dropped
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    asyncio.run(main())


def test_a_waiting_reader_is_woken():
    async def main():
        stream = TokenStream(lambda: None)
        loop = asyncio.get_running_loop()
        loop.call_soon(stream.push, output(7))
        assert (await anext(stream)).token_ids == (7,)
        loop.call_soon(stream.push, EngineOutput(finish_reason="cancelled"))
        assert [o.finish_reason async for o in stream] == ["cancelled"]

    asyncio.run(main())


def test_merging_keeps_every_field():
    logprob = TokenLogprob(1, -0.5)
    merged = merge_outputs(
        [
            output(1, logprobs=[logprob], prompt_logprobs=[None], num_cached_tokens=4),
            output(2, logprobs=[logprob], num_cached_tokens=4),
            EngineOutput(finish_reason="error", error="why", num_cached_tokens=4),
        ]
    )
    assert merged == EngineOutput(
        token_ids=(1, 2),
        logprobs=[logprob, logprob],
        prompt_logprobs=[None],
        finish_reason="error",
        error="why",
        num_cached_tokens=4,
    )


def test_every_way_of_leaving_cancels_once():
    async def main():
        calls: list[str] = []

        stream = TokenStream(lambda: calls.append("cancel"))
        stream.cancel()
        stream.cancel()
        assert calls == ["cancel"]

        stream = TokenStream(lambda: calls.append("aclose"))
        await stream.aclose()

        async with TokenStream(lambda: calls.append("with")):
            pass

        stream = TokenStream(lambda: calls.append("task"))
        task = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        stream = TokenStream(lambda: calls.append("never"))
        stream.push(output(1, finish_reason="length"))
        await stream.aclose()  # it has ended: nothing to cancel
        assert calls == ["cancel", "aclose", "with", "task"]

    asyncio.run(main())
