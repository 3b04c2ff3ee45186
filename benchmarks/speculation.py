"""Prompt-lookup drafts and forced grammar tokens, on beside off: tokens a second of tool calls and of a chat, batch 1.

In one process, each request is answered with `speculation` true and false in turn, greedily and with a seed; all
answers to it must be equal, token by token. A rate is the requests' completion tokens over their median times from
submission to the last token, added up. "cached": the prompt lies in the prefix cache, so that this is decoding;
"cold": it is computed too. `cpu_ratio` is the same from the process's CPU time: on a busy machine, with `--threads 1`,
it says what `ratio` says on an idle one. Not covered: HTTP. `--streams N` asks N requests at a time.

usage: python -m benchmarks.speculation [--model NAME|PATH] [--threads 2] [--repeats 5] [--streams 1] [--json]
"""

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.speculation_requests import CHATS, TOOL_CALLS, Body
from server.backends.base import Call
from server.config import DEFAULT_MODEL, Settings
from server.metrics import Metrics
from server.openai.protocol.chat import ChatRequest
from server.runtime import Loaded, load_model

MAX_TOKENS = 160
STYLES: dict[str, Body] = {"greedy": {"temperature": 0}, "seeded": {"temperature": 0.8, "seed": 7}}
COUNTS = ("generated_tokens", "draft_tokens", "accepted_tokens", "forced_tokens")


@dataclass
class Group:
    """Requests that are asked together, in one state of the cache."""

    answers: list[Sequence[int]] = field(default_factory=list)
    wall: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})
    cpu: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})


async def answer(loaded: Loaded, body: Body, salt: bytes) -> Sequence[int]:
    call = Call(Metrics().start_request("chat", "benchmark"), cache_salt=salt)
    request = ChatRequest.model_validate({"model": "", "max_tokens": MAX_TOKENS, **body})
    async for _ in loaded.backend.chat(request, call):
        pass
    return call.completion_token_ids[0]


async def measure(loaded: Loaded, bodies: list[Body], repeats: int, counts: Counter[str], *, is_cached: bool) -> Group:
    """On and off in turn; which of them first changes each time. `counts` grows by what the engine counted when on."""
    group = Group()
    for repeat in range(-1 if is_cached else 0, repeats):  # the first one fills the cache
        for speculation in (True, False) if repeat % 2 else (False, True):
            salt = b"cached" if is_cached else f"{repeat} {speculation}".encode()
            before, wall, cpu = loaded.engine.stats(), time.perf_counter(), time.process_time()
            answers = await asyncio.gather(
                *(answer(loaded, {**body, "speculation": speculation}, salt) for body in bodies)
            )
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            group.answers = group.answers or answers
            if group.answers != answers:
                raise SystemExit(f"the answers differ, speculation {speculation}: {answers}, not {group.answers}")
            if repeat < 0:
                continue
            group.wall[speculation].append(wall)
            group.cpu[speculation].append(cpu)
            if speculation:
                after = loaded.engine.stats()
                counts.update({name: getattr(after, name) - getattr(before, name) for name in COUNTS})
    return group


def figures(groups: list[Group]) -> dict[str, float]:
    num_tokens = sum(len(tokens) for group in groups for tokens in group.answers)
    off, on = (sum(statistics.median(group.wall[mode]) for group in groups) for mode in (False, True))
    cpu_off, cpu_on = (sum(statistics.median(group.cpu[mode]) for group in groups) for mode in (False, True))
    return {
        "off_tok_s": round(num_tokens / off, 1),
        "on_tok_s": round(num_tokens / on, 1),
        "ratio": round(off / on, 2),
        "cpu_ratio": round(cpu_off / cpu_on, 2),
    }


async def run(loaded: Loaded, args: argparse.Namespace) -> dict[str, Any]:
    loaded.engine.start(asyncio.get_running_loop())
    result: dict[str, Any] = {"model": args.model, "threads": args.threads, "streams": args.streams}
    for kind, requests in (("tools", TOOL_CALLS), ("chat", CHATS)):
        for style, options in STYLES.items():
            bodies = [{**body, **options} for body in requests]
            counts: Counter[str] = Counter()
            for cache in ("cached", "cold"):
                groups = [
                    await measure(
                        loaded, bodies[at : at + args.streams], args.repeats, counts, is_cached=cache == "cached"
                    )
                    for at in range(0, len(bodies), args.streams)
                ]
                result[f"{kind}_{style}_{cache}"] = figures(groups)
            result[f"{kind}_{style}_shares"] = {
                "accepted_of_drafted": round(counts["accepted_tokens"] / max(counts["draft_tokens"], 1), 3),
                "accepted_of_all": round(counts["accepted_tokens"] / counts["generated_tokens"], 3),
                "forced_of_all": round(counts["forced_tokens"] / counts["generated_tokens"], 3),
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
                print(f"{name:22}", "  ".join(f"{key} {value}" for key, value in values.items()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
