"""What the trace log costs in throughput: 32 streams on servers that differ only in how they log.

Measures tokens per second of clients that ask again as soon as an answer is complete, so that commits fall between the
steps of the others: logging off, durable on SQLite, relaxed on SQLite, durable on PostgreSQL (a private server with
fsync on; left out when its programs are not installed). All servers run at once and are asked in turn, a round in one
order and the next in the other; reported is the median over rounds of each round's ratio to logging off. Beside it, the
CPU time of the server's process (not PostgreSQL's) for each token, which other work on the machine disturbs least.
Every answer must be in the log afterwards.

usage: python -m benchmarks.trace_logging [--model NAME] [--rounds 6] [--seconds 5] [--json]
"""

import argparse
import asyncio
import glob
import json
import random
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.serve_process import Server, model_path
from benchmarks.streams import Answer, StreamLoad
from loadtests.sse_client import WORDS
from tests.server.postgres import BINARIES, Cluster

STREAMS, MAX_TOKENS = 32, 64
OFF = "off"
FLAGS = {
    OFF: ["--no-log-requests"],
    "sqlite_durable": [],
    "sqlite_relaxed": ["--trace-durability", "relaxed"],
    "postgres_durable": ["--database"],
}


@dataclass(frozen=True)
class Speed:
    tok_s: float
    cpu_ms_per_token: float


async def run_load(server: Server, model: str, seed: int, seconds: float) -> tuple[Speed, list[Answer]]:
    """Between the moment when all streams run and the end of the time."""

    def make_body(client: int, turn: int) -> dict[str, object]:
        draw = random.Random(f"{seed} {client} {turn}")
        prompt = " ".join(draw.choice(WORDS) for _ in range(6))
        return {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS - client}  # ends are spread out

    load = StreamLoad(server.url, make_body)
    load.start(STREAMS)
    await asyncio.sleep(0.5)
    begin, cpu_begin = time.perf_counter(), server.cpu_seconds()
    await asyncio.sleep(seconds)
    end, cpu_end = time.perf_counter(), server.cpu_seconds()
    answers = await load.stop()
    num_tokens = sum(begin <= moment < end for answer in answers for moment in answer.times)
    return Speed(num_tokens / (end - begin), (cpu_end - cpu_begin) * 1e3 / num_tokens), answers


def start_servers(stack: ExitStack, model: str, threads: int) -> dict[str, Server]:
    """One for each mode that this machine can run."""
    servers = {}
    for mode, flags in FLAGS.items():
        if flags == ["--database"]:
            if not glob.glob(BINARIES):
                print("no PostgreSQL here: left out", file=sys.stderr)
                continue
            postgres = Cluster()
            stack.callback(postgres.remove)
            flags = [*flags, postgres.url(postgres.create_database())]
        servers[mode] = stack.enter_context(Server(model, threads, *flags))
        servers[mode].seconds_to_first_token()
    return servers


def measure(servers: dict[str, Server], num_rounds: int, seconds: float) -> tuple[dict[str, list[Speed]], int]:
    """By mode, one a round; and how many answers are missing in the logs or failed."""
    model = servers[OFF].base_name()
    speeds: dict[str, list[Speed]] = {mode: [] for mode in servers}
    num_asked = dict.fromkeys(servers, 1)  # the one that waited for the start
    num_failed = 0
    for number in range(-1, num_rounds):  # the first warms up
        for mode in list(servers) if number % 2 else reversed(servers):
            speed, answers = asyncio.run(run_load(servers[mode], model, number, seconds if number >= 0 else 1.0))
            num_asked[mode] += len(answers)
            num_failed += sum(answer.error is not None for answer in answers)
            if number >= 0:
                speeds[mode].append(speed)
        print(f"round {number + 1} of {num_rounds}", file=sys.stderr)
    for mode, server in servers.items():
        logged = server.get("/v1/traces/stats")["num_traces"]
        num_failed += abs(logged - (0 if mode == OFF else num_asked[mode]))
    return speeds, num_failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    args = parser.parse_args()
    path = model_path(args.model)
    with ExitStack() as stack:
        servers = start_servers(stack, args.model, args.threads)
        speeds, num_failed = measure(servers, args.rounds, args.seconds)
    result: dict[str, object] = {"streams": STREAMS, "rounds": args.rounds, "failed_or_not_logged": num_failed}
    for mode, values in speeds.items():
        result[f"{mode}_tok_s"] = round(statistics.median(one.tok_s for one in values))
        result[f"{mode}_cpu_ms_per_token"] = round(statistics.median(one.cpu_ms_per_token for one in values), 3)
        if mode != OFF:
            pairs = list(zip(values, speeds[OFF], strict=True))
            costs = sorted(1 - one.tok_s / off.tok_s for one, off in pairs)
            cpu = statistics.median(one.cpu_ms_per_token / off.cpu_ms_per_token - 1 for one, off in pairs)
            result[f"{mode}_cost_percent"] = round(100 * statistics.median(costs), 1)
            result[f"{mode}_cost_range"] = [round(100 * costs[0], 1), round(100 * costs[-1], 1)]
            result[f"{mode}_cpu_cost_percent"] = round(100 * cpu, 1)
    if not args.json:
        print("\n".join(f"{key:<28} {value!s:>14}" for key, value in result.items()))
    print(json.dumps({"benchmark": "trace_logging", "model": Path(path).name, "threads": args.threads, **result}))


if __name__ == "__main__":
    main()
