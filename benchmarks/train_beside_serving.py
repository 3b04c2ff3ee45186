"""Serving while training on the same cores: what either costs the other.

One `sterna serve` and one `sterna finetune` (the sidecar as it is shipped: `nice` 5, half of the time while requests
are under way) on the default model, with the demonstration's questions as traces. In turn, `--rounds` times,
`--seconds` each: `--streams` streams alone; training alone; both. Measures the p50 and p99 gap between tokens as a
client sees it, and trained tokens per second (`sterna_train_tokens_total` of the sidecar). Targets: p50 at most 2x that
of serving alone, training at least 30 % of its own solo speed.

usage: python -m benchmarks.train_beside_serving [--streams 4] [--seconds 20] [--rounds 3] [--threads 2]
"""

import argparse
import asyncio
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.serve_process import START_DEADLINE_SECONDS, STERNA, Server
from benchmarks.streams import StreamLoad
from finetune.dataset.bfcl import fetch, read_questions
from finetune.demo.traffic import call_requests, post_known_answers, send
from finetune.serving.http import Http
from loadtests.sse_client import percentile
from server.config import DEFAULT_MODEL, Remote

NUM_QUESTIONS = 60
MAX_TOKENS = 64
STEP_DEADLINE_SECONDS = 300
"""The snapshot, the general answers and a first step of the round."""
P50_TARGET, SPEED_TARGET = 2.0, 0.30
ADAPTER = "tools"


def teach(server: Server, cache: Path) -> None:
    """Traces with known answers, enough for a round that outlasts this run."""
    questions = [one for one in read_questions(fetch(cache)) if one.set == "simple_python"][:NUM_QUESTIONS]
    http = Http(Remote(server.url, None), patience_seconds=60)
    asked = call_requests(questions)
    server.post("/v1/adapters", {"name": ADAPTER, "reason": "benchmark"})
    ids = send(http, {ADAPTER: {one.name for one in asked}}, asked, lambda: None)
    post_known_answers(http, asked, ids[ADAPTER])
    http.close()


class Sidecar:
    """`sterna finetune` on the server's data, with a round under way."""

    def __init__(self, url: str) -> None:
        self.url = url

    def tokens(self) -> float:
        """Trained on so far."""
        with urllib.request.urlopen(f"{self.url}/metrics") as response:
            text = response.read().decode()
        return sum(map(float, re.findall(r"^sterna_train_tokens_total(?:\{[^}]*\})? (\S+)$", text, re.MULTILINE)))

    def next_change(self) -> tuple[float, float]:
        """(when, tokens) of the next step's end: rates are between ends of steps, not between looks."""
        before, deadline = self.tokens(), time.perf_counter() + STEP_DEADLINE_SECONDS
        while time.perf_counter() < deadline:
            if (now := self.tokens()) != before:
                return time.perf_counter(), now
            time.sleep(0.05)
        raise SystemExit(f"no training step within {STEP_DEADLINE_SECONDS} s; see the sidecar's messages above")


@contextmanager
def sidecar(server: Server, data_dir: Path, model: str, threads: int) -> Iterator[Sidecar]:
    command = [STERNA, "finetune", "--url", server.url, "--data-dir", str(data_dir), "--model", model, "--port", "0"]
    command += ["--threads", str(threads), "--epochs", "1000", "--general-prompts", "0", "--min-new-traces", "1000000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        found = re.search(r"http://[^\s,]+", process.stdout.readline())
        if found is None:
            raise SystemExit("the sidecar did not start; see its message above")
        body = json.dumps({"adapter": ADAPTER}).encode()
        request = urllib.request.Request(f"{found[0]}/rounds", body, {"Content-Type": "application/json"})
        urllib.request.urlopen(request, timeout=START_DEADLINE_SECONDS).close()
        one = Sidecar(found[0])
        one.next_change()
        yield one
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


async def streams(server: Server, num: int, seconds: float) -> list[float]:
    """Gaps between tokens, in seconds."""
    base = await asyncio.to_thread(server.base_name)

    def make_body(client: int, turn: int) -> dict[str, Any]:
        return {"model": base, "prompt": f"Letter {client} of {turn}: the story of the", "max_tokens": MAX_TOKENS}

    load = StreamLoad(server.url, make_body)
    load.start(num)
    await asyncio.sleep(seconds)
    answers = await load.stop()
    failed = [answer.error for answer in answers if answer.error]
    if failed:
        raise SystemExit(f"{len(failed)} of {len(answers)} requests failed: {failed[0]}")
    return [gap for answer in answers for _, gap in answer.gaps()]


def rate(one: Sidecar, seconds: float) -> float:
    """Trained tokens per second, alone."""
    start, before = one.next_change()
    time.sleep(seconds)
    end, after = one.next_change()
    return (after - before) / (end - start)


async def both(server: Server, one: Sidecar, num: int, seconds: float) -> tuple[float, list[float]]:
    load = asyncio.create_task(streams(server, num, seconds + 10))
    await asyncio.sleep(2)  # all streams are under way
    start, before = await asyncio.to_thread(one.next_change)
    await asyncio.sleep(seconds - 5)
    end, after = await asyncio.to_thread(one.next_change)
    return (after - before) / (end - start), await load


def figures(rounds: list[dict[str, Any]]) -> dict[str, float]:
    def median(key: str) -> float:
        return statistics.median(one[key] for one in rounds)

    return {
        "train_alone_tok_s": round(median("alone"), 1),
        "train_beside_tok_s": round(median("beside"), 1),
        "train_share": round(statistics.median(one["beside"] / one["alone"] for one in rounds), 3),
        "itl_alone_p50_ms": round(median("p50_alone") * 1e3, 2),
        "itl_beside_p50_ms": round(median("p50_beside") * 1e3, 2),
        "itl_p50_ratio": round(statistics.median(one["p50_beside"] / one["p50_alone"] for one in rounds), 2),
        "itl_alone_p99_ms": round(median("p99_alone") * 1e3, 2),
        "itl_beside_p99_ms": round(median("p99_beside") * 1e3, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache" / "sterna", help="for the questions' wheel"
    )
    args = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sterna-bench-") as folder:
        data_dir = Path(folder)
        with Server(args.model, args.threads, data_dir=data_dir) as server:
            server.seconds_to_first_token()
            teach(server, args.cache)
            for number in range(args.rounds):
                alone = asyncio.run(streams(server, args.streams, args.seconds))
                with sidecar(server, data_dir, args.model, args.threads) as one:
                    solo = rate(one, args.seconds)
                    beside, gaps = asyncio.run(both(server, one, args.streams, args.seconds))
                rounds.append({
                    "alone": solo, "beside": beside,
                    "p50_alone": percentile(alone, 0.5), "p99_alone": percentile(alone, 0.99),
                    "p50_beside": percentile(gaps, 0.5), "p99_beside": percentile(gaps, 0.99),
                })  # fmt: skip
                print(f"round {number + 1} of {args.rounds}: {figures(rounds[-1:])}", file=sys.stderr)
    result = figures(rounds)
    print("\n".join(f"{key:<24} {value:>10,}" for key, value in result.items()))
    print(f"targets: itl_p50_ratio at most {P50_TARGET}, train_share at least {SPEED_TARGET}")
    print(json.dumps({"benchmark": "train_beside_serving", "streams": args.streams, "threads": args.threads, **result}))


if __name__ == "__main__":
    main()
