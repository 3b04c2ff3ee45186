"""Prompt-lookup drafts and forced grammar tokens, on beside off: tokens a second of tool calls and of a chat, batch 1.

In one process, each request is answered with `speculation` true and false in turn, greedily and with a seed, several
times; the answers must be equal token by token. A request's rate is its completion tokens over the median time from
submission to the last token. "cached": the prompt lies in the prefix cache, so that this is decoding; "cold": it is
computed too. Requests are made here: constrained tool calls whose arguments stand in the question, and chats, some of
which quote. Not covered: HTTP, and larger batches (`--streams N` asks N requests at a time and reports the total).

usage: python -m benchmarks.speculation [--model NAME|PATH] [--threads 2] [--repeats 5] [--streams 1] [--json]
"""

import argparse
import asyncio
import json
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speculation_requests import CHATS, TOOL_CALLS
from server.backends.base import Call
from server.config import DEFAULT_MODEL, Settings
from server.metrics import Metrics
from server.openai.protocol.chat import ChatRequest
from server.runtime import Loaded, load_model

MAX_TOKENS = 160
STYLES: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "seeded": {"temperature": 0.8, "seed": 7}}


@dataclass
class Measured:
    """One request in one style and one state of the cache."""

    num_tokens: int = 0
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})

    def median(self, speculation: bool) -> float:
        return statistics.median(self.seconds[speculation])


async def answer(loaded: Loaded, body: dict[str, Any], salt: bytes) -> tuple[list[int], float]:
    call = Call(Metrics().start_request("chat", "benchmark"), cache_salt=salt)
    request = ChatRequest.model_validate({"model": "", "max_tokens": MAX_TOKENS, **body})
    start = time.perf_counter()
    async for _ in loaded.backend.chat(request, call):
        pass
    return call.completion_token_ids[0], time.perf_counter() - start


async def measure(loaded: Loaded, bodies: list[dict[str, Any]], repeats: int, *, is_cached: bool) -> list[Measured]:
    """Of requests that are asked together; on and off in turn, which of them first changes each time."""
    found = [Measured() for _ in bodies]
    for repeat in range(repeats):
        for speculation in (True, False) if repeat % 2 else (False, True):
            salt = b"cached" if is_cached else f"{repeat} {speculation}".encode()
            sent = [{**body, "speculation": speculation} for body in bodies]
            if is_cached and repeat == 0:
                await asyncio.gather(*(answer(loaded, body, salt) for body in sent))
            answers = await asyncio.gather(*(answer(loaded, body, salt) for body in sent))
            for one, (token_ids, seconds) in zip(found, answers, strict=True):
                one.num_tokens = len(token_ids)
                one.seconds[speculation].append(seconds)
    return found


async def check_equal(loaded: Loaded, body: dict[str, Any]) -> None:
    with_drafts, without = [
        (await answer(loaded, {**body, "speculation": speculation}, b"cached"))[0] for speculation in (True, False)
    ]
    if with_drafts != without:
        raise SystemExit(f"the answers differ: {with_drafts} with drafts, {without} without, for {body}")


def figures(measured: list[Measured], streams: int) -> dict[str, float]:
    """Of all requests as one: total tokens over total time."""
    num_tokens = sum(one.num_tokens for one in measured) * streams / streams
    off, on = (sum(one.median(speculation) for one in measured) / streams for speculation in (False, True))
    return {
        "off_tok_s": round(num_tokens / off, 1),
        "on_tok_s": round(num_tokens / on, 1),
        "ratio": round(off / on, 2),
    }


async def run(loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    loaded.engine.start(asyncio.get_running_loop())
    result: dict[str, Any] = {"model": args.model, "threads": args.threads, "streams": args.streams}
    for kind, requests in (("tools", TOOL_CALLS), ("chat", CHATS)):
        for style, options in STYLES.items():
            bodies = [{**body, **options} for body in requests]
            for body in bodies:
                await check_equal(loaded, body)
            before = loaded.engine.stats()
            for name, is_cached in (("cached", True), ("cold", False)):
                measured: list[Measured] = []
                for begin in range(0, len(bodies), args.streams):
                    together = bodies[begin : begin + args.streams]
                    measured += await measure(loaded, together, args.repeats, is_cached=is_cached)
                result[f"{kind}_{style}_{name}"] = figures(measured, args.streams)
            after = loaded.engine.stats()
            drafted = after.draft_tokens - before.draft_tokens
            result[f"{kind}_{style}_shares"] = {
                "accepted_of_drafted": round((after.accepted_tokens - before.accepted_tokens) / max(drafted, 1), 3),
                "forced_of_generated": round(
                    2
                    * (after.forced_tokens - before.forced_tokens)
                    / (after.generated_tokens - before.generated_tokens),
                    3,
                ),
                "accepted_of_generated": round(
                    2
                    * (after.accepted_tokens - before.accepted_tokens)
                    / (after.generated_tokens - before.generated_tokens),
                    3,
                ),
            }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    args = parser.parse_args()
    loaded = load_model(Settings(model=args.model, threads=args.threads))
    try:
        result = asyncio.run(run(loaded, args))
    finally:
        loaded.close()
    if not args.json:
        for name, values in result.items():
            if isinstance(values, dict):
                print(f"{name:28}", "  ".join(f"{key} {value}" for key, value in values.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
